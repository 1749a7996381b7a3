"""DICOM files with true encodings, made here, against the known numbers: each compression, polarity, window, table, colour and padding on a film without symmetry; and errors that keep secrets."""
import io
import logging
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame

from adam_nb import dicom as room
from adam_nb.config import AdamError
from adam_nb.dicom import dicom_facts, dicom_size, open_dicom
from adam_nb.guard import stop_helper
from adam_nb.images import image_size, open_colour, open_grey, open_image

gdcm, jpeg_ls, openjpeg = (pytest.importorskip(m, reason=f"{m} encodes these fixtures") for m in ("gdcm", "jpeg_ls", "openjpeg"))


@pytest.fixture(scope="module", autouse=True)
def helper():
    yield
    stop_helper()


Y, X = np.mgrid[:48, :80]
FILM = ((X*97 + Y*31 + (X > 30)*(Y < 9)*900) % 4096).astype(np.uint16)          # 12 bits, no symmetry
SMOOTH = (X*45 + Y*10).astype(np.uint16)                                         # for lossy encoders
BYTES = (FILM >> 4).astype(np.uint8)
COLOUR = np.stack([X*3, Y*5, 255 - X*2 - Y], 2).clip(0, 255).astype(np.uint8)
assert len({t.tobytes() for a in (FILM, FILM.T) for t in (a, a[::-1], a[:, ::-1], a[::-1, ::-1])}) == 8


def dataset(stored, bits=None, syntax=uid.ExplicitVRLittleEndian, **tags):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (1, "MONOCHROME2") if stored.ndim == 2 else (3, "RGB")
    if stored.ndim == 3: ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8*stored.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(stored.dtype.kind == "i")
    for k, v in tags.items(): setattr(ds, k, v)
    if "PixelData" not in tags: ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OB" if syntax.is_compressed else "OW"
    return ds


def saved(path, ds, **how):
    ds.save_as(path, **({"enforce_file_format": True} | how))
    return path


def by_gdcm(path, ds, syntax, quality=None):
    "The film of `ds`, encoded by GDCM."
    plain = path.with_name("plain.dcm")
    saved(plain, ds)
    reader = gdcm.ImageReader(); reader.SetFileName(str(plain)); assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax(); change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    if quality is not None:
        codec = gdcm.JPEGCodec(); codec.SetLossless(False); codec.SetQuality(quality); change.SetUserCodec(codec)
    change.SetInput(reader.GetImage()); assert change.Change()
    writer = gdcm.ImageWriter(); writer.SetFileName(str(path)); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput()); assert writer.Write()
    return path


def by_pydicom(path, ds, syntax, **how):
    ds.compress(syntax, generate_instance_uid=False, **how)
    return saved(path, ds)


def in_jpeg(array, **how):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=98, **how)
    return buffer.getvalue()


def jpeg_film(path, frame, array, photometric="MONOCHROME2", syntax=uid.JPEGBaseline8Bit, **tags):
    return saved(path, dataset(array, syntax=syntax, PhotometricInterpretation=photometric, PixelData=encapsulate([frame]), **tags))


# compressions -----------------------------------------------------------------------------------------------------

EXACT = {
    "jpeg lossless": lambda p, ds: by_gdcm(p, ds, "JPEGLosslessProcess14"),
    "jpeg lossless sv1": lambda p, ds: by_gdcm(p, ds, "JPEGLosslessProcess14_1"),
    "jpeg-ls": lambda p, ds: by_pydicom(p, ds, uid.JPEGLSLossless),
    "jpeg 2000 lossless": lambda p, ds: by_pydicom(p, ds, uid.JPEG2000Lossless, encoding_plugin="pylibjpeg"),
    "jpeg 2000 by gdcm": lambda p, ds: by_gdcm(p, ds, "JPEG2000Lossless"),
    "rle": lambda p, ds: by_pydicom(p, ds, uid.RLELossless, encoding_plugin="pydicom"),      # GDCM's encoder aborts the process on some small films
}
SYNTAX = {"jpeg lossless": "1.2.840.10008.1.2.4.57", "jpeg lossless sv1": "1.2.840.10008.1.2.4.70", "jpeg-ls": "1.2.840.10008.1.2.4.80", "jpeg 2000 lossless": "1.2.840.10008.1.2.4.90",
          "jpeg 2000 by gdcm": "1.2.840.10008.1.2.4.90", "rle": "1.2.840.10008.1.2.5"}
