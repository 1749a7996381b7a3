"""Files as they come: every format against known numbers, the list of bad input, and mutated files of all formats; nothing but an image or an `AdamError` that names the file."""
import collections
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from adam_nb.config import AdamError
from adam_nb.guard import MAX_PIXELS
from adam_nb.images import IMAGE_SUFFIXES, image_size, open_colour, open_grey, open_image, open_mask

Y, X = np.mgrid[:48, :80]
BYTES = ((X*7 + Y*3 + (X > 60)*(Y < 9)*90) % 256).astype(np.uint8)               # no symmetry
WORDS = (BYTES.astype(np.uint16) << 8) + 77
COLOUR = np.stack([X*3, Y*5, 255 - X*2 - Y], 2).clip(0, 255).astype(np.uint8)


def write(path, array, **how):
    Image.fromarray(array).save(path, **how)
    return path


def refused(path, *words, opens=open_image):
    "One sentence that names the file and holds all `words`."
    with pytest.raises(AdamError) as e: opens(path)
    said = str(e.value)
    assert path.name[:60] in said and "\n" not in said and len(said) < 600, said
    for w in words: assert w in said, said
    return said


# formats ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, how", [("a.png", {}), ("a.tif", {}), ("l.tif", {"compression": "tiff_lzw"}), ("d.tif", {"compression": "tiff_adobe_deflate"}), ("p.tif", {"compression": "packbits"}),
                                       ("a.gif", {}), ("a.bmp", {}), ("a.webp", {"lossless": True}), ("a.pgm", {})])
def test_lossless_bytes(tmp_path, name, how):
    path = write(tmp_path/name, BYTES, **how)
    np.testing.assert_allclose(open_image(path), BYTES/255, atol=1e-7)
    assert image_size(path) == BYTES.shape and open_image(path).dtype == np.float32


@pytest.mark.parametrize("name, how", [("a.png", {}), ("a.tif", {}), ("l.tif", {"compression": "tiff_lzw"}), ("a.pgm", {})])
def test_16_bits(tmp_path, name, how):
    np.testing.assert_allclose(open_image(write(tmp_path/name, WORDS, **how)), WORDS/65535, atol=1e-7)


@pytest.mark.parametrize("name, how", [("a.png", {}), ("a.tif", {}), ("a.bmp", {}), ("a.webp", {"lossless": True}), ("a.ppm", {})])
def test_colours(tmp_path, name, how):
    path = write(tmp_path/name, COLOUR, **how)
    np.testing.assert_allclose(open_image(path), COLOUR/255, atol=1e-7)
    refused(path, "is coloured", opens=open_grey)


@pytest.mark.parametrize("name, how", [("a.jpg", {"quality": 98}), ("a.webp", {"quality": 98})])
def test_lossy(tmp_path, name, how):
    smooth = (X*2 + Y).astype(np.uint8)
    assert abs(open_grey(write(tmp_path/name, smooth, **how)) - smooth/255).max() < 8/255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1"])
def test_grey_in_other_modes(tmp_path, mode):
    im = Image.fromarray(BYTES if mode != "1" else (BYTES > 99).astype(np.uint8)*255).convert(mode)
    im.save(tmp_path/"a.png")
    assert open_image(tmp_path/"a.png").shape == BYTES.shape
    np.testing.assert_allclose(open_image(tmp_path/"a.png"), BYTES/255 if mode != "1" else BYTES > 99, atol=1e-7)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path, name, turn):
    smooth = (X*2 + Y).astype(np.uint8)
    seen = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose, 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}[turn](smooth)
    exif = Image.Exif(); exif[0x0112] = turn
    path = write(tmp_path/name, smooth, exif=exif, **({"quality": 98} if name != "a.png" and name != "a.tif" else {}))
    image = open_grey(path)
    assert image.shape == seen.shape == image_size(path) and abs(image - seen/255).max() < 8/255


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "?", "<f4", ">f8", "f2"])
@pytest.mark.parametrize("order", "CF")
def test_numpy(tmp_path, dtype, order):
    kind = np.dtype(dtype).kind
    array = np.asarray({"u": BYTES, "b": BYTES > 99, "f": BYTES/255}[kind].astype(dtype), order=order)
    np.save(tmp_path/"a.npy", array)
    truth = array.astype(float)/(np.iinfo(dtype).max if kind == "u" else 1)
    np.testing.assert_allclose(open_image(tmp_path/"a.npy"), truth, atol=1e-6)
    assert image_size(tmp_path/"a.npy") == BYTES.shape


