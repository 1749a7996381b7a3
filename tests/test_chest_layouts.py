"""The chest data sets in their published layouts and true encodings: what is parsed is compared with what was put in, on images without any symmetry."""
import io
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from adam_nb.annotations import decode_rle, encode_rle, fill_polygon, read_annotations, read_box, read_polygon, read_rle
from adam_nb.config import AdamError
from adam_nb.data import check, dataset
from adam_nb.more_chest import CHESTX_DET, SHENZHEN_LISTS, chestx_det, shenzhen, siim_acr
from adam_nb.records import leak_check
from adam_nb.vindr import RIBS, VINDR_GLOBAL, VINDR_KAGGLE, VINDR_LOCAL, VINDR_SIX, vindr_cxr, vindr_ribcxr

quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


# what the fixtures are made of -------------------------------------------------------------------------------------

def hook(height, width, rows, columns):
    "A mask like the letter L: equal to none of its mirror images or its transpose."
    mask = np.zeros((height, width), bool)
    (top, bottom), (left, right) = rows, columns
    mask[top:bottom, left:left + (right - left)//3] = True
    mask[bottom - (bottom - top)//4:bottom, left:right] = True
    return mask


def hook_outline(rows, columns):
    "The outline of the same, as corners between pixels."
    (top, bottom), (left, right) = rows, columns
    inner, foot = left + (right - left)//3, bottom - (bottom - top)//4
    return [[left, top], [inner, top], [inner, foot], [right, foot], [right, bottom], [left, bottom]]


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def png(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)


def dicom(path, stored, bits, syntax=ExplicitVRLittleEndian, photometric="MONOCHROME2", **tags):
    "A DICOM file of `stored` numbers with `bits`, compressed as `syntax` says."
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    uncompressed = syntax if syntax in (ExplicitVRBigEndian, ImplicitVRLittleEndian) else ExplicitVRLittleEndian
    ds.file_meta.TransferSyntaxUID = uncompressed
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape, 1, photometric
    wide = 16 if bits > 8 else 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = wide, bits, bits - 1, 0
    for k, v in tags.items(): setattr(ds, k, v)
    ds.PixelData = stored.astype((">" if syntax == ExplicitVRBigEndian else "<") + f"u{wide//8}").tobytes()
    ds["PixelData"].VR = "OW" if wide == 16 else "OB"
    if syntax == JPEGBaseline8Bit:
        jpeg = io.BytesIO()
        Image.fromarray(stored.astype(np.uint8)).save(jpeg, "JPEG", quality=95)
        ds.PixelData = encapsulate([jpeg.getvalue()])
        ds["PixelData"].VR, ds.LossyImageCompression, ds.file_meta.TransferSyntaxUID = "OB", "01", syntax
    elif syntax != uncompressed: ds.compress(syntax, generate_instance_uid=False, encoding_plugin="pydicom" if syntax == RLELossless else "")      # GDCM's RLE encoder aborts on some small films
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax == ExplicitVRBigEndian: ds.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    else: ds.save_as(path, enforce_file_format=True)


def marked(film, i, lowest=1):
    "The film with a dark corner of its own: equal pictures in two splits are a leak, and `check` finds them."
    film = film.copy()
    film[-8:, -8:] = lowest + 4*i
    return film


def same_place(record, name, threshold=.5):
    "The bright pixels of a film are exactly its mask: image and annotation have one orientation."
    image, mask = record.image(), record.masks([name])[name]
    assert (mask == (image > threshold)).all() and mask.any()
    for turned in (mask[::-1], mask[:, ::-1], mask[::-1, ::-1]): assert (turned != mask).any()


def usable(name, root, **options):
    "The set passes a full check, has no leak, survives pickling, and can be shown."
    report = check(name, root, full=True, workers=0, **options)
    assert report["usable"], report["problems"]
    records = dataset(name, root, **options)
    assert leak_check(records) == [] and len(records) == report["images"]
    again = pickle.loads(pickle.dumps(records))
    assert again.fingerprint() == records.fingerprint() == dataset(name, root, **options).fingerprint()
    assert all((a.image() == b.image()).all() for a, b in zip(again, records))
    assert sum(bool(ax.images) for ax in records.show(2).axes) == min(2, len(records))
    return records


# VinDr-CXR ---------------------------------------------------------------------------------------------------------

NAMES = [*VINDR_LOCAL, *VINDR_GLOBAL]
IDS = [f"{7919*i:032x}" for i in range(1, 13)]
WINDOW = np.arange(90*70).reshape(90, 70).astype(np.uint16)          # 0 … 6299: every pixel has a number of its own


def flags(*positive): return ",".join(str(int(n in positive)) for n in NAMES)


def vindr(root, syntax=ExplicitVRLittleEndian, newline="\n", encoding="utf-8"):
    "Eight train films of three readers, four test films; film k has a Nodule/Mass by k % 4 readers."
    for i, name in enumerate(IDS):
        film, inverted = marked(WINDOW, i), i % 2 == 1
        dicom(root/("train" if i < 8 else "test")/f"{name}.dicom", 16383 - film if inverted else film, 14, syntax, "MONOCHROME1" if inverted else "MONOCHROME2")
    train = [f"image_id,rad_id,{','.join(NAMES)}"] + [f"{name},R{r},{flags('Nodule/Mass', 'Lung tumor') if r <= i % 4 else flags('No finding')}" for i, name in enumerate(IDS[:8]) for r in (1, 2, 3)]
    test = [f"image_id,{','.join(NAMES)}".replace("Other diseases", "Other disease")] + [f"{name},{flags('Pleural effusion', 'Other diseases')}" for name in IDS[8:]]
    head = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
    boxes = [head] + [f"{name},R{r},Nodule/Mass,{10 + r}.4,20.5,{30 + r}.6,60" if r <= i % 4 else f"{name},R{r},No finding,,,," for i, name in enumerate(IDS[:8]) for r in (1, 2, 3)]
    for table, lines in (("image_labels_train", train), ("image_labels_test", test), ("annotations_train", boxes), ("annotations_test", [head.replace("rad_id,", ""), f"{IDS[8]},Pleural effusion,1,2,3,4", f"{IDS[9]},No finding,,,,"])):
        write(root/f"annotations/{table}.csv", newline.join(lines) + newline, encoding)
    return root


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda s: s.name.replace(" ", "_"))
def test_vindr_films(tmp_path, syntax):
    records = vindr_cxr(vindr(tmp_path, syntax))
    for i, r in enumerate(records[:3]):
        np.testing.assert_allclose(r.image(), marked(WINDOW, i)/16383, atol=1e-6)
        assert r.size == (90, 70)


def test_vindr_window(tmp_path):
    dicom(vindr(tmp_path)/"train"/f"{IDS[0]}.dicom", WINDOW, 14, WindowCenter=3000, WindowWidth=2001)
    image = next(r for r in vindr_cxr(tmp_path) if r.patient == IDS[0]).image()
    np.testing.assert_allclose(image, np.clip((WINDOW - 2999.5)/2000 + .5, 0, 1), atol=1e-6)


@pytest.mark.parametrize("rule, expected", [("any", [0, 1, 1, 1]), ("majority", [0, 0, 1, 1]), ("consensus", [0, np.nan, np.nan, 1])])
def test_vindr_readers(tmp_path, rule, expected):
    records = {r.patient: r for r in vindr_cxr(vindr(tmp_path), readers=rule)}
    for i, name in enumerate(IDS[:8]):
        np.testing.assert_equal(records[name].labels["Lung tumor"], expected[i % 4])
        np.testing.assert_equal(records[name].labels["Pneumonia"], 0.)
        assert len(records[name].boxes.get("Nodule/Mass", [])) == (i % 4 if expected[i % 4] == 1 else 0)
    assert records[IDS[1]].boxes == ({"Nodule/Mass": [(20, 11, 60, 32)]} if rule == "any" else {})
    for name in IDS[8:]: assert records[name].labels["Other diseases"] == 1 and records[name].labels["Pleural effusion"] == 1 and records[name].split == "test"
    assert records[IDS[8]].boxes == {"Pleural effusion": [(2, 1, 4, 3)]}


def test_vindr_parts_of_the_labels(tmp_path):
    vindr(tmp_path)
    six, local = vindr_cxr(tmp_path, labels="six"), vindr_cxr(tmp_path, labels="local")
    assert tuple(six.label_names) == VINDR_SIX == ("Pleural effusion", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding")
    assert tuple(local.label_names) == VINDR_LOCAL and len(VINDR_LOCAL) == 22 and len(VINDR_GLOBAL) == 6
    assert [list(r.labels.values()) for r in six if r.patient in (IDS[1], IDS[9])] == [[0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0]]


def test_vindr_is_usable(tmp_path):
    records = usable("vindr_cxr", vindr(tmp_path))
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [7, 1, 4]


def test_vindr_tables_as_windows_and_excel_write_them(tmp_path):
    plain, odd = vindr_cxr(vindr(tmp_path/"a")), vindr_cxr(vindr(tmp_path/"b", newline="\r\n", encoding="utf-8-sig"))
    assert [(r.patient, r.split, r.labels, r.boxes) for r in plain] == [(r.patient, r.split, r.labels, r.boxes) for r in odd]


def test_vindr_of_kaggle(tmp_path):
    rows = ["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"]
    for i, name in enumerate(IDS[:4]):
        dicom(tmp_path/"train"/f"{name}.dicom", WINDOW, 14)
        rows += [f"{name},ILD,5,R{r},10.0,20.0,30.0,60.0" if r <= i else f"{name},No finding,14,R{r},,,," for r in (1, 2, 3)]
    write(tmp_path/"train.csv", "\n".join(rows))
    for rule, expected in (("any", [0, 1, 1, 1]), ("majority", [0, 0, 1, 1])):
        records = vindr_cxr(tmp_path, readers=rule)
        assert tuple(records.label_names) == VINDR_KAGGLE and len(VINDR_KAGGLE) == 15
        assert [r.labels["ILD"] for r in records] == expected and [len(r.boxes.get("ILD", [])) for r in records] == [e*i for i, e in enumerate(expected)]
    with pytest.raises(AdamError, match="image_labels_train.csv"): vindr_cxr(tmp_path, labels="six")


def test_vindr_films_saved_anew_get_no_boxes(tmp_path):
    vindr(tmp_path)
    os.remove(tmp_path/"train"/f"{IDS[1]}.dicom")
    png(tmp_path/"jpeg"/f"{IDS[1]}.png", WINDOW.astype(np.uint16))
    records = vindr_cxr(tmp_path)
    assert next(r for r in records if r.patient == IDS[1]).boxes == {} and any("1 films are no DICOM files" in n for n in records.notes)


# VinDr-RibCXR ------------------------------------------------------------------------------------------------------

def rib_corners(rib):
    "rib_r3 → the corners of a slanted bar: right ribs image-left, numbers from the top."
    n, left = int(rib[5:]), rib[4] == "l"
    x, y = (60 if left else 10), 8*n
    return [(x, y + (0 if left else 6)), (x + 40, y + (6 if left else 0)), (x + 40, y + 10 + (6 if left else 0)), (x, y + 10 + (0 if left else 6))]


def ribcxr(root, images="data/{part}/img", tables="data/{part}", prefix="data/", **change):
    for part, n in (("train", 10), ("val", 3)):
        files = [f"VinDr_RibCXR_{part}_{i:03d}.png" for i in range(n)]
        for i, f in enumerate(files):
            film = np.zeros((96, 110), np.uint8)
            film[fill_polygon(np.array(rib_corners("rib_r1"), float), film.shape)] = 200
            png(root/images.format(part=part)/f, marked(film, i + 10*(part == "val")))
        table = {"img": {str(i): f"{prefix}{part}/img/{f}" for i, f in enumerate(files)}}
        for rib in RIBS: table[rib[4:].upper()] = {str(i): [{"x": x, "y": y} for x, y in rib_corners(rib)] for i in range(n)}
        for key, value in change.items(): table[key]["0"] = value
        write(root/tables.format(part=part)/f"Vindr_RibCXR_{part}_mask.json", json.dumps(table))
    return root


@pytest.mark.parametrize("spelling", [{}, {"tables": "Annotations/{part}", "images": "Data/{part}/img", "prefix": "Data/"}, {"images": "films", "tables": ".", "prefix": "./somewhere else/"}], ids=["published", "Annotations", "flat"])
def test_ribs(tmp_path, spelling):
    records = vindr_ribcxr(ribcxr(tmp_path, **spelling))
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [9, 1, 3]
    assert {r.patient for r in records if r.split == "test"} == {f"VinDr_RibCXR_val_{i:03d}" for i in range(3)}
    same_place(records[0], "rib_r1")
    masks = records[0].masks()
    assert tuple(masks) == RIBS
    x, y = ({n: np.nonzero(m)[a].mean() for n, m in masks.items()} for a in (1, 0))
    for n in range(1, 11): assert x[f"rib_r{n}"] < x[f"rib_l{n}"]                     # left is the patient's
    for n in range(1, 10): assert y[f"rib_r{n}"] < y[f"rib_r{n + 1}"]
    assert (masks["rib_r1"] & masks["rib_r2"]).any()                                  # ribs cross


def test_ribs_are_usable(tmp_path): assert len(usable("vindr_ribcxr", ribcxr(tmp_path))) == 13


def test_rib_that_was_not_drawn(tmp_path):
    records = vindr_ribcxr(ribcxr(tmp_path, L3="None"))
    assert "rib_l3" not in records[0].masks() and "rib_l3" in records[1].masks() and any("2 films lack some of the twenty ribs" in n for n in records.notes)


def test_rib_beyond_the_film(tmp_path):
    records = vindr_ribcxr(ribcxr(tmp_path, L3=[{"x": 100, "y": -20}, {"x": 500, "y": -20}, {"x": 500, "y": 30}, {"x": 100, "y": 30}]))
    mask = records[0].masks(["rib_l3"])["rib_l3"]
    assert mask[:30, 100:].all() and mask.sum() == 30*10


def test_ribs_of_a_smaller_copy_are_refused(tmp_path):
    ribcxr(tmp_path)
    path = tmp_path/"data/train/img/VinDr_RibCXR_train_004.png"
    Image.open(path).resize((40, 35)).save(path)
    with pytest.raises(AdamError, match="train_004.png has 35 x 40 pixels, but most points of its ribs lie outside"): vindr_ribcxr(tmp_path)
    path.write_bytes(b"broken")
    assert len(vindr_ribcxr(tmp_path)) == 13                                          # what cannot be read is named when it is opened


@pytest.mark.parametrize("value, why", [([{"x": 1, "y": 2}, {"x": 3, "y": 4}], "L3 of VinDr_RibCXR_train_000.png has 2 points"), ("none", "is 'none'"), ([{"x": 1}]*3, "not x and y"), ([{"x": float("nan"), "y": 1}]*3, "NaN")])
def test_broken_rib_is_named(tmp_path, value, why):
    with pytest.raises(AdamError, match=why): vindr_ribcxr(ribcxr(tmp_path, L3=value))


# Shenzhen ----------------------------------------------------------------------------------------------------------

def china(root, n=20):
    "Inverted palettes, as some of the real files have; readings in the several hands of the real ones."
    lungs = hook(80, 64, (10, 70), (8, 50))
    for i in range(n):
        name = f"CHNCXR_{i + 1:04d}_{int(i >= n//2)}"
        film = Image.fromarray(marked(np.where(lungs, 20, 230).astype(np.uint8), i, 150))
        film.putpalette([v for k in range(256) for v in (255 - k,)*3])
        (root/"ChinaSet_AllFiles/CXR_png").mkdir(parents=True, exist_ok=True)
        film.save(root/f"ChinaSet_AllFiles/CXR_png/{name}.png")
        write(root/f"ChinaSet_AllFiles/ClinicalReadings/{name}.txt", f"{('male', 'Female')[i % 2]}{(' ', ' , ')[i % 2]}{20 + i}yrs{('', ' ')[i % 2]}\r\n{'PTB in the left upper field' if i >= n//2 else 'normal'}")
        if i % 4: png(root/f"mask/{name}_mask.png", (lungs*255).astype(np.uint8))
    return root


def test_shenzhen(tmp_path):
    records = usable("shenzhen", china(tmp_path))
    assert [r.labels["Tuberculosis"] for r in records] == [0]*10 + [1]*10
    assert (records[0].extra, records[11].extra) == ({"sex": "M", "age": 20., "finding": "normal"}, {"sex": "F", "age": 31., "finding": "PTB in the left upper field"})
    same_place(records[1], "lungs")
    assert records[0].masks() == {} and {r.split for r in records} == {"train", "val", "test"}
    for s in ("train", "test"): assert {r.labels["Tuberculosis"] for r in records.only(s)} == {0, 1}          # spread evenly


def test_shenzhen_lists(tmp_path):
    china(tmp_path)
    names = [r.patient + f"_{int(r.labels['Tuberculosis'])}.png,{int(r.labels['Tuberculosis'])}" for r in shenzhen(tmp_path)]
    for s, part in (("train", names[::2]), ("val", names[1::4]), ("test", names[3::4])): write(tmp_path/SHENZHEN_LISTS[s], "\r\n".join(part), "utf-8-sig")
    records = shenzhen(tmp_path)
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [10, 5, 5] and "three lists" in records.notes[0]
    assert [r.split for r in records] == [("train", "val", "train", "test")[i % 4] for i in range(20)]
    os.remove(tmp_path/SHENZHEN_LISTS["test"])
    with pytest.raises(AdamError, match="There is no ShenzenCXR_test_data.txt below"): shenzhen(tmp_path)
    for s in ("train", "val"): os.remove(tmp_path/SHENZHEN_LISTS[s])
    assert "There is no published split." in shenzhen(tmp_path).notes


def test_shenzhen_mask_of_another_shape_is_refused(tmp_path):
    png(china(tmp_path)/"mask/CHNCXR_0002_0_mask.png", np.full((64, 80), 255, np.uint8))
    with pytest.raises(AdamError, match="CHNCXR_0002_0_mask.png has 64 x 80 pixels"): shenzhen(tmp_path)[1].masks()


def test_shenzhen_reading_of_any_bytes(tmp_path):
    china(tmp_path)
    path = tmp_path/"ChinaSet_AllFiles/ClinicalReadings/CHNCXR_0001_0.txt"
    for content in (b"", b"\0\xff\xfe", "男 45岁".encode(), b"male\n", b"female 99999999999999999999999999yrs"):
        path.write_bytes(content)
        extra = shenzhen(tmp_path)[0].extra
        assert np.isnan(extra["age"]) and extra["sex"] in (None, "M", "F")


# SIIM-ACR ----------------------------------------------------------------------------------------------------------

UIDS = [f"1.2.276.0.7230010.3.1.4.8323329.{1000 + i}.1517875201.{850000 + i}" for i in range(10)]
REGION, SECOND = hook(1024, 1024, (200, 600), (100, 400)), hook(1024, 1024, (700, 800), (600, 900))


def siim(root, stage=1, header="ImageId, EncodedPixels"):
    "Six train films, three test films, one whose labels nobody knows. Even films have two regions in two rows."
    film = np.where(REGION | SECOND, 220, 30).astype(np.uint8)
    for i, uid in enumerate(UIDS):
        inner = f"{uid.replace('.1.4.', '.1.2.')}/{uid.replace('.1.4.', '.1.3.')}"
        dicom(root/(f"dicom-images-{'train' if i < 6 else 'test'}/{inner}" if i < 9 else "stage_2_images")/f"{uid}.dcm", marked(film, i), 8, JPEGBaseline8Bit, PatientName="Planted^Name", PatientID="planted-id")
    rows = [header] + [line for i, uid in enumerate(UIDS[:6 if stage == 1 else 9]) for line in ([f"{uid}, -1"] if i % 2 else [f"{uid},{encode_rle(REGION)}", f"{uid},{encode_rle(SECOND)}"])]
    write(root/("train-rle.csv" if stage == 1 else "stage_2_train.csv"), "\n".join(rows))
    return root


def test_siim(tmp_path):
    records = siim_acr(siim(tmp_path))
    assert [r.labels["Pneumothorax"] for r in records] == [1, 0]*3 and len(records.unused) == 4
    same_place(records[0], "pneumothorax")                                            # lossy, but the edge is sharp
    assert (records[0].masks()["pneumothorax"] == (REGION | SECOND)).all() and not records[1].masks()["pneumothorax"].any()
    assert not (records[0].masks()["pneumothorax"] == (REGION | SECOND).T).all()


def test_siim_of_stage_2(tmp_path):
    records = siim_acr(siim(siim(tmp_path, 1), 2))
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [5, 1, 3]
    assert all(("dicom-images-test" in r.path) == (r.split == "test") for r in records) and [os.path.basename(p) for p in records.unused] == [f"{UIDS[9]}.dcm"]
    dealt = siim_acr(tmp_path, split_by="stratified", seed=1)
    assert [r.split for r in dealt] != [r.split for r in records] and [r.split for r in dealt] == [r.split for r in siim_acr(tmp_path, split_by="stratified", seed=1)]


@pytest.mark.parametrize("header, encoding", [("ImageId,EncodedPixels", "utf-8"), (" ImageId ,  EncodedPixels ", "utf-8"), ("ImageId, EncodedPixels", "utf-8-sig")])
def test_siim_headers(tmp_path, header, encoding):
    siim(tmp_path)
    text = (tmp_path/"train-rle.csv").read_text().replace("ImageId, EncodedPixels", header).replace("\n", "\r\n")
    write(tmp_path/"train-rle.csv", text, encoding)
    assert sum(r.labels["Pneumothorax"] for r in siim_acr(tmp_path)) == 3


def test_siim_is_usable_and_tells_nothing_of_its_headers(tmp_path):
    records = usable("siim_acr", siim(tmp_path))
    said = " ".join([repr(list(records)), records.to_frame().to_csv(), json.dumps(records.summary()), *records.notes])
    assert "lanted" not in said


@pytest.mark.parametrize("row, why", [("x,1 2 3", "row 11 .x. has 3 numbers"), ("x,1048570 7", "row 11 .x. ends at pixel 1048577, but the image has 1048576"), ("x,5 -3", "row 11 .x. holds the negative number -3"), ("x,5 0", "run of no pixel"),
                                      ("x,", "row 11 .x. has 0 numbers"), ("x,5 a", "row 11 .x. is '5 a'"), (f"{UIDS[1]},5 5", "row 11 contradicts an earlier row of 1.2.276"), (f"{UIDS[0]},-1", "row 11 contradicts"), ("x", "row 11 ends before the column 'EncodedPixels'")])
def test_siim_row_that_is_wrong_is_named(tmp_path, row, why):
    with open(siim(tmp_path)/"train-rle.csv", "a") as f: f.write("\n" + row)
    with pytest.raises(AdamError, match="train-rle.csv.*" + why): siim_acr(tmp_path)


def test_siim_file_without_pixels_is_named_when_it_is_opened(tmp_path):
    path = next(siim(tmp_path).rglob(f"{UIDS[0]}.dcm"))
    path.write_bytes(path.read_bytes()[:400])
    records = siim_acr(tmp_path)                                                      # the list stands
    with pytest.raises(AdamError, match=UIDS[0]): records[0].image()
    report = check("siim_acr", tmp_path, full=True, workers=0)
    assert not report["usable"] and UIDS[0] in report["unreadable"][0]["path"]


# ChestX-Det --------------------------------------------------------------------------------------------------------

MASS = (304, 688), (200, 488)                                                         # rows, columns in the 1024² film; whole pixels at 128², too


def det(root, size=1024, folders=("train_data", "test_data"), syms=("Mass", "Pleural Thickening"), newline=None):
    (top, bottom), (left, right) = MASS
    film = hook(1024, 1024, *MASS)[::1024//size, ::1024//size].astype(np.uint8)*255
    found = {"syms": list(syms), "boxes": [[left, top, right, bottom], [0, 0, 64, 32]], "polygons": [hook_outline(*MASS), [[0, 0], [64, 0], [64, 32], [0, 32]]]}
    entries = [{"file_name": f"{36200 + i}.png", **(found if i % 2 == 0 else {"syms": [], "boxes": [], "polygons": []})} for i in range(12)]
    for i in range(12): png(root/folders[i >= 9]/f"{36200 + i}.png", marked(film, i))
    for s, part in (("train", entries[:9]), ("test", entries[9:])): write(root/f"ChestX_Det_{s}.json", json.dumps(part, indent=1))
    return root


@pytest.mark.parametrize("size", [1024, 512, 128])
def test_chestx_det(tmp_path, size):
    records = chestx_det(det(tmp_path, size))
    same_place(records[0], "mass")
    scale, masks = size/1024, records[0].masks()
    assert list(masks) == [c.lower().replace(" ", "_") for c in CHESTX_DET] == records.mask_names and len(CHESTX_DET) == 13
    assert {n for n, m in masks.items() if m.any()} == {"mass", "pleural_thickening"} and masks["pleural_thickening"].sum() == 64*32*scale**2
    assert records[0].boxes == {"Mass": [tuple(round(v*scale) for v in (304, 200, 688, 488))], "Pleural Thickening": [(0, 0, round(32*scale), round(64*scale))]}
    assert (sum(records[0].labels.values()), sum(records[1].labels.values()), records[1].boxes) == (2, 0, {}) and not records[1].masks()["mass"].any()
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [8, 1, 3]


def test_chestx_det_is_usable(tmp_path):
    assert len(usable("chestx_det", det(tmp_path, 128, folders=("data sét/train films", "data sét/test films")))) == 12


def test_chestx_det_test_films_in_both_files(tmp_path):
    det(tmp_path, 128)
    (tmp_path/"ChestX_Det_test.json").write_bytes((tmp_path/"ChestX_Det_train.json").read_bytes())
    with pytest.raises(AdamError, match="ChestX_Det_test.json names 36200.png, which"): chestx_det(tmp_path)


# what they share ---------------------------------------------------------------------------------------------------

SETS = {"vindr_cxr": vindr, "vindr_ribcxr": ribcxr, "shenzhen": china, "siim_acr": siim, "chestx_det": lambda root: det(root, 128)}


@pytest.mark.parametrize("name", SETS)
def test_absent_empty_and_packed(tmp_path, name):
    for root, why in ((tmp_path/"none", "There is no folder"), (tmp_path/"set.zip", "set.zip is an archive"), (tmp_path/"empty", "There is no"), (tmp_path/"packed", "lie there: all.zip; unpack")):
        (tmp_path/"empty").mkdir(exist_ok=True)
        for z in ("set.zip", "packed/all.zip"): write(tmp_path/z, "PK")
        with pytest.raises(AdamError, match=why): dataset(name, root)
    report = check(name, tmp_path/"none")
    assert not report["usable"] and report["problems"]


@pytest.mark.parametrize("name", SETS)
def test_tables_without_images(tmp_path, name):
    SETS[name](tmp_path)
    for p in [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".dcm", ".dicom") and "mask" not in p.parts]: p.unlink()
    with pytest.raises(AdamError, match="None of the|There is no film"): dataset(name, tmp_path)


@pytest.mark.parametrize("name", SETS)
def test_part_of_a_set(tmp_path, name):
    "Most people hold a part: what is named and absent is listed, the rest is as before."
    SETS[name](tmp_path)
    whole = {r.patient: (r.labels, r.boxes) for r in dataset(name, tmp_path)}
    gone = os.path.join(tmp_path, dataset(name, tmp_path)[0].path)
    os.remove(gone)
    part = dataset(name, tmp_path)
    assert len(part) == len(whole) - 1 and all(whole[r.patient] == (r.labels, r.boxes) for r in part)
    if name != "shenzhen": assert len(part.missing) == 1


@pytest.mark.parametrize("name", SETS)
def test_masks_under_the_names_of_the_films(tmp_path, name):
    "Which of two different pictures of one name is the film? No rule can tell; only DICOM goes first."
    SETS[name](tmp_path)
    film = dataset(name, tmp_path)[0]
    before, stem = film.image(), os.path.splitext(os.path.basename(film.path))[0]
    png(tmp_path/"a"/f"{stem}.png", np.zeros(film.size, np.uint8))                    # nearer to the root, and first by its name
    if name in ("vindr_cxr", "siim_acr"):
        records = dataset(name, tmp_path)
        assert (records[0].image() == before).all() and any(n.startswith("1 copies of films lie below") for n in records.notes)
    else:
        with pytest.raises(AdamError, match=f"{stem}.png have one name, but are different files"): dataset(name, tmp_path)
        os.remove(tmp_path/"a"/f"{stem}.png")
        with open(film.path, "rb") as f: (tmp_path/"a"/f"{stem}.png").write_bytes(f.read())
        assert any(n.startswith("1 copies of films lie below") for n in dataset(name, tmp_path).notes)


@pytest.mark.parametrize("name", SETS)
def test_loops_of_links_and_odd_names(tmp_path, name):
    root = tmp_path/"mes données"
    SETS[name](root)
    os.symlink(root, root/"again")
    assert len(dataset(name, root)) == len(dataset(name, SETS[name](tmp_path/"plain")))


@pytest.mark.parametrize("name, option", [("vindr_cxr", {"val_fraction": 1}), ("vindr_cxr", {"labels": "seven"}), ("vindr_ribcxr", {"val_fraction": "a"}), ("shenzhen", {"fractions": {"train": 2}}), ("shenzhen", {"seed": -1}), ("siim_acr", {"split_by": "stage"}), ("chestx_det", {"val_fraction": -.1}), ("chestx_det", {"seeds": 1})])
def test_wrong_options(tmp_path, name, option):
    with pytest.raises(AdamError): dataset(name, SETS[name](tmp_path), **option)


@pytest.mark.parametrize("name, table, old, new, why", [
    ("vindr_cxr", "annotations/image_labels_train.csv", "Lung cyst", "Lung cysts", "has no column 'Lung cyst'. Did you mean 'Lung cysts'"),
    ("vindr_cxr", "annotations/image_labels_train.csv", f"{flags('No finding')}\n", f"{flags('No finding')[:-2]}\n", "row 2 ends before the column 'No finding'"),
    ("vindr_cxr", "annotations/image_labels_train.csv", "Other diseases", "Others", "has no column 'Other disease'"),
    ("vindr_cxr", "annotations/image_labels_train.csv", ",R1,", ",,", "row 2 has no rad_id"),
    ("vindr_cxr", "annotations/image_labels_test.csv", f"{IDS[8]},0", f"{IDS[8]},2", "row 2 .* has the value '2' for 'Aortic enlargement'"),
    ("vindr_cxr", "annotations/image_labels_test.csv", IDS[8], IDS[0], "names .*, which .* names too"),
    ("vindr_cxr", "annotations/image_labels_test.csv", IDS[9], IDS[8], None),
    ("vindr_cxr", "annotations/annotations_train.csv", "11.4,20.5", "71.4,20.5", "row 5 .* no area"),
    ("vindr_cxr", "annotations/annotations_train.csv", "11.4", "", "row 5 .* a box is x_min"),
    ("vindr_ribcxr", "data/val/Vindr_RibCXR_val_mask.json", '"R7"', '"R17"', "no entry 'R7'"),
    ("vindr_ribcxr", "data/val/Vindr_RibCXR_val_mask.json", '"R7"', '"R8"', "the name 'R8' occurs twice"),
    ("siim_acr", "train-rle.csv", " EncodedPixels", " Pixels", "has no column 'EncodedPixels'"),
    ("chestx_det", "ChestX_Det_train.json", '"Mass"', '"mass"', "unknown finding 'mass'"),
    ("chestx_det", "ChestX_Det_train.json", '"36202.png"', '"36201.png"', "two different entries for 36201.png"),
    ("chestx_det", "ChestX_Det_train.json", '"polygons"', '"polygon"', "must be lists of one length"),
    ("chestx_det", "ChestX_Det_train.json", "]", "", "is not a complete JSON file")])
def test_damaged_tables_are_named(tmp_path, name, table, old, new, why):
    SETS[name](tmp_path)
    path = tmp_path/table
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new, 1) if old != "]" else before.rsplit("]", 1)[0])
    if why is None:                                                                   # two equal rows are one
        assert len(dataset(name, tmp_path)) == len(IDS) - 1
        return
    with pytest.raises(AdamError, match=f"(?s){path.name}.*{why}"): dataset(name, tmp_path)