STORED = {"8 bits": (BYTES, 8), "12 bits": (FILM, 12), "16 bits": ((FILM.astype(np.uint32)*16 + 7).astype(np.uint16), 16), "12 bits signed": (FILM.astype(np.int16) - 2048, 12)}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("how", EXACT)
def test_lossless(tmp_path, how, stored):
    array, bits = STORED[stored]
    path = EXACT[how](tmp_path/"film.dcm", dataset(array, bits))
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == SYNTAX[how]      # the encoder did what it was asked for
    low = 2**(bits - 1) if array.dtype.kind == "i" else 0
    np.testing.assert_allclose(open_image(path), (array.astype(float) + low)/(2**bits - 1), atol=1e-7)
    assert image_size(path) == array.shape
    assert not dicom_facts(path)["lossy"] and dicom_facts(path)["bits"] == bits


@pytest.mark.parametrize("how", EXACT)
def test_lossless_colour(tmp_path, how):
    path = EXACT[how](tmp_path/"eye.dcm", dataset(COLOUR))
    np.testing.assert_allclose(open_image(path), COLOUR/255, atol=1e-6)


def test_colour_of_16_bits_in_jpeg_2000(tmp_path):
    deep = (COLOUR.astype(int)*257 - 5*(COLOUR > 9)).astype(np.uint16)
    np.testing.assert_allclose(open_image(by_gdcm(tmp_path/"eye.dcm", dataset(deep), "JPEG2000Lossless")), deep/65535, atol=1e-7)


def test_jpeg_baseline(tmp_path):
    grey = (SMOOTH >> 4).astype(np.uint8)
    path = jpeg_film(tmp_path/"film.dcm", in_jpeg(grey), grey, LossyImageCompression="01")
    assert abs(open_image(path) - grey/255).max() < 3/255
    assert dicom_facts(path) == {"size": (48, 80), "bits": 8, "photometric": "MONOCHROME2", "transfer_syntax": "JPEG Baseline (Process 1)", "lossy": True, "window": False, "padding": False}


def test_jpeg_extended(tmp_path):
    path = by_gdcm(tmp_path/"film.dcm", dataset(SMOOTH, 12), "JPEGExtendedProcess2_4", 95)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == uid.JPEGExtended12Bit
    assert abs(open_image(path)*4095 - SMOOTH).max() <= 16 and len(np.unique(open_image(path))) > 256      # more than 8 bits have come through
    assert dicom_facts(path)["lossy"]
    grey = (SMOOTH >> 4).astype(np.uint8)
    path = jpeg_film(tmp_path/"eight.dcm", in_jpeg(grey), grey, syntax=uid.JPEGExtended12Bit)
    assert abs(open_image(path) - grey/255).max() < 3/255


@pytest.mark.parametrize("error", [1, 5])
def test_jpeg_ls_near_lossless(tmp_path, error):
    path = by_pydicom(tmp_path/"film.dcm", dataset(FILM, 12), uid.JPEGLSNearLossless, jls_error=error)
    difference = abs(open_image(path)*4095 - FILM).max()
    assert 0 < difference <= error + .01 and dicom_facts(path)["lossy"]


def test_jpeg_2000_lossy(tmp_path):
    path = by_pydicom(tmp_path/"film.dcm", dataset(SMOOTH, 12), uid.JPEG2000, j2k_cr=[20], encoding_plugin="pylibjpeg")
    assert 0 < abs(open_image(path)*4095 - SMOOTH).mean() < 20 and dicom_facts(path)["lossy"]