def test_tiff_of_12_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (6, 8)).astype(np.uint16)
    packed = np.stack([values[:, ::2] >> 4, (values[:, ::2] & 15) << 4 | values[:, 1::2] >> 8, values[:, 1::2] & 255], 2).astype(np.uint8).tobytes()
    tags = [(256, 8), (257, 6), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 6), (279, len(packed))]
    (tmp_path/"a.tif").write_bytes((b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, 3, 1, v) for t, v in tags) + b"\0"*4).ljust(200, b"\0") + packed)
    np.testing.assert_allclose(open_image(tmp_path/"a.tif"), values/4095, atol=1e-7)


def test_jsrt(tmp_path):
    density = np.add.outer(np.arange(2048), 2*np.arange(2048)) % 4096
    density.astype(">u2").tofile(tmp_path/"JPCLN001.IMG")
    np.testing.assert_allclose(open_image(tmp_path/"JPCLN001.IMG"), 1 - density/4095, atol=1e-6)
    density.astype("<u2").tofile(tmp_path/"JPCLN002.IMG")
    refused(tmp_path/"JPCLN002.IMG", "byte order")


@pytest.mark.parametrize("stored, name", [("PNG", "a.jpg"), ("PNG", "a.dcm"), ("JPEG", "a.png"), ("TIFF", "a.IMG"), ("GIF", "a.npy"), ("WEBP", "a"), ("BMP", "a.txt")])
def test_content_counts_not_the_name(tmp_path, stored, name):
    Image.fromarray(BYTES).save(tmp_path/name, stored)
    assert open_grey(tmp_path/name).shape == BYTES.shape == image_size(tmp_path/name)


@pytest.mark.parametrize("name", ["a film.png", "Röntgen – été.png", "胸.png", "a\nline.png"])
def test_names(tmp_path, name):
    np.testing.assert_allclose(open_image(write(tmp_path/name, BYTES)), BYTES/255, atol=1e-7)


@pytest.mark.parametrize("value", [0, 1, 254, 255])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (9, 5)])
def test_constant_and_tiny_images(tmp_path, shape, value):
    for name in ("a.png", "a.tif", "a.bmp", "a.gif", "a.npy"):
        if name == "a.npy": np.save(tmp_path/name, np.full(shape, value, np.uint8))
        else: write(tmp_path/name, np.full(shape, value, np.uint8))
        np.testing.assert_allclose(open_image(tmp_path/name), np.full(shape, value/255), atol=1e-7)
    assert open_mask(tmp_path/"a.png").all() == (value > 0)


def test_masks(tmp_path):
    truth = BYTES > 99
    for name, top, how in [("a.png", 255, {}), ("b.png", 1, {}), ("a.gif", 255, {}), ("a.webp", 255, {"lossless": True}), ("a.jpg", 255, {"quality": 98}), ("a.bmp", 255, {})]:
        assert (open_mask(write(tmp_path/name, (truth*top).astype(np.uint8), **how)) == truth).mean() > (.97 if name == "a.jpg" else .9999), name


# bad input --------------------------------------------------------------------------------------------------------

