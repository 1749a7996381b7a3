"""ChestX-ray14, SCR, DRIVE, EyePACS, MedMNIST and CSV tables, written as they are published and compared with what was written; and what a broken copy of them does."""
import os
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from adam_nb import chest_sets, fundus_sets
from adam_nb.chest_sets import FINDINGS14, SCR_MASKS, chestxray14, scr
from adam_nb.config import AdamError
from adam_nb.fundus_sets import drive, eyepacs
from adam_nb.layouts import LAYOUTS
from adam_nb.records import leak_check
from adam_nb.tables import ArrayReader, csv_table, medmnist

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def lopsided(height, width, top=255, channels=1):
    "An image that no flip, turn or swap of bytes leaves as it is: brighter to the right, much brighter downwards, a dark corner above left, unlike channels."
    y, x = np.mgrid[:height, :width]
    image = top*(.2 + .5*y/height + .2*x/width)
    image[:height//4, :width//4] = 0
    return np.stack([image*f for f in (1, .8, .5)], 2) if channels == 3 else image


def put(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def put_text(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


# ChestX-ray14 -----------------------------------------------------------------------------------------------------

NEW = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
FILMS = [(p, i) for p in range(1, 13) for i in range(1 + p % 3)]


def film_name(p, i): return f"{p:08d}_{i:03d}.png"


def film_findings(p, i): return [f for k, f in enumerate(FINDINGS14) if (p*5 + i*3 + k) % 7 == 0]


def write_nih(root, new=True, folders=False, lists=True, line="\n", bom=False):
    rows = [NEW if new else NEW + ","]
    for p, i in FILMS:
        patient, age = (str(p), str(20 + p)) if new else (str(p), f"{20 + p:03d}Y")
        rows.append(f"{film_name(p, i)},{'|'.join(film_findings(p, i)) or 'No Finding'},{i},{patient},{age},{'MF'[p % 2]},{('PA', 'AP')[i % 2]},2682,2749,0.143,0.143" + ("" if new else ","))
    put_text(root/("Data_Entry_2017_v2020.csv" if new else "Data_Entry_2017.csv"), ("\ufeff" if bom else "") + line.join(rows) + line)
    for n, (p, i) in enumerate(FILMS):
        grey = lopsided(64, 64).astype(np.uint8) + np.uint8(n)
        put(root/(f"images_{1 + n % 12:03d}/images" if folders else "images")/film_name(p, i), np.dstack([grey]*3 + [np.full_like(grey, 255)]) if n == 3 else grey)
    put_text(root/"BBox_List_2017.csv", f"Image Index,Finding Label,Bbox [x,y,w,h],,,{line}{film_name(1, 0)},Infiltrate,640.5,128,320,64,,,{line}{film_name(1, 0)},Mass,0,0,1024,1024,,,{line}")
    if lists:
        put_text(root/"train_val_list.txt", line.join(film_name(p, i) for p, i in FILMS if p <= 9))
        put_text(root/"test_list.txt", line.join(film_name(p, i) for p, i in FILMS if p > 9) + line)


@pytest.mark.parametrize("layout", [dict(), dict(new=False), dict(folders=True), dict(new=False, folders=True, line="\r\n", bom=True)], ids=["new", "old", "folders", "old, folders, Windows"])
def test_chestxray14_as_published(tmp_path, layout):
    write_nih(tmp_path, **layout)
    records = chestxray14(tmp_path)
    assert [os.path.basename(r.path) for r in records] == [film_name(p, i) for p, i in FILMS]
    for n, (r, (p, i)) in enumerate(zip(records, FILMS)):
        assert (r.patient, r.extra) == (f"{p:08d}", {"view": ("PA", "AP")[i % 2], "age": 20.0 + p, "sex": "MF"[p % 2], "follow_up": i})
        assert {k for k, v in r.labels.items() if v} == set(film_findings(p, i)) and list(r.labels) == list(FINDINGS14)
        np.testing.assert_allclose(r.image(), (lopsided(64, 64).astype(np.uint8) + np.uint8(n))/255, atol=1e-6)
        assert r.split == "test" if p > 9 else r.split in ("train", "val")
    assert records[0].boxes == {"Infiltration": [(8, 40, 12, 60)], "Mass": [(0, 0, 64, 64)]}          # y, x, y, x; 1024 became 64; 640.5/16 rounds to 40
    assert leak_check(records) == [] and {r.split for r in records} == {"train", "val", "test"}


def test_chestxray14_without_lists_is_dealt(tmp_path):
    write_nih(tmp_path, lists=False)
    for seed in range(4): assert leak_check(chestxray14(tmp_path, seed=seed)) == []
    dealt = [tuple(r.split for r in chestxray14(tmp_path, seed=seed)) for seed in (1, 1, 2, 3)]
    assert dealt[0] == dealt[1] and len(set(dealt)) > 1


@quick
@given(text=st.text(max_size=40), where=st.just("t.csv, a.png,"))
def test_findings_of_any_text(text, where):
    try: labels = chest_sets._findings(text, where)
    except AdamError as e: assert where in str(e)
    else: assert set(labels) == set(FINDINGS14) and set(labels.values()) <= {0.0, 1.0}
    age = chest_sets._age(text)
    assert np.isnan(age) or 0 <= age <= 120


@quick
@given(found=st.sets(st.sampled_from(FINDINGS14)), order=st.randoms())
def test_findings_come_back(found, order):
    names = sorted(found); order.shuffle(names)
    labels = chest_sets._findings("|".join(names) or "No Finding", "t")
    assert {k for k, v in labels.items() if v} == found


number = st.one_of(st.integers(-50, 1100).map(str), st.floats(allow_nan=True, allow_infinity=True).map(repr), st.text(max_size=6))


@quick
@given(row=st.lists(number, max_size=6), finding=st.sampled_from([*FINDINGS14, "Infiltrate", "Mas"]), size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_a_box_is_inside_or_refused(row, finding, size):
    try: _, name, box = chest_sets._box_row(["a.png", finding, *row], "B.csv: row 7")
    except AdamError as e: assert "B.csv: row 7" in str(e); return
    y0, x0, y1, x1 = chest_sets._scaled(box, size)
    assert 0 <= y0 < y1 <= size[0] and 0 <= x0 < x1 <= size[1] and name in FINDINGS14


# SCR --------------------------------------------------------------------------------------------------------------

# (rows, columns) in the 1024² masks; the patient's left is image-right; left and right differ in size, so that a swap shows
ORGANS = {"right lung": np.s_[200:800, 150:420], "left lung": np.s_[220:700, 600:880], "heart": np.s_[500:760, 430:680], "right clavicle": np.s_[180:220, 180:400], "left clavicle": np.s_[190:240, 620:840]}


def density(n):
    "A raw film: 12 bits, high numbers are dark."
    return (4095 - lopsided(2048, 2048, top=3000 + n).astype(np.uint16))


def write_scr(root, flat=False, raw=lambda n: n % 2 == 0, ids=("JPCLN001", "JPCNN002"), step=1):
    "Films by turns raw and as copies; `step` 16: copies of 128² pixels."
    for n, id in enumerate(ids):
        if raw(n):
            (root/"All247images").mkdir(parents=True, exist_ok=True)
            density(n).astype(">u2").tofile(root/"All247images"/f"{id}.IMG")
        else:                                                                    # the public copies hold palette indices from white to black
            film = Image.fromarray((density(n)[::step, ::step]//16).astype(np.uint8)); film.putpalette([v for i in range(256) for v in (255 - i,)*3])
            (root/"images").mkdir(parents=True, exist_ok=True); film.save(root/"images"/f"{id}.IMG.png")
        for organ, where in ORGANS.items():
            mask = np.zeros((1024, 1024), np.uint8); mask[where] = 255; mask = mask[::step, ::step]
            put(root/(organ if flat else f"scratch/fold{1 if int(id[-1]) % 2 else 2}/masks/{organ}")/f"{id}.gif", mask)


@pytest.mark.parametrize("flat", [False, True], ids=["in folds", "flat"])
def test_scr_as_published(tmp_path, flat):
    write_scr(tmp_path, flat)
    for key, points in (("LL", [[700, 230], [860, 690]]), ("RL", [[300, 210], [160, 790]])):
        (tmp_path/"landmarks"/key).mkdir(parents=True); np.save(tmp_path/"landmarks"/key/"JPCLN001.npy", np.array(points, float))
    records = scr(tmp_path)
    assert [(r.patient, r.split, r.labels["Nodule"], r.size) for r in records] == [("JPCLN001", "train", 1, (2048,)*2), ("JPCNN002", "test", 0, (2048,)*2)]
    for n, r in enumerate(records):
        truth = (4095 - density(n).astype(float))/4095
        image = r.image()
        np.testing.assert_allclose(image, truth, atol=1e-6 if n % 2 == 0 else 1/255)
        assert image[2000, 2000] > image[2000, 20] > image[600, 20] > image[20, 20]          # upright, not mirrored, not inverted
        masks = r.masks()
        assert set(masks) == set(SCR_MASKS)
        for organ, (rows, columns) in ORGANS.items():
            mask = np.zeros((2048, 2048), bool); mask[2*rows.start:2*rows.stop, 2*columns.start:2*columns.stop] = True
            assert (masks[organ.replace(" ", "_")] == mask).all()
    assert records[0].landmarks == {"left_apex": (1401, 461), "left_costophrenic": (1721, 1381), "right_apex": (601, 421), "right_costophrenic": (321, 1581)}


def test_scr_raw_goes_before_its_copy_and_other_byte_order_is_refused(tmp_path):
    write_scr(tmp_path, raw=lambda n: False, ids=("JPCLN001",))
    write_scr(tmp_path, ids=("JPCLN001",))
    assert len(scr(tmp_path)) == 1 and scr(tmp_path)[0].path.endswith(".IMG")
    density(0).astype("<u2").tofile(tmp_path/"All247images/JPCLN001.IMG")
    with pytest.raises(AdamError, match="byte order"): scr(tmp_path)[0].image()


def test_scr_takes_no_mask_for_a_film_and_no_copy_at_random(tmp_path):
    write_scr(tmp_path, raw=lambda n: False, ids=("JPCLN001",), step=16)
    stray = [put(tmp_path/folder/"JPCLN001.png", np.zeros((64, 64), np.uint8)) for folder in ("lung_masks", "All masks/ribs")] + [put(tmp_path/"aorta/JPCLN001.gif", np.zeros((64, 64), np.uint8))]
    records = scr(tmp_path)
    assert len(records) == 1 and Path(records[0].path) == tmp_path/"images/JPCLN001.IMG.png" and set(map(Path, records.unused)) == set(stray)
    for second, what in ((tmp_path/"a small copy/JPCLN001.png", "the film JPCLN001"), (tmp_path/"again/left lung/JPCLN001.gif", "the mask 'left_lung' of JPCLN001")):
        put(second, np.zeros((64, 64), np.uint8))
        with pytest.raises(AdamError, match=f"are both {what}; remove one"): scr(tmp_path)
        second.unlink()


@quick
@given(text=st.one_of(st.text(max_size=60), st.from_regex(r"JPC[LN]N[0-9]{3}\.IMG\s[0-9]{1,5}\s[0-9]{1,3}\s[0-9?]{1,3}\s(fe)?male\s[0-9]{1,5}\s[0-9]{1,5}\s(malignant|benign)\s?[a-z ]{0,10}", fullmatch=True)))
def test_clinical_rows(text):
    "Any text: nothing, or facts within their ranges and a box around a centre within the film."
    if (row := chest_sets._clinical_row(text)) is None: return
    id, facts, box = row
    assert len(id) == 8 and facts["sex"] in "FM" and (np.isnan(facts["age"]) or 0 <= facts["age"] <= 999)
    if box is not None:
        assert 1 <= facts["subtlety"] <= 5 and 0 < facts["size_mm"] <= 200
        y0, x0, y1, x1 = chest_sets._scaled(box, (512, 512), 2048)
        assert 0 <= y0 < y1 <= 512 and 0 <= x0 < x1 <= 512


# DRIVE ------------------------------------------------------------------------------------------------------------

def write_drive(root, numbers=(1, 2, 21, 22), test_manuals=True):
    truth = {}
    for n in numbers:
        part = "test" if n <= 20 else "training"
        put(root/part/"images"/f"{n:02d}_{part}.tif", lopsided(584, 565, 250 - n, 3).astype(np.uint8), compression="tiff_lzw")
        rng = np.random.default_rng(n)
        for folder, name, kind, top in (("1st_manual", f"{n:02d}_manual1.gif", "vessel", 255), ("mask", f"{n:02d}_{part}_mask.gif", "fov", 255), ("2nd_manual", f"{n:02d}_manual2.gif", "vessel_2", 1)):
            if part == "training" and kind == "vessel_2" or part == "test" and kind != "fov" and not test_manuals: continue
            truth[n, kind] = rng.random((584, 565)) < .1
            put(root/part/folder/name, (truth[n, kind]*top).astype(np.uint8))
    return truth


@pytest.mark.parametrize("test_manuals", [True, False], ids=["older distribution", "present download"])
def test_drive_as_published(tmp_path, test_manuals):
    truth = write_drive(tmp_path, test_manuals=test_manuals)
    records = drive(tmp_path)
    assert [(r.patient, r.split, r.channels, r.size) for r in records] == [("01", "test", 3, (584, 565)), ("02", "test", 3, (584, 565)), ("21", "train", 3, (584, 565)), ("22", "train", 3, (584, 565))]
    for r in records:
        np.testing.assert_allclose(r.image(), lopsided(584, 565, 250 - int(r.patient), 3).astype(np.uint8)/255, atol=1e-6)
        masks = r.masks()
        assert {(int(r.patient), k) for k in masks} == {k for k in truth if k[0] == int(r.patient)}
        for k, m in masks.items(): assert (m == truth[int(r.patient), k]).all()
    assert any("no manual (01, 02)" in n for n in records.notes) != test_manuals


@quick
@given(share=st.floats(0, .99), seed=st.integers(0, 1000))
def test_drive_val_comes_from_training(share, seed):
    from adam_nb.records import Record
    records = [Record(str(n), str(n), "test" if n <= 20 else "train") for n in range(1, 41)]
    fundus_sets.deal_val(records, share, seed)
    assert all(r.split == "test" for r in records[:20]) and all(r.split in ("train", "val") for r in records[20:])
    assert any(r.split == "val" for r in records) == (share > 0)


# EyePACS ----------------------------------------------------------------------------------------------------------

def write_eyes(root, patients=range(10, 20), solution=True):
    rows = [(f"{p}_{e}", (p*2 + k) % 5) for p in patients for k, e in enumerate(("left", "right"))]
    put_text(root/"trainLabels.csv", "image,level\n" + "".join(f"{n},{g}\n" for n, g in [*rows, ("900_left", 1)]))
    if solution: put_text(root/"retinopathy_solution.csv", "image,level,Usage\r\n1_left,0,Private\r\n1_right,3,Public\r\n2_left,1,Public\r\n")
    turned = Image.Exif(); turned[0x0112] = 6
    for n, _ in rows: put(root/"train"/f"{n}.jpeg", lopsided(48, 64, 200, 3).astype(np.uint8), quality=95, subsampling=0)
    for n in ("1_left", "1_right"): put(root/"test"/f"{n}.jpeg", lopsided(48, 64, 200, 3).astype(np.uint8), quality=95, subsampling=0, exif=turned)
    return dict(rows)


def test_eyepacs_as_published(tmp_path):
    grades = write_eyes(tmp_path)
    records = eyepacs(tmp_path, val_fraction=.3, seed=2)
    assert Counter(r.split for r in records) == {"train": 14, "val": 6, "test": 2}
    assert leak_check(records) == [] and records.missing == ["2_left", "900_left"]
    for r in records:
        name = Path(r.path).stem
        assert (f"{r.patient}_{r.extra['eye']}", r.channels) == (name, 3)
        assert r.labels["grade"] == (grades | {"1_left": 0, "1_right": 3})[name]
        stored = lopsided(48, 64, 200, 3)/255
        truth = np.rot90(stored, -1) if r.split == "test" else stored                # EXIF 6: turn clockwise
        assert r.size == truth.shape[:2] == r.image().shape[:2] and np.median(abs(r.image() - truth)) < .02
    assert [r.extra.get("usage") for r in records if r.split == "test"] == ["Private", "Public"]


@quick
@given(eyes=st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["left", "right"]), st.integers(0, 4)), min_size=1, max_size=60, unique_by=lambda e: e[:2]), share=st.floats(0, .9), seed=st.integers(0, 99))
def test_two_eyes_of_a_patient_stay_together(eyes, share, seed):
    from adam_nb.records import Record
    records = [Record(f"{p}_{e}", str(p), "train", labels={"grade": float(g)}) for p, e, g in eyes]
    fundus_sets.deal_val(records, share, seed, lambda r: r.labels["grade"])
    assert leak_check(records) == [] and all(r.split in ("train", "val") for r in records)


@quick
@given(rows=st.lists(st.tuples(st.sampled_from(["10_left", "10_right", "11_left", "11_LEFT", " 12_right ", "ten_left", "13", ""]), st.sampled_from(["0", " 4", "3", "5", "1.0", ""])), max_size=4))
def test_any_table_of_grades(tmp_path, rows):
    put_text(tmp_path/"g.csv", "image,level\n" + "".join(f"{a},{b}\n" for a, b in rows))
    try: out = fundus_sets._grades(tmp_path/"g.csv")
    except AdamError as e: assert "g.csv" in str(e); return
    assert all(g in range(5) for g, _ in out.values())
    rows = [(a.strip().lower(), b.strip()) for a, b in rows if a or b]
    assert len(out) == len(rows) and all(out[a][0] == float(b) for a, b in rows)              # a doubled name was refused


def test_two_eyes_of_a_patient_in_two_folders_are_refused(tmp_path):
    "The table names one eye only; the other lies in the folder of the other part."
    write_eyes(tmp_path, solution=False)
    put_text(tmp_path/"trainLabels.csv", (tmp_path/"trainLabels.csv").read_text().replace("12_right,0\n", ""))
    assert Counter(r.split for r in eyepacs(tmp_path, val_fraction=0)) == {"train": 20, "test": 2}
    (tmp_path/"train/12_right.jpeg").rename(tmp_path/"test/12_right.jpeg")
    with pytest.raises(AdamError, match="12_right.jpeg is in the test part, but patient 12 is in the training part"): eyepacs(tmp_path)


@pytest.mark.parametrize("rows, words", [("10_left,0\n10_left,0\n", ["row 3", "10_left", "second time"]), ("10_left,7\n", ["row 2", "'7'"]), ("left_10,1\n", ["row 2", "left_10"])])
def test_a_broken_table_of_grades_names_the_row(tmp_path, rows, words):
    put_text(tmp_path/"trainLabels.csv", "image,level\n" + rows)
    with pytest.raises(AdamError) as e: eyepacs(tmp_path)
    for w in [*words, "trainLabels.csv"]: assert w in str(e.value)


# CSV --------------------------------------------------------------------------------------------------------------

name = st.text(string.ascii_letters + "äé_- .", min_size=1, max_size=10).map(str.strip).filter(lambda s: s and s.lower() not in ("path", "patient", "split", "mask", "nan", "na") and not s.startswith("mask_"))
value = st.one_of(st.sampled_from(["", "0", "1"]), st.floats(-1e6, 1e6, allow_nan=False).map(repr))


@st.composite
def a_table(draw):
    n = draw(st.integers(1, 6))
    columns = draw(st.lists(name, max_size=3, unique=True))
    return dict(n=n, labels={c: draw(st.lists(value, min_size=n, max_size=n)) for c in columns},
                patients=draw(st.none() | st.lists(st.text("abc é", min_size=1, max_size=3).map(str.strip).filter(bool), min_size=n, max_size=n)),
                splits=draw(st.none() | st.lists(st.sampled_from(["train", "val", "test", ""]), min_size=n, max_size=n)),
                line=draw(st.sampled_from(["\n", "\r\n"])), bom=draw(st.booleans()), pad=draw(st.sampled_from(["", " ", "  "])), blank=draw(st.booleans()), end=draw(st.booleans()))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films of é")
    for i in range(6): put(root/"a b"/f"film é {i}.png", lopsided(8, 10).astype(np.uint8) + np.uint8(i))
    os.symlink(root/"a b/film é 0.png", root/"link.png")
    return root


@quick
@given(t=a_table())
def test_a_table_comes_back(films, t):
    columns = {"path": [f"a b/film é {i}.png" for i in range(t["n"])]} | ({"patient": t["patients"]} if t["patients"] else {}) | ({"split": t["splits"]} if t["splits"] else {}) | t["labels"]
    rows = [(","+t["pad"]).join(columns), *((","+t["pad"]).join(r) for r in zip(*columns.values()))]
    if t["blank"]: rows.insert(1, "")
    put_text(films/"t.csv", ("\ufeff" if t["bom"] else "") + t["line"].join(rows) + t["line"]*t["end"])
    records = csv_table(films/"t.csv")
    known = [c for c, v in t["labels"].items() if any(v)]
    assert (len(records), records.label_names) == (t["n"], known)
    for i, r in enumerate(records):
        np.testing.assert_allclose(r.image(), (lopsided(8, 10).astype(np.uint8) + np.uint8(i))/255, atol=1e-6)
        for c in known:
            assert np.isnan(r.labels[c]) if t["labels"][c][i] == "" else r.labels[c] == float(t["labels"][c][i])
        if t["patients"]: assert r.patient == t["patients"][i]
        if t["splits"]: assert r.split == (t["splits"][i] or None)
    if not t["splits"]: assert leak_check(records) == []


@quick
@given(data=st.one_of(st.binary(max_size=80), st.text(",;\n\r\"' 01a.pngth\t\0", max_size=80).map(lambda s: ("path" + s).encode())))
def test_any_bytes_as_a_table(films, data):
    (films/"t.csv").write_bytes(data)
    try: records = csv_table(films/"t.csv")
    except AdamError as e: assert "t.csv" in str(e)
    else: assert len(records)


@pytest.mark.parametrize("text, words", [
    ("pth,a\nf,1\n", ["no column 'path'", "Did you mean"]),
    ("path,a\na b/film é 0.png,1\na b/film é 0.png,0\n", ["row 3", "as row 2 does"]),
    ("path,a\na b/film é 0.png,1\na b/../a b/film é 0.png,0\n", ["row 3", "as row 2 does"]),
    ("path,a\n\na b/none.png,1\n", ["row 3", "none.png", "no such file"]),
    ("path,a,a\nf,1,1\n", ["two columns 'a'"]),
    ("path,a\na b/film é 0.png,1\nlink.png,0\n", ["row 3", "as row 2 does"]),
    ("path;a\nf;1\n", ["semicolons"]),
    ("path,a,note\na b/film é 0.png,1,\na b/film é 1.png,0,\"old\na b/film é 2.png,1,\n", ["row 3", "quotation mark"]),
    ("path,a\na b/film é 0.png,1\na b/film é 1.png,yes\n", ["row 3", "'yes'", "'a'"]),
    ("path,split\na b/film é 0.png,tset\n", ["row 2", "Did you mean 'test'"]),
], ids=["missing column", "doubled", "doubled otherwise spelled", "a link to another row's image", "missing file", "doubled column", "semicolons", "a quotation mark not closed", "a word among numbers", "split"])
def test_a_broken_table_names_the_row(films, text, words):
    put_text(films/"t.csv", text)
    with pytest.raises(AdamError) as e: csv_table(films/"t.csv")
    for w in [*words, "t.csv"]: assert w in str(e.value)


# MedMNIST ---------------------------------------------------------------------------------------------------------

def write_set(path, shape=(28, 28), counts=(9, 4, 5), classes=2, findings=0, save=np.savez_compressed):
    arrays = {}
    for s, n in zip(("train", "val", "test"), counts):
        images = np.stack([np.roll(lopsided(*shape[:2], 255, shape[2] if len(shape) == 3 else 1), k, 1) for k in range(n)]).astype(np.uint8)
        arrays[f"{s}_images"] = images
        arrays[f"{s}_labels"] = (np.arange(n*findings).reshape(n, findings) % 3 == 0).astype(np.uint8) if findings else (np.arange(n) % classes)[:, None].astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **arrays)
    return arrays


@pytest.mark.parametrize("stem, shape, options", [("pneumoniamnist", (28, 28), {}), ("chestmnist_64", (64, 64), dict(findings=14)), ("retinamnist_128", (128, 128, 3), dict(classes=5)), ("octmnist_224", (224, 224), dict(classes=4, save=np.savez))])
def test_medmnist_as_published(tmp_path, stem, shape, options):
    truth = write_set(tmp_path/f"{stem}.npz", shape, **options)
    records = medmnist(tmp_path)
    assert records.summary()["splits"] == {s: {"images": n, "patients": n} for s, n in (("train", 9), ("val", 4), ("test", 5))}
    for s in ("train", "val", "test"):
        for r, image, label in zip(records.only(s), truth[f"{s}_images"], truth[f"{s}_labels"]):
            assert (r.size, r.channels) == (shape[:2], 3 if len(shape) == 3 else 1)
            np.testing.assert_allclose(r.image(), image/255, atol=1e-6)
            if options.get("findings"): assert list(r.labels.values()) == label.tolist()
            else: assert r.extra["class"] == label[0] and r.labels == ({records.label_names[0]: float(label[0])} if options.get("classes", 2) == 2 else {k: float(i == label[0]) for i, k in enumerate(records.label_names)})


@quick
@given(block=st.integers(1, 4000), order=st.lists(st.integers(0, 19), max_size=30), shape=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_items_in_any_order(tmp_path, block, order, shape):
    truth = np.random.default_rng(block).integers(0, 9, (20, *shape), np.uint8)
    np.savez_compressed(tmp_path/"a.npz", x=truth)
    reader = ArrayReader(str(tmp_path/"a.npz"), "x"); reader.BLOCK = block
    for i in order: assert (reader[i] == truth[i]).all()


def test_a_damaged_archive_never_gives_wrong_images_to_the_end(tmp_path):
    "A byte flipped anywhere: an error, or (where it does not matter) the very same images."
    truth = write_set(tmp_path/"whole.npz", (40, 40), (30, 3, 3))
    whole = (tmp_path/"whole.npz").read_bytes()
    refused = 0
    for at in np.random.default_rng(0).integers(0, len(whole), 80):
        spoiled = bytearray(whole); spoiled[at] ^= 0x55
        (tmp_path/"spoiled").mkdir(exist_ok=True); (tmp_path/"spoiled/x.npz").write_bytes(bytes(spoiled))
        os.utime(tmp_path/"spoiled/x.npz", ns=(0, int(at)))                              # another file: nothing remembered of the one before
        try: images = np.stack([r.image() for r in medmnist(tmp_path/"spoiled")])
        except AdamError as e: assert "x.npz" in str(e); refused += 1; continue
        np.testing.assert_allclose(images, np.concatenate([truth[f"{s}_images"] for s in ("train", "val", "test")])/255, atol=1e-6)
    assert refused > 40


def test_the_checksum_of_a_large_array_is_compared(tmp_path):
    "Large enough that opening the archive does not read it all; stored with a wrong checksum, which only the last image tells."
    truth = np.random.default_rng(0).integers(0, 256, (300, 60, 60), np.uint8)
    np.savez_compressed(tmp_path/"a.npz", x=truth)
    whole = (tmp_path/"a.npz").read_bytes()
    crc = whole[14:18]
    (tmp_path/"a.npz").write_bytes(whole.replace(crc, bytes([crc[0] ^ 1]) + crc[1:]))
    reader = ArrayReader(str(tmp_path/"a.npz"), "x"); reader.BLOCK = 1 << 16
    assert (reader[0] == truth[0]).all() and (reader[250] == truth[250]).all()
    for _ in range(2):
        with pytest.raises(AdamError, match="checksum"): reader[299]


def test_pickles_are_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/"ran"),))
    arrays = write_set(tmp_path/"x.npz")
    np.savez_compressed(tmp_path/"x.npz", **(arrays | {"train_images": np.array([Bomb()], object)}))
    with pytest.raises(AdamError, match="pickled objects"): medmnist(tmp_path)
    assert not (tmp_path/"ran").exists()


