"""Values from DICOM headers stay in the files: planted in every text element, they are searched for in all that the library says and writes."""
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

ROOT = Path(__file__).resolve().parents[1]
PLANTED = {"AE": "ZQXTITLE7", "AS": "097Y", "CS": "ZQXCSVALUE", "DA": "17530309", "DS": "86420.975", "DT": "17530309031415.9", "IS": "86420975", "LO": "Zqx Long^String", "LT": "Zqx long text",
           "PN": "Zqxname^Plantine", "SH": "Zqx short", "ST": "Zqx some text", "TM": "031415.926", "UC": "Zqx unlimited", "UI": "1.2.826.0.1.97531.86420", "UR": "https://zqx.example/planted", "UT": "Zqx more text"}
SECRETS = sorted({*PLANTED.values(), "ZQPREAMBLE", "ZQPRIVATE", "ZQBYTES", "ZQNESTED", "ZQBROKEN", "Zqxname", "Plantine", "ZQXTITLE", "zqx.example"})
NEEDED = {"Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "NumberOfFrames", "PixelPaddingValue",
          "RescaleIntercept", "RescaleSlope", "RescaleType", "WindowCenter", "WindowWidth", "VOILUTFunction", "PlanarConfiguration", "SpecificCharacterSet", "LossyImageCompression",
          "SmallestImagePixelValue", "LargestImagePixelValue"}      # what decides the picture


def text_elements():
    "(tag, VR) of all elements of the standard's dictionary that hold text and no picture."
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if vr in PLANTED and keyword not in NEEDED and 0x0008 <= tag >> 16 < 0x7FE0 and tag & 0xFFFF: yield tag, vr


def film(path, patient, **more):
    "A film with a planted value in every text element, in nested sequences, private elements, the file's meta information and its preamble."
    ds = Dataset()
    for tag, vr in text_elements(): ds.add_new(tag, vr, PLANTED[vr])
    ds.PatientID = f"{PLANTED['LO']} {patient}"
    inner = Dataset(); inner.PatientName, inner.PatientID = "ZQNESTED^A", "ZQNESTED"
    middle = Dataset(); middle.OtherPatientIDsSequence = Sequence([inner]); middle.StudyComments = "ZQNESTED"
    ds.RequestAttributesSequence = Sequence([middle])
    block = ds.private_block(0x0011, "ZQPRIVATE", create=True)
    block.add_new(1, "LO", "ZQPRIVATE value"); block.add_new(2, "UN", b"ZQBYTES\0"); block.add_new(3, "SQ", Sequence([inner]))
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, PLANTED["UI"], PLANTED["UI"]
    ds.file_meta.SourceApplicationEntityTitle, ds.file_meta.SendingApplicationEntityTitle = PLANTED["AE"], PLANTED["AE"]
    ds.file_meta.PrivateInformationCreatorUID, ds.file_meta.PrivateInformation = PLANTED["UI"], b"ZQBYTES\0"
    ds.preamble = b"ZQPREAMBLE".ljust(128)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 4096, (128, 128)).astype("<u2")
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 128, 128, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = pixels.tobytes(); ds["PixelData"].VR = "OW"
    if "WindowCenter" in more: ds.WindowWidth = 100
    for key, value in more.items(): setattr(ds.file_meta if key == "TransferSyntaxUID" else ds, key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=False, implicit_vr=False, little_endian=True)
    return path