# properties --------------------------------------------------------------------------------------------------------

@quick
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_run_lengths_return(mask):
    text = encode_rle(mask)
    assert (decode_rle(text, mask.shape) == mask).all()
    assert read_rle(text)[:, 1].sum() == mask.sum()
    assert (decode_rle(text, mask.shape[::-1]).T.ravel() == mask.T.ravel()).all()     # the order of the pixels is all that the text knows


@quick
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=12))
def test_run_lengths_against_a_loop(runs):
    text, size = " ".join(f"{g} {n}" for g, n in runs), (40, 30)
    flat, at = np.zeros(size[0]*size[1], bool), 0
    if sum(g + n for g, n in runs) > flat.size:
        with pytest.raises(AdamError, match="ends at pixel"): decode_rle(text, size)
        return
    for gap, length in runs:
        for i in range(length): flat[at + gap + i] = True
        at += gap + length
    expected = np.zeros(size, bool)
    for i, value in enumerate(flat): expected[i % size[0], i//size[0]] = value
    assert (decode_rle(text, size) == expected).all()


@quick
@given(st.one_of(st.text(max_size=30), st.text("0123456789 -+_.eE٣\t\n", max_size=30)))
def test_any_text_as_run_lengths(text):
    try: mask = decode_rle(text, (8, 6), "table, row 1")
    except AdamError as e: assert str(e).startswith("table, row 1 ")
    else: assert mask.shape == (8, 6) and (text.split() == ["-1"] or mask.any())


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["x", "y", "file_name", "syms", "boxes", "polygons", "img", "R1", "0"]) | st.text(max_size=3), inner, max_size=5), max_leaves=12)