def marked(frame, marker):
    "A JPEG frame whose JFIF marker is replaced."
    return frame[:2] + marker + frame[4 + int.from_bytes(frame[4:6], "big"):]


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
@pytest.mark.parametrize("frame, photometric", [
    (in_jpeg(COLOUR, subsampling=0), "YBR_FULL_422"),                                   # JFIF
    (in_jpeg(COLOUR, subsampling=0), "RGB"),                                            # JFIF knows better than the header
    (marked(in_jpeg(COLOUR, subsampling=0), b""), "YBR_FULL_422"),                      # no marker: the header decides
    (marked(in_jpeg(COLOUR, subsampling=0), ADOBE + b"\x01"), "YBR_FULL_422"),          # Adobe, YCbCr
    (in_jpeg(COLOUR, keep_rgb=True), "RGB"),                                            # Adobe, RGB
    (marked(in_jpeg(COLOUR, keep_rgb=True), b""), "RGB"),                               # no marker, but components named R, G, B
    (marked(in_jpeg(COLOUR, keep_rgb=True), b""), "YBR_FULL_422"),                      # which know better than the header
    (in_jpeg(COLOUR, subsampling=2), "YBR_FULL_422"),                                   # half the colour resolution
], ids=["jfif", "jfif against header", "bare", "adobe ycc", "adobe rgb", "named", "named against header", "subsampled"])
def test_colour_jpeg(tmp_path, frame, photometric):
    path = jpeg_film(tmp_path/"eye.dcm", frame, COLOUR, photometric)
    assert abs(open_colour(path) - COLOUR/255).max() < 12/255


@pytest.mark.parametrize("marker", [b"", b"\xff\xee\x00\x0cAdobe\x00\x00\x00\x00\x00"], ids=["bare", "adobe without a word"])
def test_bare_jpeg_of_rgb_channels(tmp_path, marker):
    "Where the stream says nothing the header's RGB counts: the channels come out untransformed."
    path = jpeg_film(tmp_path/"eye.dcm", marked(in_jpeg(COLOUR, subsampling=0), marker), COLOUR, "RGB")
    assert abs(open_colour(path)*255 - np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))).max() < 4


# native syntaxes --------------------------------------------------------------------------------------------------

def test_explicit_implicit_deflated_and_big_endian(tmp_path):
    tags = dict(WindowCenter=2000, WindowWidth=3000, PixelPaddingValue=97)
    want = None
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian):
        got = open_image(saved(tmp_path/f"{syntax}.dcm", dataset(FILM, 12, syntax, **tags)))
        want = got if want is None else want
        np.testing.assert_array_equal(got, want)
    ds = dataset(FILM, 12, uid.ExplicitVRBigEndian, PixelData=FILM.astype(">u2").tobytes(), **tags)
    np.testing.assert_array_equal(open_image(saved(tmp_path/"big.dcm", ds)), want)
    expect = np.clip((FILM - 1999.5)/2999 + .5, 0, 1) * (FILM != 97)
    np.testing.assert_allclose(want, expect, atol=1e-6)