def test_missing_empty_folder_and_loop(tmp_path):
    refused(tmp_path/"none.png", "There is no image")
    (tmp_path/"empty.png").touch(); refused(tmp_path/"empty.png", "empty (0 bytes)")
    (tmp_path/"folder.png").mkdir(); refused(tmp_path/"folder.png", "not a file")
    (tmp_path/"loop.png").symlink_to(tmp_path/"loop.png"); refused(tmp_path/"loop.png", "There is no image")
    (tmp_path/"gone.png").symlink_to(tmp_path/"none.png"); refused(tmp_path/"gone.png", "There is no image")
    os.mkfifo(tmp_path/"pipe.png"); refused(tmp_path/"pipe.png", "not a file")
    refused(tmp_path/("n"*300), "cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    write(tmp_path/"a.png", BYTES).chmod(0)
    refused(tmp_path/"a.png", "permissions")


@pytest.mark.parametrize("name, how", [("a.png", {}), ("a.jpg", {}), ("a.tif", {}), ("l.tif", {"compression": "tiff_lzw"}), ("a.gif", {}), ("a.bmp", {}), ("a.webp", {"lossless": True}), ("a.pgm", {})])
def test_truncated(tmp_path, name, how):
    whole = write(tmp_path/name, np.random.default_rng(0).integers(0, 256, (48, 80), np.uint8), **how).read_bytes()
    for keep in (1, 9, 20, len(whole)//4, len(whole)//2, len(whole)*3//4):
        (tmp_path/name).write_bytes(whole[:keep])
        refused(tmp_path/name)


@pytest.mark.parametrize("content, words", [(b"not an image", "matches no known format"), (b"\0"*5000, "matches no known format"), (b"<!DOCTYPE html><html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
                                            (pickle.dumps({"a": 1}), "pickled"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "matches no known format")])
def test_no_image(tmp_path, content, words):
    (tmp_path/"a.png").write_bytes(content)
    refused(tmp_path/"a.png", words); refused(tmp_path/"a.png", words, opens=image_size)


@pytest.mark.parametrize("suffix", [".zip", ".png", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_archives(tmp_path, suffix):
    film, path = write(tmp_path/"film.png", BYTES), tmp_path/f"films{suffix}"
    if suffix in (".zip", ".png"):
        with zipfile.ZipFile(path, "w") as z: z.write(film, "film.png")
    else:
        with tarfile.open(path, "w:" + suffix.removeprefix(".tar").strip(".")) as t: t.add(film, "film.png")
    refused(path, "archive", "unpack it")


def test_numpy_archives_and_pickles(tmp_path):
    np.savez(tmp_path/"a.npz", image=BYTES); refused(tmp_path/"a.npz", ".npz archive of arrays", ".npy")
    os.rename(tmp_path/"a.npz", tmp_path/"a.npy"); refused(tmp_path/"a.npy", ".npz archive of arrays")
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"pwned"),)
    np.save(tmp_path/"b.npy", np.array([[Bomb()]]), allow_pickle=True); refused(tmp_path/"b.npy", "pickled")
    (tmp_path/"c.npy").write_bytes(pickle.dumps(Bomb())); refused(tmp_path/"c.npy", "pickled")
    assert not (tmp_path/"pwned").exists()


@pytest.mark.parametrize("array, words", [
    (np.array([[.5, np.nan]]), "NaN"), (np.array([[.5, np.inf]]), "infinite"), (np.array([[0, 255.]]), "floats from 0 to 255"), (np.zeros((2, 3), np.int64), "int64"), (np.zeros((2, 3), complex), "complex128"),
    (np.zeros(3, np.uint8), "shape (3,)"), (np.zeros((2, 3, 4, 5), np.uint8), "shape (2, 3, 4, 5)"), (np.zeros((0, 5), np.uint8), "shape (0, 5)"), (np.zeros((5, 5, 7), np.uint8), "shape (5, 5, 7)"),
    (np.zeros((2, 3), "U9"), "str288"), (np.zeros((2, 2), [("a", "u1")]), "pixels, whose range says nothing"),
])
def test_bad_arrays(tmp_path, array, words):
    np.save(tmp_path/"a.npy", array)
    refused(tmp_path/"a.npy", words)


def npy(shape, descr="|u1", body=b"\0"*64):
    head = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    head += b" "*(-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body


def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=0):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(50_000))) + chunk(b"IEND", b"")


def tiff(width, height, tile=None):
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)] + ([(322, tile), (323, tile), (324, 200), (325, 50)] if tile else [(273, 200), (278, height), (279, 50)])
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in sorted(tags)) + b"\0\0\0\0").ljust(200, b"\0") + zlib.compress(bytes(10_000)).ljust(50, b"\0")