@quick
@given(anything)
def test_anything_as_polygon_or_box(value):
    try: points = read_polygon(value, "here", absent="None")
    except AdamError as e: assert str(e).startswith("here ")
    else: assert points is None and value == "None" or (points.shape[1] == 2 and len(points) >= 3 and np.isfinite(fill_polygon(points, (5, 4))).all())
    try: box = read_box(value, "here", size=(5, 4))
    except AdamError as e: assert str(e).startswith("here ")
    else: assert 0 <= box[0] < box[2] <= 5 and 0 <= box[1] < box[3] <= 4


@quick
@given(st.one_of(st.binary(max_size=60), anything.map(lambda v: json.dumps(v).encode()), st.lists(st.fixed_dictionaries({"file_name": st.just("a.png"), "syms": anything, "boxes": anything, "polygons": anything}), max_size=2).map(lambda v: json.dumps(v).encode())))
def test_any_json_file(tmp_path, content):
    png(tmp_path/"a.png", np.zeros((8, 8), np.uint8))
    for name in ("ChestX_Det_train.json", "Vindr_RibCXR_val_mask.json"): (tmp_path/name).write_bytes(content)
    for adapter in (chestx_det, vindr_ribcxr):
        try: records = adapter(tmp_path)
        except AdamError: continue
        for r in records: r.masks()
    try: read_annotations(tmp_path/"ChestX_Det_train.json")
    except AdamError as e: assert "ChestX_Det_train.json" in str(e)