def test_big_endian_bytes_and_tables(tmp_path):
    table = Dataset(); table.LUTDescriptor = [4096, 0, 12]; table.LUTData = (4095 - np.arange(4096)).astype(">u2").tobytes(); table["LUTData"].VR = "OW"
    ds = dataset(FILM, 12, uid.ExplicitVRBigEndian, PixelData=FILM.astype(">u2").tobytes(), VOILUTSequence=[table])
    np.testing.assert_allclose(open_image(saved(tmp_path/"big.dcm", ds)), 1 - FILM/4095, atol=1e-6)
    swapped = BYTES.reshape(-1, 2)[:, ::-1].tobytes()                                    # 8 bits in 16-bit words
    np.testing.assert_allclose(open_image(saved(tmp_path/"bytes.dcm", dataset(BYTES, 8, uid.ExplicitVRBigEndian, PixelData=swapped))), BYTES/255, atol=1e-6)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_without_preamble(tmp_path, syntax):
    ds = dataset(FILM, 12, syntax, PixelData=FILM.astype(">u2" if syntax == uid.ExplicitVRBigEndian else "<u2").tobytes())
    del ds.file_meta
    path = saved(tmp_path/"bare.dcm", ds, enforce_file_format=False, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_allclose(open_image(path), FILM/4095, atol=1e-6)


def test_meta_header_without_preamble(tmp_path):
    path = EXACT["rle"](tmp_path/"film.dcm", dataset(FILM, 12))
    path.write_bytes(path.read_bytes()[132:])
    np.testing.assert_allclose(open_image(path), FILM/4095, atol=1e-6)


def test_unused_high_bits_are_ignored(tmp_path):
    overlay = FILM | (X.astype(np.uint16) % 3 << 13)                                     # old overlays in bits 13 and 14
    np.testing.assert_allclose(open_image(saved(tmp_path/"film.dcm", dataset(overlay, 12))), FILM/4095, atol=1e-6)


# what is seen -----------------------------------------------------------------------------------------------------

def lut(values, bits, first=0, vr="OW"):
    item = Dataset()
    item.LUTDescriptor = [len(values) % 65536, first, bits]
    item.LUTData = np.asarray(values, "<u2").tobytes() if vr == "OW" else [int(v) for v in values]
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", vr
    return [item]


SQUARE = (np.arange(4096)**2 >> 8).astype(int)
@pytest.mark.filterwarnings("ignore:The value for the data element")            # pydicom writes a long table of numbers as UN
@pytest.mark.parametrize("vr", ["OW", "US"])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_tables(tmp_path, syntax, vr):
    ds = dataset(FILM, 12, syntax, ModalityLUTSequence=lut(SQUARE, 16, vr=vr), VOILUTSequence=lut(np.arange(65536)[::-1] >> 8, 8, vr=vr), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(open_image(saved(tmp_path/"film.dcm", ds)), 1 - ((65535 - SQUARE[FILM]) >> 8)/255, atol=1e-6)


def test_order_is_modality_window_inversion(tmp_path):
    ds = dataset(FILM, 12, RescaleSlope=.5, RescaleIntercept=100, WindowCenter=900, WindowWidth=1201, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(open_image(saved(tmp_path/"film.dcm", ds)), 1 - np.clip((FILM*.5 + 100 - 899.5)/1200 + .5, 0, 1), atol=1e-6)


def test_negative_slope(tmp_path):
    ds = dataset(FILM, 12, RescaleSlope=-1, RescaleIntercept=4095)
    np.testing.assert_allclose(open_image(saved(tmp_path/"film.dcm", ds)), 1 - FILM/4095, atol=1e-6)


def test_table_with_a_negative_start(tmp_path):
    signed = FILM.astype(np.int16) - 2048
    ds = dataset(signed, 12, VOILUTSequence=lut(np.arange(4096), 12, first=63488))       # −2048, read as unsigned
    np.testing.assert_allclose(open_image(saved(tmp_path/"film.dcm", ds)), FILM/4095, atol=1e-6)


@pytest.mark.parametrize("bits", [12, 16])
def test_precision(tmp_path, bits):
    ramp = np.arange(2**bits, dtype=np.uint16).reshape(-1, 64)
    seen = open_image(saved(tmp_path/"film.dcm", dataset(ramp, bits, WindowCenter=2**(bits - 1), WindowWidth=2**bits)))
    assert seen.dtype == np.float32 and len(np.unique(seen)) >= 2**bits - 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("value", [-2000, 63536])                                         # the same 16 bits, with the wrong sign
def test_padding(tmp_path, photometric, value):
    stored = FILM.astype(np.int16) % 1000
    stored[:, :3] = -2000
    window = dict(WindowCenter=500, WindowWidth=1000, PhotometricInterpretation=photometric)
    ds = dataset(stored, 16, **window)
    ds.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    seen = open_image(saved(tmp_path/"film.dcm", ds))
    bare = open_image(saved(tmp_path/"bare.dcm", dataset(stored, 16, **window)))
    assert (seen[:, :3] == 0).all() and dicom_facts(tmp_path/"film.dcm")["padding"]
    np.testing.assert_array_equal(seen[:, 3:], bare[:, 3:])                               # no influence on the rest
    assert (bare[:, :3] == (photometric == "MONOCHROME1")).all()


@pytest.mark.parametrize("native, photometric", [("full", "YBR_FULL"), ("422", "YBR_FULL_422")])
def test_ybr(tmp_path, native, photometric):
    from pydicom.pixels import convert_color_space
    ybr = convert_color_space(COLOUR, "RGB", "YBR_FULL")
    if native == "422":
        ybr[:, 1::2, 1:] = ybr[:, ::2, 1:]                                                # a pair of pixels shares its colour
        pairs = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], 2)
    data = (pairs if native == "422" else ybr).tobytes()
    path = saved(tmp_path/"eye.dcm", dataset(COLOUR, PhotometricInterpretation=photometric, PixelData=data))
    assert abs(open_image(path) - convert_color_space(ybr, "YBR_FULL", "RGB")/255).max() < 1e-6
    assert abs(open_image(path) - COLOUR/255).max() < (2 if native == "full" else 16)/255


def test_palette(tmp_path):
    tables = [np.arange(256)*255, np.arange(256)[::-1]*200, np.arange(256)**2]
    tags = {f"{c}PaletteColorLookupTable{part}": v for c, t in zip(("Red", "Green", "Blue"), tables) for part, v in (("Descriptor", [256, 0, 16]), ("Data", t.astype("<u2").tobytes()))}
    path = saved(tmp_path/"eye.dcm", dataset(BYTES, PhotometricInterpretation="PALETTE COLOR", **tags))
    np.testing.assert_allclose(open_image(path), np.stack([t[BYTES] for t in tables], 2)/65535, atol=1e-6)


def test_one_pixel_and_one_value(tmp_path):
    for stored in (np.array([[2345]], np.uint16), np.full((5, 3), 2345, np.uint16)):
        for how in ("native", "rle"):
            ds = dataset(stored, 12)
            path = saved(tmp_path/"film.dcm", ds) if how == "native" else EXACT[how](tmp_path/"film.dcm", ds)
            np.testing.assert_allclose(open_image(path), stored/4095, atol=1e-7)


def test_grey_stored_in_three_channels(tmp_path):
    assert open_image(saved(tmp_path/"film.dcm", dataset(np.stack([BYTES]*3, 2)))).shape == BYTES.shape
    with pytest.raises(AdamError, match="eye.dcm is coloured"): open_grey(saved(tmp_path/"eye.dcm", dataset(COLOUR)))


# what is refused --------------------------------------------------------------------------------------------------

def refused(path, *words):
    with pytest.raises(AdamError) as e: open_image(path)
    assert path.name in str(e.value) and "\n" not in str(e.value), e.value
    for w in words: assert w in str(e.value), e.value
    return str(e.value)


def shortened(sequence):
    sequence[0].LUTData = sequence[0].LUTData[:-2]
    return sequence


@pytest.mark.parametrize("tags, words", [
    (dict(NumberOfFrames=3), "several frames"),
    (dict(Rows=30_000, Columns=30_000), "claims 30000 × 30000"),
    (dict(Rows=49), "cut short"),
    (dict(BitsAllocated=32), "32 bits"),
    (dict(HighBit=15), "shifted"),
    (dict(WindowCenter=3, WindowWidth=0), "WindowWidth"),
    (dict(RescaleSlope=0), "RescaleSlope"),
    (dict(PixelData=b""), "without pixels"),
    (dict(VOILUTSequence=lut([], 8)), "look-up table"),
    (dict(VOILUTSequence=lut([1, 2], 17)), "look-up table"),
    (dict(VOILUTSequence=shortened(lut(range(4096), 12))), "fewer entries than it states"),
    (dict(ModalityLUTSequence=shortened(lut(range(4096), 12))), "fewer entries than it states"),
    (dict(WindowCenter=0, WindowWidth="1e-300", VOILUTFunction="LINEAR_EXACT"), "too far apart"),
    (dict(WindowCenter=0, WindowWidth="1e300"), "too far apart"),
    (dict(WindowCenter=0, WindowWidth=10, RescaleSlope="1e300"), "too far apart"),
    (dict(WindowCenter=0, WindowWidth=10, RescaleSlope="1e-300"), "too far apart"),
    (dict(RescaleSlope="1e308", RescaleIntercept="1e308"), "too far apart"),
])
def test_bad_headers(tmp_path, tags, words): refused(saved(tmp_path/"bad.dcm", dataset(FILM, 12, **tags)), words)


def test_no_pixel_data(tmp_path):
    ds = dataset(FILM, 12)
    del ds.PixelData
    refused(saved(tmp_path/"report.dcm", ds), "without pixels")
    for k in ("Rows", "Columns"): delattr(ds, k)
    refused(saved(tmp_path/"report.dcm", ds), "without an image")


@pytest.mark.parametrize("syntax, words", [(uid.HTJ2K, "High-Throughput JPEG 2000"), (uid.UID("1.2.3.4.5"), "an unknown transfer syntax")])
def test_transfer_syntaxes_that_are_not_read(tmp_path, syntax, words):
    path = EXACT["rle"](tmp_path/"film.dcm", dataset(FILM, 12))
    whole = path.read_bytes()
    old, new = (b"UI" + len(u).to_bytes(2, "little") + u for u in (b"1.2.840.10008.1.2.5\0", (str(syntax).encode() + b"\0")[:len(syntax) + len(syntax) % 2]))
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    said = refused(path, words, "convert it")
    assert "1.2.3.4.5" not in said


@pytest.mark.parametrize("how", [*EXACT, "native", "deflated"])
def test_truncated_anywhere(tmp_path, how):
    "Cut in the header, in the pixels, or by a few bytes: refused, or (where only padding is missing) right."
    path = tmp_path/"film.dcm"
    if how == "native": saved(path, dataset(FILM, 12))
    elif how == "deflated": saved(path, dataset(FILM, 12, uid.DeflatedExplicitVRLittleEndian))
    else: EXACT[how](path, dataset(FILM, 12))
    whole = path.read_bytes()
    for keep in (140, 300, len(whole)//2, len(whole) - 60, len(whole) - 11, len(whole) - 3):
        path.write_bytes(whole[:keep])
        try: seen = open_image(path)
        except AdamError as e: assert "film.dcm" in str(e)
        else:
            assert keep > len(whole) - 12                                                # nothing but the end of a sequence is missing
            np.testing.assert_allclose(seen, FILM/4095, atol=1e-7)


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("keep", [.5, .9])
def test_stream_cut_within_a_whole_file(tmp_path, how, keep):
    noisy = ((FILM + np.random.default_rng(0).integers(0, 200, FILM.shape)) % 4096).astype(np.uint16)
    path = EXACT[how](tmp_path/"film.dcm", dataset(noisy, 12))
    ds = pydicom.dcmread(path)
    frame = get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = encapsulate([frame[:int(len(frame)*keep)]])
    ds.save_as(path)
    refused(path, "cut short")


def test_other_size_in_the_stream(tmp_path):
    for how in EXACT:
        if how == "rle": continue
        path = EXACT[how](tmp_path/"film.dcm", dataset(FILM, 12))
        ds = pydicom.dcmread(path); ds.Rows, ds.Columns = 80, 48; ds.save_as(path)
        refused(path, "claims 80 × 48 pixels", "has 48 × 80")


def test_decoder_that_is_not_installed(tmp_path, monkeypatch):
    path = EXACT["jpeg lossless"](tmp_path/"film.dcm", dataset(FILM, 12))
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    refused(path, "pip install python-gdcm")


def test_bombs(tmp_path, monkeypatch):
    "Small files that claim much: refused without the memory."
    monkeypatch.setattr(room, "_INFLATED", 8*2**20)
    ds = dataset(FILM, 12, uid.DeflatedExplicitVRLittleEndian)
    path = saved(tmp_path/"deflate.dcm", ds)
    start = path.read_bytes()[:-len(path.read_bytes()) + 144 + int.from_bytes(path.read_bytes()[140:144], "little")]
    packer = zlib.compressobj(9, wbits=-15)
    path.write_bytes(start + b"".join(packer.compress(bytes(2**20)) for _ in range(9)) + packer.flush())
    refused(path, "inflates to more than 8 MB")
    rle = encapsulate([np.array([2, 64, 66, *[0]*13], "<u4").tobytes() + b"\x81\x00"*40_000])          # 5 MB for a plane of 3,840 bytes
    refused(saved(tmp_path/"rle.dcm", dataset(FILM, 12, uid.RLELossless, PixelData=rle)), "RLE pixels")


# secrets ----------------------------------------------------------------------------------------------------------

SECRET = "Planted^Name"
TEXT = {"PN": SECRET, "LO": SECRET, "SH": SECRET, "LT": SECRET, "ST": SECRET, "UT": SECRET, "UC": SECRET, "CS": "PLANTED", "DA": "PLANTED", "TM": "PLANTED", "DT": "PLANTED", "AS": "PLANTED", "IS": "PLANTED", "DS": "PLANTED", "UI": "PLANTED", "AE": "PLANTED", "UR": "PLANTED"}


def planted(ds, keyword):
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag
    value = TEXT[dictionary_VR(keyword)].encode()
    ds[keyword] = RawDataElement(Tag(tag_for_keyword(keyword)), dictionary_VR(keyword), len(value) + len(value) % 2, value + b" "*(len(value) % 2), 0, False, True)


@pytest.mark.parametrize("keyword", ["PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "LossyImageCompression", "SpecificCharacterSet",
                                     "PatientName", "PatientBirthDate", "PatientAge", "StudyDate", "InstitutionName", "AccessionNumber", "SOPInstanceUID", "ImageComments", "SeriesNumber"])
def test_no_value_of_an_element_leaves(tmp_path, keyword, caplog, capfd):
    "A text where a number or a code should be, in a good and in a broken file: neither error, warning, log nor output quotes it."
    caplog.set_level(logging.DEBUG)
    ds = dataset(FILM, 12, WindowCenter=2000, WindowWidth=3000, PatientName=SECRET, PatientID="PLANTED", InstitutionName=SECRET)
    planted(ds, keyword)
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); path = saved(tmp_path/"film.dcm", ds)
    whole = path.read_bytes()
    caplog.clear(); capfd.readouterr()
    said = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for keep in (len(whole), len(whole) - 9, len(whole) - 2500, 350):
            path.write_bytes(whole[:keep])
            for work in (open_dicom, dicom_facts, dicom_size, open_image, image_size):
                try: said.append(str(work(path)) if work is not open_image else str(work(path).shape))
                except AdamError as e: said += [str(e), repr(e.__cause__), repr(e.__context__)]
    out = "\n".join([*said, *(str(w.message) for w in warned), caplog.text, *capfd.readouterr()])
    assert "planted" not in out.lower(), out
    assert len(said) >= 20


def test_threads_keep_quiet_too(tmp_path, monkeypatch, caplog):
    "One thread has read its film and leaves while another still reads: what the other's decoder says stays unheard, and later warnings are heard."
    path, within, done, real = saved(tmp_path/"film.dcm", dataset(FILM, 12)), threading.Event(), threading.Event(), room._see
    def see(*args):
        if threading.current_thread() is not threading.main_thread(): within.set(); done.wait(9)
        else: done.set(); early.result(9)
        warnings.warn(SECRET); logging.getLogger("pydicom.pixels").error(SECRET)
        return real(*args)
    monkeypatch.setattr(room, "_see", see)
    with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor(1) as pool:
        warnings.simplefilter("always")
        early = pool.submit(open_image, path)
        assert within.wait(9)
        open_image(path)
        assert said == [] and not caplog.text
        warnings.warn("heard again"); logging.getLogger("pydicom").error("logged again")
        assert [str(w.message) for w in said] == ["heard again"] and "logged again" in caplog.text


# properties -------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None, database=None)
@given(st.data())
def test_any_array_in_any_lossless_syntax(tmp_path_factory, data):
    bits = data.draw(st.sampled_from([8, 10, 12, 16]))
    shape = data.draw(st.tuples(st.integers(1, 33), st.integers(1, 33)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    how = data.draw(st.sampled_from(["jpeg lossless sv1", "jpeg-ls by gdcm", "jpeg 2000 lossless", "rle", "native"]))
    least = {"rle": 1, "native": 1, "jpeg 2000 lossless": 32}.get(how, 8)                 # smaller ones the encoders do not take
    shape = tuple(max(n, least) for n in shape)
    if how == "jpeg lossless sv1" and bits == 8: shape = shape[0], shape[1] + shape[1] % 2     # GDCM's encoder refuses an odd number of bytes
    array = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8 if bits == 8 else np.uint16)
    path = tmp_path_factory.mktemp("any")/"film.dcm"
    ds = dataset(array, bits)
    if how == "native": saved(path, ds)
    elif how == "jpeg-ls by gdcm": by_gdcm(path, ds, "JPEGLSLossless")                    # the other encoder wants larger films
    else: EXACT[how](path, ds)
    np.testing.assert_allclose(open_image(path), array/(2**bits - 1), atol=1e-7)