BOMBS = {
    "a.npy": npy((10**6, 10**6)), "b.npy": npy((10**30, 10**30)), "c.npy": npy((9000, 9000, 3), "<f8"), "d.npy": npy((3, 3), "|V999999999"), "e.npy": npy((5, -5)), "f.npy": npy((8000, 8000)),
    "g.npy": b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\x7f" + b"{"*300, "h.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"("*9000,
    "a.png": png(20_000, 20_000), "b.png": png(2**31 - 1, 2**31 - 1, 16, 6), "a.tif": tiff(60_000, 60_000), "b.tif": tiff(64, 64, 40_000), "a.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 30_000, 30_000, 1, 8, 1, 0, 0, 0, 0, 0),
    "a.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x4c\x01\x00;", "a.pgm": b"P5 99999 99999 255\n" + b"\0"*99, "b.pgm": b"P2 99999 99999 255\n1 2 3",
    "a.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_382).to_bytes(3, "little")*2 + b"junkjunk", "b.webp": b"RIFF\x1e\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\x0f" + b"junkjunkjunk",
    "a.jpg": b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + b"\0"*99,
}
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    "A few hundred bytes that claim much more: refused quickly, without the memory."
    (tmp_path/name).write_bytes(BOMBS[name])
    for opens in (open_image, image_size) if name not in ("b.tif",) else (open_image,):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        tracemalloc.start()
        try: refused(tmp_path/name, opens=opens)
        finally: peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert time.perf_counter() - began < 2 and peak < 8e6 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000, (peak, before)


def test_the_limit_is_stated(tmp_path):
    (tmp_path/"a.png").write_bytes(png(20_000, 20_000))
    refused(tmp_path/"a.png", f"{MAX_PIXELS:,}")


def test_frames(tmp_path):
    frames = [Image.fromarray(BYTES), Image.fromarray(255 - BYTES)]
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        frames[0].save(tmp_path/name, save_all=True, append_images=frames[1:])
        refused(tmp_path/name, "holds 2 frames")


# properties -------------------------------------------------------------------------------------------------------

LOSSLESS = {"a.png": {}, "a.tif": {}, "l.tif": {"compression": "tiff_lzw"}, "a.bmp": {}, "a.webp": {"lossless": True}, "a.pgm": {}, "a.gif": {}, "a.npy": None}

@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(sorted(LOSSLESS)), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from(["grey", "deep", "colour"]), st.integers(0, 2**32 - 1))
def test_any_array_comes_back(tmp_path_factory, name, shape, kind, seed):
    if kind == "deep" and name not in ("a.png", "a.tif", "l.tif", "a.pgm", "a.npy") or kind == "colour" and name in ("a.pgm", "a.gif"): kind = "grey"
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 65536 if kind == "deep" else 256, shape + (3,)*(kind == "colour")).astype(np.uint16 if kind == "deep" else np.uint8)
    path = tmp_path_factory.mktemp("any")/name
    if LOSSLESS[name] is None: np.save(path, array)
    else: write(path, array, **LOSSLESS[name])
    truth = array/np.iinfo(array.dtype).max
    image = open_image(path)
    if kind == "colour" and image.ndim == 2: image = open_colour(path)                  # by chance grey
    np.testing.assert_allclose(image, truth, atol=1e-6)
    assert image_size(path) == shape