@quick
@given(st.one_of(st.binary(max_size=80), st.lists(st.lists(st.sampled_from(["a", "-1", "1 2", "R1", "ILD", "No finding", "1", "", '"', " 0"]), max_size=8), max_size=4).map(lambda rows: "\n".join(map(",".join, rows)).encode())), st.booleans())
def test_any_csv_file(tmp_path, content, with_header):
    png(tmp_path/"a.png", np.zeros((8, 8), np.uint8))
    headers = {"train-rle.csv": b"ImageId, EncodedPixels\n", "train.csv": b"image_id,class_name,rad_id,x_min,y_min,x_max,y_max\n", "image_labels_test.csv": f"image_id,{','.join(NAMES)}\n".encode()}
    for name, header in headers.items():
        (tmp_path/name).write_bytes(header*with_header + content)
        try: (siim_acr if name == "train-rle.csv" else vindr_cxr)(tmp_path, fractions={"train": 1})
        except AdamError: pass
        os.remove(tmp_path/name)


@quick
@given(st.lists(st.floats(.3, 3), min_size=3, max_size=12), st.floats(2, 20), st.floats(0, 6), st.integers(-10, 40), st.integers(-10, 40))
def test_area_of_polygons(radii, scale, turn, x, y):
    "Pixels of a star-shaped polygon against Gauss's formula: off by no more than its outline, right and left, inside or half outside the image."
    angles = np.arange(len(radii))*2*np.pi/len(radii) + turn
    points = np.array(radii)[:, None]*scale*np.stack([np.cos(angles), np.sin(angles)], 1) + [100, 100]
    following = np.roll(points, -1, 0)
    area = abs((points[:, 0]*following[:, 1] - points[:, 1]*following[:, 0]).sum())/2
    outline = np.hypot(*(following - points).T).sum()
    mask = fill_polygon(points, (200, 200))
    assert abs(mask.sum() - area) <= outline + 1
    assert (fill_polygon(points[::-1], (200, 200)) == mask).all()                      # the sense of rotation does not matter
    assert (fill_polygon(points - [100 + x, 100 + y], (60, 60)) == np.pad(mask, 100)[200 + y:260 + y, 200 + x:260 + x]).all()      # what lies outside is cut off


@pytest.mark.parametrize("shape", ["hook", "transposed"])
def test_outline_of_a_known_shape(shape):
    truth = hook(60, 50, (10, 50), (6, 40))
    outline = np.array(hook_outline((10, 50), (6, 40)), float)
    if shape == "transposed": truth, outline = truth.T, outline[:, ::-1]
    assert (fill_polygon(outline, truth.shape) == truth).all()