def broken(path, keyword, stand_in):
    "A film one of whose elements holds text that its type forbids: a stand-in of eight letters is written, then changed in the file."
    film(path, 1, **{keyword: stand_in})
    whole = path.read_bytes()
    assert whole.count(stand_in.encode()) == 1
    path.write_bytes(whole.replace(stand_in.encode(), b"ZQBROKEN"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital")
    pydicom.config.settings.writing_validation_mode, before = pydicom.config.IGNORE, pydicom.config.settings.writing_validation_mode
    try:
        for i in range(6): film(folder/"films"/f"film{i}.dcm", i//2)
        good = (folder/"films/film0.dcm").read_bytes()
        for n, share in enumerate((.002, .1, .5, .8, .99)): (folder/"films"/f"cut{n}.dcm").write_bytes(good[:int(len(good)*share)])
        for name, keyword, stand_in in (("window", "WindowCenter", "55443322"), ("photo", "PhotometricInterpretation", "MONOCHRO"), ("charset", "SpecificCharacterSet", "ISO_IR 6"),
                                        ("frames", "NumberOfFrames", "55443322"), ("slope", "RescaleSlope", "55443322")): broken(folder/"films"/f"{name}.dcm", keyword, stand_in)
        film(folder/"films/syntax.dcm", 1, TransferSyntaxUID="1.2.826.0.1.97531.86420")
    finally: pydicom.config.settings.writing_validation_mode = before
    assert len(good) > 70_000 and all(s.encode() in good for s in ("ZQPREAMBLE", "ZQNESTED", "ZQPRIVATE", "Zqxname^Plantine", "17530309", "86420.975"))
    return folder


STEPS = '''
import io, json, logging, pickle, sys, traceback, warnings
from pathlib import Path
logging.basicConfig(level=logging.DEBUG); warnings.simplefilter("always")
import matplotlib; matplotlib.use("agg"); logging.getLogger("matplotlib").setLevel(logging.WARNING)
from adam_nb.cache import Cache, prepare
from adam_nb.data import check, dataset, format_check
from adam_nb.images import image_size, open_image, open_mask
from adam_nb.pipeline import main
from adam_nb.results import write_json

films, out = sys.argv[1], Path(sys.argv[2])
records = dataset("folder", films, patient="dicom", channels=1)
print(records, records[0], list(records), records.options, records.ids, records.notes)
print(records.to_frame().to_string()); records.to_frame().to_csv(out/"frame.csv")
summary = records.summary(); print(summary); write_json(out/"summary.json", summary)
(out/"records.pickle").write_bytes(pickle.dumps(records))
figure = records.show(len(records)); figure.savefig(out/"figure.svg"); figure.savefig(out/"figure.png", metadata=None)
print([t.get_text() for ax in figure.axes for t in (ax.title, *ax.texts)])
for full in (False, True):
    report = check("folder", films, full=full, workers=2, patient="dicom"); print(format_check(report)); write_json(out/f"check{full}.json", report)
print(main(["check", "folder", films, "patient=dicom", "--full", "--json", str(out/"cli.json")]), main(["check", "folder", films + "/film0.dcm"]))
def attempt(work):
    try: print("worked:", type(work()))
    except Exception: print(traceback.format_exc())
attempt(lambda: prepare(records, out/"strict", 64, progress=True, workers=2))
cache = prepare(records, out/"cache", 64, on_bad="skip", window=(1, 99), workers=0)
print(cache, cache.manifest, list(cache.patients), list(cache.ids), cache.records(), cache.verify())
for path in sorted(Path(films).iterdir()):
    for opener in (open_image, open_mask, image_size): attempt(lambda: opener(path))
attempt(lambda: dataset("folder", films, patient="(nobody)")); attempt(lambda: dataset("folder", films, split="none", patient="dicom")); attempt(lambda: dataset("csv", films)); attempt(lambda: dataset("siim_acr", films)); attempt(lambda: dataset("vindr_cxr", films))
from adam_nb.draw import show_images
show_images([cache.image(i) for i in range(4)]).savefig(out/"grid.svg")
'''


def leaks(text: bytes, where: str) -> list[str]:
    "Planted values in bytes, in any of the encodings that files of ours use; embedded pictures, which are letters by chance, are left out."
    text = re.sub(rb'(base64,|"image/png": ")[^"]*', b"", text)
    return [f"{secret!r} in {where}" for secret in SECRETS for code in ("utf-8", "utf-16-le", "utf-32-le") if secret.encode(code) in text]


def found_in(folder: Path) -> list[str]: return [leak for f in folder.rglob("*") if f.is_file() for leak in leaks(f.read_bytes(), str(f.relative_to(folder)))]


@pytest.mark.timeout(300)
def test_nothing_from_a_header_leaves_the_files(films, tmp_path):
    data, out = tmp_path/"data", tmp_path/"out"
    out.mkdir()
    env = os.environ | {"ADAM_NB_DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STEPS, str(films/"films"), str(out)], capture_output=True, env=env, cwd=out)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert (out/"cache/manifest.json").is_file() and b"film0.dcm" in done.stdout and b"worked" in done.stdout        # file names stay plain
    assert leaks(done.stdout, "stdout") + leaks(done.stderr, "stderr") + found_in(tmp_path) == []
    salt = data/".patient_salt"
    assert salt.stat().st_mode & 0o777 == 0o600
    assert not any(salt.read_bytes().strip() in f.read_bytes() for f in out.rglob("*") if f.is_file()) and salt.read_bytes().strip() not in done.stdout + done.stderr
    skipped = json.loads((out/"cache/manifest.json").read_text())["skipped"]
    assert {Path(s["path"]).name for s in skipped} >= {"cut0.dcm", "cut3.dcm", "photo.dcm", "syntax.dcm"}


def test_the_search_finds_what_is_there(tmp_path):
    "The search itself is tried on leaks of each kind."
    np.save(tmp_path/"a.npy", np.array(["Zqxname^Plantine"])); (tmp_path/"b.json").write_text('{"born": "17530309"}')
    assert len({leak.split(" in ")[1] for leak in found_in(tmp_path)}) == 2


def test_patients_stay_together_and_the_salt_decides(films, tmp_path, monkeypatch):
    from adam_nb.data import dataset
    def patients(data):
        monkeypatch.setenv("ADAM_NB_DATA", str(tmp_path/data))
        return {Path(r.path).stem: (r.patient, r.split) for r in dataset("folder", films/"films", patient="dicom", channels=1)}
    first, again, other = patients("a"), patients("a"), patients("b")
    assert first == again and first["film0"][0] != other["film0"][0]
    for i in (0, 2, 4): assert first[f"film{i}"] == first[f"film{i + 1}"]          # two films of one patient: one hash, one split
    assert len({first[f"film{i}"][0] for i in (0, 2, 4)}) == 3 and first["cut0"][0] == "cut0"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom the file system can refuse")
def test_a_read_only_data_root_is_a_clear_error(films, tmp_path, monkeypatch):
    from adam_nb.config import AdamError
    from adam_nb.data import dataset
    (tmp_path/"ro").mkdir(); (tmp_path/"ro").chmod(0o500)
    monkeypatch.setenv("ADAM_NB_DATA", str(tmp_path/"ro"))
    with pytest.raises(AdamError, match="set ADAM_NB_DATA to a folder of yours"): dataset("folder", films/"films", patient="dicom")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_reaches_an_executed_notebook(films, tmp_path, monkeypatch):
    import papermill
    monkeypatch.setenv("ADAM_NB_DATA", str(tmp_path/"data"))
    given = {"data": "folder", "data_root": str(films/"films"), "data_options": {"patient": "dicom", "channels": 1}, "cache": str(tmp_path/"cache"), "out": str(tmp_path/"out"), "cache_size": 128, "on_bad": "skip"}
    papermill.execute_notebook(str(ROOT/"nbs/run/prepare.ipynb"), str(tmp_path/"executed.ipynb"), given, progress_bar=False, cwd=str(ROOT), kernel_name="python3")
    assert (tmp_path/"out/prepare.json").is_file() and found_in(tmp_path) == []
    with pytest.raises(papermill.PapermillExecutionError): papermill.execute_notebook(str(ROOT/"nbs/run/prepare.ipynb"), str(tmp_path/"failed.ipynb"), given | {"on_bad": "error"}, progress_bar=False, cwd=str(ROOT), kernel_name="python3")
    assert found_in(tmp_path) == []