STARTS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"GIF89a", b"BM", b"RIFF\x40\0\0\0WEBP", b"P5 ", b"P1\n", b"\x93NUMPY\x01\0", b"\0"*128 + b"DICM", b"\x08\0\x05\0CS\x04\0abcd"]

@settings(max_examples=150, deadline=None, database=None)
@given(st.sampled_from(STARTS), st.binary(max_size=600), st.sampled_from(IMAGE_SUFFIXES))
def test_any_bytes_are_an_image_or_an_error(tmp_path_factory, start, body, suffix):
    path = tmp_path_factory.mktemp("any")/f"a{suffix}"
    path.write_bytes(start + body)
    for opens in (open_image, image_size, open_mask):
        try: opens(path)
        except AdamError as e: assert path.name in str(e)


# mutated files ----------------------------------------------------------------------------------------------------

def seeds(folder):
    "One small file of each format and compression, with noise so that its stream is long: {name: bytes}."
    import test_dicom as d
    noise, files, exif = np.random.default_rng(0), {}, Image.Exif()
    exif[0x0112] = 6
    BYTES, WORDS, COLOUR, FILM = (((a + noise.integers(0, top//16, a.shape)) % top).astype(a.dtype) for a, top in ((globals()["BYTES"], 256), (globals()["WORDS"], 65536), (globals()["COLOUR"], 256), (d.FILM, 4096)))
    for name, array, how in [("a.png", BYTES, {}), ("w.png", WORDS, {}), ("c.png", COLOUR, {"exif": exif}), ("a.jpg", BYTES, {"exif": exif}), ("c.jpg", COLOUR, {}), ("p.jpg", COLOUR, {"progressive": True}),
                             ("a.tif", BYTES, {}), ("l.tif", WORDS, {"compression": "tiff_lzw"}), ("d.tif", COLOUR, {"compression": "tiff_adobe_deflate"}), ("j.tif", COLOUR, {"compression": "jpeg"}),
                             ("g.tif", BYTES > 99, {"compression": "group4"}), ("k.tif", BYTES, {"compression": "packbits", "exif": exif}), ("a.gif", BYTES, {}), ("a.bmp", BYTES, {}), ("c.bmp", COLOUR, {}),
                             ("a.webp", BYTES, {"lossless": True}), ("c.webp", COLOUR, {"exif": exif}), ("a.pgm", BYTES, {}), ("c.ppm", COLOUR, {})]:
        files[name] = write(folder/name, array, **how).read_bytes()
    palette = Image.fromarray(BYTES); palette.putpalette([v for i in range(256) for v in (255 - i, i, 9)])
    for name in ("p.png", "p.gif", "p.tif"): palette.save(folder/name); files[name] = (folder/name).read_bytes()
    files["t.tif"] = tiff(64, 64, 64)
    files["t.pgm"] = b"P2 8 6 255\n" + b" ".join(b"%d" % v for v in range(48))
    for name, array in [("a.npy", WORDS), ("f.npy", COLOUR/255)]: np.save(folder/name, array); files[name] = (folder/name).read_bytes()
    for name, how in d.EXACT.items():
        files[f"{name}.dcm"] = how(folder/"film.dcm", d.dataset(FILM, 12, WindowCenter=2000, WindowWidth=3000)).read_bytes()
        files[f"{name} colour.dcm"] = how(folder/"film.dcm", d.dataset(COLOUR)).read_bytes()
    files["near.dcm"] = d.by_pydicom(folder/"film.dcm", d.dataset(FILM, 12), d.uid.JPEGLSNearLossless, jls_error=2).read_bytes()
    files["extended.dcm"] = d.by_gdcm(folder/"film.dcm", d.dataset(d.SMOOTH, 12), "JPEGExtendedProcess2_4", 90).read_bytes()
    files["baseline.dcm"] = d.jpeg_film(folder/"film.dcm", d.in_jpeg(BYTES), BYTES).read_bytes()
    files["baseline colour.dcm"] = d.jpeg_film(folder/"film.dcm", d.in_jpeg(COLOUR), COLOUR, "YBR_FULL_422").read_bytes()
    for syntax in ("ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "DeflatedExplicitVRLittleEndian", "ExplicitVRBigEndian"):
        ds = d.dataset(FILM, 12, getattr(d.uid, syntax), VOILUTSequence=d.lut(d.SQUARE, 16), PixelPaddingValue=3)
        files[f"{syntax}.dcm"] = d.saved(folder/"film.dcm", ds).read_bytes()
    files["bare.dcm"] = files["ImplicitVRLittleEndian.dcm"][132:]
    tables = {f"{c}PaletteColorLookupTable{part}": v for c in ("Red", "Green", "Blue") for part, v in (("Descriptor", [256, 0, 16]), ("Data", np.arange(256, dtype="<u2").tobytes()))}
    files["palette.dcm"] = d.saved(folder/"film.dcm", d.dataset(BYTES, PhotometricInterpretation="PALETTE COLOR", **tables)).read_bytes()
    return files


def mutate(whole, rng):
    "Flipped bytes, extreme bytes, changed lengths, cut, doubled or missing pieces; half of the times near the beginning. Half of the PNGs get true checksums again, or no change would come past them."
    data, n = bytearray(whole), len(whole)
    place = lambda room=0: int(rng.integers(0, max(1, (min(n, 400) if rng.random() < .5 else n) - room)))
    for _ in range(int(rng.integers(1, 4))):
        how = int(rng.integers(0, 7))
        if how == 0:
            for _ in range(int(rng.integers(1, 9))): data[place() % len(data)] ^= 1 << int(rng.integers(0, 8))
        elif how == 1: data[place() % len(data)] = int(rng.choice([0, 1, 127, 128, 254, 255]))
        elif how == 2: data = data[:max(1, place() % len(data))]
        elif how in (3, 4):                                                                # a length field of 2, 4 or 8 bytes, either order
            size = int(rng.choice([2, 4, 8])); value = int(rng.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, int(rng.integers(0, 2**20))])) % 2**(8*size)
            at = place(size) % len(data); data[at:at + size] = value.to_bytes(size, ("little", "big")[int(rng.integers(0, 2))])
        elif how == 5: at = place() % len(data); del data[at:at + int(rng.integers(1, 40))]
        else: at = place() % len(data); data[at:at] = data[at:at + int(rng.integers(1, 40))]
        if not data: data = bytearray(b"\0")
    return with_checksums(bytes(data)) if data.startswith(b"\x89PNG") and rng.random() < .5 else bytes(data)


def with_checksums(data):
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        n = int.from_bytes(out[at:at + 4], "big")
        if at + 12 + n > len(out): break
        out[at + 8 + n:at + 12 + n] = struct.pack(">I", zlib.crc32(out[at + 4:at + 8 + n]))
        at += 12 + n
    return bytes(out)


LIMIT_S, LIMIT_BYTES = 5, 3*2**30

def _child(jobs, folder, pipe):
    "Open each (name, bytes): one letter for each into the pipe. `SIGALRM` ends the process after `LIMIT_S`, the system after `LIMIT_BYTES`."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    used = int(open("/proc/self/statm").read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES,)*2)
    for i, (name, data) in jobs:
        path = folder/name
        path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            image = open_image(path)
            letter = b"i" if image.dtype == np.float32 and image.ndim in (2, 3) and np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1 else b"w"
        except AdamError as e: letter = next((mark for words, mark in ((b"more memory than", b"m"), (b"the decoder died", b"d"), (b"the decoder took longer", b"t")) if words in str(e).encode()), b"e") if name in str(e) and "\n" not in str(e) else b"n"
        except BaseException as e:
            letter = b"x"
            (folder/f"unexpected-{i}.txt").write_text(repr(e))
        try: image_size(path)
        except AdamError: pass
        except BaseException as e:
            letter = b"x"
            (folder/f"unexpected-{i}.txt").write_text(repr(e))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(pipe, letter)
    from adam_nb.guard import stop_helper
    stop_helper()
    os._exit(0)


def run_mutants(jobs, folder):
    "Letters of all jobs; `h` for a hang, `c` for a crash; a child that dies is replaced and the job that killed it named."
    letters = {}
    queue = collections.deque(enumerate(jobs))
    while queue:
        todo = list(queue)
        read, write_end = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read)
            _child(todo, folder, write_end)
        os.close(write_end)
        while got := os.read(read, 4096):
            for letter in got.decode(): letters[queue.popleft()[0]] = letter
        os.close(read)
        status = os.waitpid(pid, 0)[1]
        if status: letters[queue.popleft()[0]] = "h" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "c"
    return [letters[i] for i in range(len(jobs))]


def report(folder, jobs, letters):
    by = collections.defaultdict(collections.Counter)
    for (name, _), letter in zip(jobs, letters): by[name][letter] += 1
    meaning = {"i": "image", "e": "AdamError", "d": "AdamError (the helper died)", "t": "AdamError (the helper was ended)", "m": "out of memory", "w": "wrong image", "n": "error without name", "x": "other error", "h": "hang", "c": "crash"}
    lines = [f"{name:32s} " + ", ".join(f"{n} {meaning[k]}" for k, n in sorted(c.items())) for name, c in sorted(by.items())]
    total = collections.Counter(letters)
    lines.append(f"{len(jobs)} mutated files: " + ", ".join(f"{n} {meaning[k]}" for k, n in sorted(total.items())))
    lines += [p.read_text()[:300] for p in sorted(folder.glob("unexpected-*"))[:20]]
    return total, "\n".join(lines)


def check_mutants(folder, each, first=0):
    files = seeds(folder)
    jobs = [(name, mutate(whole, np.random.default_rng([first + k, i]))) for i, (name, whole) in enumerate(sorted(files.items())) for k in range(each)]
    began = time.perf_counter()
    letters = run_mutants(jobs, folder)
    total, said = report(folder, jobs, letters)
    print(f"\n{said}\n{time.perf_counter() - began:.0f} s")
    bad = [j for j, letter in zip(jobs, letters) if letter not in "iedt"]
    if bad and (keep := os.environ.get("ADAM_NB_KEEP_MUTANTS")):
        for i, (name, data) in enumerate(bad): open(f"{keep}/{i:03d}-{name}", "wb").write(data)
    assert not bad, said
    assert total["i"] and total["e"]
    return len(jobs)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time as on Linux")
def test_a_few_mutated_files(tmp_path): check_mutants(tmp_path, each=6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time as on Linux")
def test_ten_thousand_mutated_files(tmp_path): assert check_mutants(tmp_path, each=250, first=1000) >= 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time as on Linux")
def test_the_harness_sees_hangs_and_crashes(tmp_path, monkeypatch):
    "The three things that the mutants must not do are noticed."
    import sys as here
    def opens(path):
        what = path.read_bytes()
        if what == b"hang": time.sleep(99)
        if what == b"crash": os.kill(os.getpid(), signal.SIGKILL)
        if what == b"other": raise ValueError
        raise AdamError(f"{path} is bad")
    module = here.modules[__name__]
    monkeypatch.setattr(module, "open_image", opens); monkeypatch.setattr(module, "LIMIT_S", .2)
    assert run_mutants([("a", b"fine"), ("a", b"hang"), ("a", b"fine"), ("a", b"crash"), ("a", b"other"), ("a", b"fine")], tmp_path) == list("ehecxe")
