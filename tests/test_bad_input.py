"""Bad input at the command line: one clear sentence that names the file or key and the remedy, exit code not 0, no traceback, and what was computed stays."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def command(*args, module="adam_nb.pipeline", **env):
    if args[0] == "check" and "--json" not in args: args = (*args, "--json", Path(tempfile.mkdtemp())/"report.json")      # not into the checkout
    return subprocess.run([sys.executable, "-m", module, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | env)


def refused(done, *words):
    "The command failed with one sentence that holds all `words`, and without a traceback."
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said, said
    for w in words: assert w in said, f"{w!r} is missing in: {said}"


@pytest.fixture
def film(tmp_path):
    path = tmp_path/"films"/"a.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    return path


# data -------------------------------------------------------------------------------------------------------------

def test_missing_folder(tmp_path): refused(command("check", "folder", tmp_path/"none"), "none", "NOT usable")

def test_empty_folder(tmp_path): refused(command("check", "folder", tmp_path), tmp_path.name, "NOT usable")

def said_once(done, *words):
    "Refused, in a single line on stderr."
    refused(done, *words)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr

@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_no_images_to_train_on(tmp_path, there):
    if there: (tmp_path/"films").mkdir()
    said_once(trainer(tmp_path, "data=folder", f"data_root={tmp_path/'films'}", "data_options={}"), str(tmp_path/"films"))
    assert not (tmp_path/"out"/"checkpoints").exists()

def test_unknown_data_set_to_train_on(tmp_path): said_once(trainer(tmp_path, "data=chestxray41"), "chestxray41", "chestxray14")

def test_nothing_is_left_after_skipping(film, tmp_path):
    for i in range(20): film.with_name(f"broken{i}.png").write_bytes(b"")
    refused(trainer(tmp_path, "data=folder", f"data_root={film.parent}", "data_options={}", "on_bad=skip", "train_split=null", "val_split=null"), "'batch_size'", "1 training images")
    film.unlink()
    refused(trainer(tmp_path, "data=folder", f"data_root={film.parent}", "data_options={}", "on_bad=skip", f"cache={tmp_path/'other'}"), "broken")

def test_parts_without_a_pixel(tmp_path):
    "Refused before anything is trained, not when the finest stage begins."
    said_once(trainer(tmp_path, "--quiet", "cache_size=32", "stages=[0, 12]"), "'stages' goes to level 12", "would be empty in", "'cache_size'")
    assert not (tmp_path/"out"/"checkpoints").exists()

def test_a_state_of_another_backbone(tmp_path):
    done = trainer(tmp_path, "steps=1", "--only", "0")
    assert done.returncode == 0, done.stderr
    said_once(command(ROOT/"params/smoke/pretrain.yaml", "--out", tmp_path/"next", "--only", "1", "--init", tmp_path/"out", f"cache={tmp_path/'cache'}", "steps=1", "backbone=resnet34", module="adam_nb.trainer"), "'backbone' is 'resnet34'", "'resnet18'")
    assert list((tmp_path/"out"/"checkpoints").glob("*.pt"))

def test_unknown_data_set(tmp_path): refused(command("check", "chestxray41", tmp_path), "chestxray41", "chestxray14")

@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["zero bytes", "unreadable", "truncated"])
def test_broken_image_is_named(film, content):
    broken = film.with_name("broken.png")
    broken.write_bytes(film.read_bytes()[:700] if content is None else content)
    refused(command("check", "folder", film.parent, "--full"), "broken.png")

@pytest.mark.parametrize("name", ["films.zip", "films.tar.gz", "train.zip.001"])
def test_archive_instead_of_a_folder(tmp_path, name):
    (tmp_path/name).write_bytes(b"PK")
    refused(command("check", "shenzhen", tmp_path/name), name, "is an archive", "unpack it")

def test_a_folder_that_was_not_unpacked(tmp_path):
    (tmp_path/"images_001.tar.gz").write_bytes(b"")
    refused(command("check", "chestxray14", tmp_path), "images_001.tar.gz", "unpack")

def test_absent_data_sets_say_where_to_get_them(tmp_path, capsys):
    "Source, terms, size and layout of each published data set; exit code 1; the JSON says the same."
    import json
    from adam_nb.data import LAYOUTS
    from adam_nb.pipeline import main
    published = [layout for layout in LAYOUTS.values() if layout.folder]
    assert len(published) >= 10
    for layout in published:
        assert main(["check", layout.name, str(tmp_path/"none"), "--json", str(tmp_path/"report.json")]) == 1
        said = capsys.readouterr().out
        for text in (layout.source, layout.terms, layout.size, layout.layout, layout.folder): assert text and text in said, (layout.name, text)
        report = json.loads((tmp_path/"report.json").read_text())
        assert not report["usable"] and report["how_to_get"]["source"] == layout.source

def test_json_that_cannot_be_written(film, tmp_path):
    refused(command("check", "folder", film.parent, "--json", film), "a.png exists and is no JSON file", "--json")
    refused(command("check", "folder", film.parent, "--json", film/"r.json"), "cannot be written", "--json")

def test_a_damaged_cache_is_named(film, tmp_path):
    from adam_nb.cache import prepare
    from adam_nb.data import dataset
    prepare(dataset("folder", film.parent), tmp_path/"cache", 64, progress=False)
    assert command("check", "--cache", tmp_path/"cache", "--verify", "--json", tmp_path/"r.json").returncode == 0
    with open(tmp_path/"cache/pixels.bin", "r+b") as f: f.seek(99); f.write(b"\0\xff")
    refused(command("check", "--cache", tmp_path/"cache", "--verify", "--json", tmp_path/"r.json"), "DAMAGED", "a.png")

def test_bad_images_can_be_left_out(film, tmp_path):
    "`on_bad: skip` in a run's parameters: the run goes on, says how many and which, and the manifest lists them."
    import json
    for i in range(24): film.with_name(f"f{i}.png").write_bytes(film.read_bytes())
    film.with_name("broken.png").write_bytes(b"")
    done = command(ROOT/"params/smoke/pretrain.yaml", "--out", tmp_path/"out", "data=folder", f"data_root={film.parent}", "data_options={}", "on_bad=skip", "steps=1", module="adam_nb.trainer")
    assert done.returncode == 0 and "1 of 26 images are left out" in done.stderr and "broken.png" in done.stderr, done.stderr
    assert [Path(s["path"]).name for s in json.loads((tmp_path/"cache/manifest.json").read_text())["skipped"]] == ["broken.png"]

def test_broken_image_stops_pretraining_by_name(film, tmp_path):
    film.with_name("broken.png").write_bytes(b"")
    refused(command(ROOT/"params/smoke/pretrain.yaml", "--out", tmp_path/"out", "data=folder", f"data_root={film.parent}", "data_options={}", module="adam_nb.trainer"), "broken.png")

# parameters -------------------------------------------------------------------------------------------------------

def trainer(tmp_path, *pairs): return command(ROOT/"params/smoke/pretrain.yaml", "--out", tmp_path/"out", *pairs, module="adam_nb.trainer")

@pytest.mark.parametrize("pair, words", [
    ("bank_size=4", ["bank_size", "batch"]),
    ("stages=[]", ["stages"]),
    ("stages=[2, 0]", ["stages", "free"]),
    ("treshold=0.9", ["treshold", "threshold"]),
    ("lr=fast", ["lr", "float"]),
    ("stages=[0, 40]", ["40"]),
    ("backbone=resnet19", ["resnet19", "resnet18"]),
])
def test_parameters_of_pretraining(tmp_path, pair, words): refused(trainer(tmp_path, pair), *words)

def test_small_parts_are_a_warning(tmp_path):
    done = trainer(tmp_path, "stages=[0, 10]", "steps=1")
    assert done.returncode == 0 and "at level 10 a part has only 4 pixels in the cache; raise 'cache_size'" in done.stderr, done.stderr

def test_unknown_key_in_yaml(tmp_path):
    (tmp_path/"p.yaml").write_text((ROOT/"params/smoke/pretrain.yaml").read_text() + "\nbanksize: 3\n")
    refused(command(tmp_path/"p.yaml", "--out", tmp_path/"out", module="adam_nb.trainer"), "p.yaml", "banksize", "bank_size")

def test_unknown_key_on_the_command_line(): refused(command("run", "smoke", "tresholds=1", "name=never"), "tresholds", "threshold")

def test_ambiguous_key(): refused(command("run", "smoke", "steps=1", "name=never"), "pretrain.steps", "segment.steps")

@pytest.mark.parametrize("pair, words", [("pretrain.seed=3", ["pretrain_seeds"]), ("segment.task=heart_scr_phantom", ["segment={"]), ("pretrain.cache_size=64", ["prepare.yaml", "cache_size"]),
                                         ("bank_size=4", ["bank_size", "batch"])])
def test_what_has_no_effect_or_cannot_work_is_refused_before_any_work(pair, words): refused(command("run", "smoke", pair, "name=never"), *words)

def test_overrides_need_a_folder(): refused(command("run", "smoke", "bank_size=64"), "name=")

def test_unknown_preset(): refused(command("run", "smok"), "smok", "smoke")

def test_missing_data_set_of_a_preset(tmp_path): refused(command("run", "cxr_mini", ADAM_NB_DATA=str(tmp_path)), "ChestX-ray14", "ADAM_NB_DATA")

def test_nothing_was_begun(): assert not (ROOT/"outputs/never").exists()

# checkpoints and upstream results ---------------------------------------------------------------------------------

def test_checkpoint_of_another_backbone(tmp_path):
    from adam_nb.encoders import save_encoder
    from adam_nb.model import create_encoder
    path = tmp_path/"e.safetensors"
    save_encoder(path, create_encoder("resnet34", 1, seed=0), {})
    import torch
    torch.save({"state_dict": create_encoder("resnet18", 1, seed=0).state_dict()}, tmp_path/"other.pth")
    from adam_nb.config import AdamError
    from adam_nb.eve import Eve
    with pytest.raises(AdamError, match="resnet34"): Eve.load(path, backbone="resnet18")
    with pytest.raises(AdamError, match="resnet18"): Eve.load(tmp_path/"other.pth", backbone="resnet50")

def test_no_checkpoint(tmp_path, film): refused(command("embed", tmp_path/"none.safetensors", film), "none.safetensors")

def test_torn_checkpoint(tmp_path, film):
    (tmp_path/"torn.safetensors").write_bytes(b"\x10\x00")
    refused(command("embed", tmp_path/"torn.safetensors", film), "torn.safetensors")

def test_a_kernel_that_dies(monkeypatch):
    "For want of memory, say: a sentence, also when it dies while it starts."
    import shutil
    import papermill
    from nbclient.exceptions import DeadKernelError
    from adam_nb.config import AdamError
    from adam_nb.pipeline import run_node, write_plan
    run = f"never-{os.getpid()}"
    try:
        path, _ = write_plan("smoke", run=run)
        for error in (DeadKernelError("Kernel died"), RuntimeError("Kernel died before replying to kernel_info")):
            def die(*args, **kwargs): raise error
            monkeypatch.setattr(papermill, "execute_notebook", die)
            with pytest.raises(AdamError, match="prepare: its kernel has died, .*--cores 1"): run_node(str(path), "prepare")
    finally: shutil.rmtree(ROOT/"outputs"/run, ignore_errors=True)

def test_missing_upstream_result(tmp_path):
    from adam_nb.pipeline import read_plan, write_plan
    run = f"never-{os.getpid()}"
    try:
        path, _ = write_plan("smoke", run=run)
        last = [n for n in read_plan(path) if n.notebook == "pretrain"][-1]
        refused(command("node", path, last.name), last.name, "prepare")
    finally:
        import shutil
        shutil.rmtree(ROOT/"outputs"/run, ignore_errors=True)