def test_records_of_arrays_travel(tmp_path):
    "To another process, light, and without an open file."
    import pickle
    from adam_nb.data import map_processes
    truth = write_set(tmp_path/"x.npz", counts=(40, 4, 4))
    records = medmnist(tmp_path)
    records[5].image()                                                                   # the reader has blocks already when the workers are forked
    assert max(len(pickle.dumps(r)) for r in records) < 1000
    got = list(map_processes(_sum_of, list(records), workers=2))
    assert got == [int(i.sum()) for s in ("train", "val", "test") for i in truth[f"{s}_images"]]


def _sum_of(record): return int(round(float(record.image().sum(dtype=float))*255))


# What they have in common -----------------------------------------------------------------------------------------

BUILDERS = {"chestxray14": write_nih, "scr": lambda root: write_scr(root, raw=lambda n: False, step=16), "drive": write_drive, "eyepacs": write_eyes, "medmnist": lambda root: write_set(root/"pneumoniamnist.npz"),
            "csv": lambda root: (put(root/"a.png", lopsided(8, 9).astype(np.uint8)), put_text(root/"t.csv", "path,x\na.png,1\n"))}


@pytest.mark.parametrize("name", BUILDERS)
def test_an_archive_in_place_of_a_folder(tmp_path, name):
    (tmp_path/"download.zip").write_bytes(b"PK\3\4")
    with pytest.raises(AdamError, match="unpack"): LAYOUTS[name].build(tmp_path/"download.zip")
    with pytest.raises(AdamError, match="There is no folder"): LAYOUTS[name].build(tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(AdamError, match="empty"): LAYOUTS[name].build(tmp_path/"empty")


@pytest.mark.parametrize("name", BUILDERS)
def test_registered_with_what_check_prints(name):
    layout = LAYOUTS[name]
    assert layout.source and layout.layout and (name == "csv" or layout.terms and layout.size)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_folder_with_spaces_accents_and_a_loop(tmp_path, name):
    root = tmp_path/"Ärzte der Klinik"/"data set"
    root.mkdir(parents=True)
    BUILDERS[name](root)
    plain = LAYOUTS[name].build(root)
    os.symlink(root, root/"loop"); os.symlink(root/"nothing", root/"dangling.png")
    records = LAYOUTS[name].build(root)
    assert repr(list(records)) == repr(list(plain))
    records[0].image(), records[0].masks(), records.to_frame(), records.summary(), records.show(2)
    assert leak_check(records) == []


@pytest.mark.parametrize("name", BUILDERS)
def test_the_place_of_a_folder_changes_nothing(tmp_path, name):
    for place in ("a", "b"): (tmp_path/place).mkdir(); BUILDERS[name](tmp_path/place)
    a, b = (LAYOUTS[name].build(tmp_path/place) for place in ("a", "b"))
    assert [r.split for r in a] == [r.split for r in b]
    a.root, b.root = (str(tmp_path/place) for place in ("a", "b"))
    assert a.ids == b.ids and a.fingerprint() == b.fingerprint()
