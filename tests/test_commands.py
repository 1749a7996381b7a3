"""The command line as a person meets it: exit codes, one sentence for what can be mended, and files that can be read again."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adam_nb.encoders import save_encoder
from adam_nb.model import create_encoder
from adam_nb.phantom import chest_phantom
from adam_nb.pipeline import main, parser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Eight films in two folders, four masks (1 = heart, 2 = clavicles), an encoder."
    d = tmp_path_factory.mktemp("films")
    (d/"masks").mkdir()
    for i in range(8):
        p = chest_phantom(9, i, 80)
        folder = d/"images"/("a" if i < 4 else "b"); folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((p.image * 255).astype(np.uint8)).save(folder/f"film{i}.png")
        label = np.where(p.masks["left_clavicle"] | p.masks["right_clavicle"], 2, np.where(p.masks["heart"], 1, 0)).astype(np.uint8)
        if i < 4: Image.fromarray(label).save(d/"masks"/f"film{i}.png")
    (d/"masks"/"labels.json").write_text('{"1": "heart", "2": "clavicles"}')
    save_encoder(d/"encoder.safetensors", create_encoder("resnet18", 1, seed=0), {"arm": "adam"})
    return d


def command(capsys, *words):
    "(exit code, stdout, stderr) of the console script in this process."
    capsys.readouterr()
    code = main([str(w) for w in words])
    return code, *capsys.readouterr()


def test_help_names_every_command_without_torch():
    code = "import sys\nfrom adam_nb.pipeline import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("run", "presets", "check", "embed", "fit-segmenter", "segment", "probe", "export"): assert f"    {name}" in done.stdout


def test_from_masks_to_masks(films, tmp_path, capsys):
    code, said, _ = command(capsys, "fit-segmenter", films/"encoder.safetensors", films/"images", films/"masks", "--out", tmp_path/"s", "size=32", "steps=4", "folds=2")
    assert code == 0 and "4 images (4 more have no mask)" in said and "held out" in said and "2 folds" in said
    card = json.loads((tmp_path/"s"/"segmenter.json").read_text())
    assert card["encoder"]["arm"] == "adam" and set(card["held_out"]) == {"heart", "clavicles"} and 0 <= card["held_out"]["heart"]["dice_image"] <= 1
    code, said, _ = command(capsys, "segment", tmp_path/"s", films/"images", "--out", tmp_path/"out", "--sheet", 3)
    assert code == 0 and "masks of 8 images" in said
    rows = list(csv.DictReader((tmp_path/"out"/"segmentation.csv").open()))
    scores = [float(r["uncertainty"]) for r in rows]
    assert len(rows) == 8 and scores == sorted(scores, reverse=True)
    for r in rows:      # folders are kept, sizes are the images' own, values those of the masks that were given
        mask = np.asarray(Image.open(r["mask"]))
        assert mask.shape == (80, 80) and set(np.unique(mask)) <= {0, 1, 2} and Path(r["mask"]).parent.name == Path(r["path"]).parent.name
    assert Image.open(tmp_path/"out"/"overlay.png").size[0] > 300


def test_the_same_command_twice_gives_the_same_bytes(films, tmp_path, capsys):
    for name in "ab": assert command(capsys, "fit-segmenter", films/"encoder.safetensors", films/"images", films/"masks", "--out", tmp_path/name, "size=32", "steps=3", "threads=1")[0] == 0
    from safetensors.numpy import load_file
    a, b = (load_file(tmp_path/n/"segmenter.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("words, sentence", [
    (["segment", "encoder.safetensors", "images", "--out", "x"], "fit a segmenter to a few masks first: adam_nb fit-segmenter"),
    (["segment", "nothing", "images", "--out", "x"], "There is no segmenter"),
    (["fit-segmenter", "encoder.safetensors", "images", "nothing", "--out", "x"], "There is no folder of masks"),
    (["fit-segmenter", "encoder.safetensors", "images", "images", "--out", "x"], "is given as the folder of images and of masks"),
    (["fit-segmenter", "encoder.safetensors", "images", "masks", "--out", "x", "size=100"], "divisible by 32"),
    (["fit-segmenter", "encoder.safetensors", "images", "masks", "--out", "x", "stepps=10"], "Did you mean 'steps'?"),
    (["fit-segmenter", "masks/labels.json", "images", "masks", "--out", "x"], "labels.json"),
    (["export", "encoder.safetensors", "--to", "torchvison", "--out", "x"], "Did you mean 'torchvision'?"),
    (["probe", "encoder.safetensors", "--preset", "smoky"], "Did you mean 'smoke'?"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(films, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.setenv("ADAM_NB_TEXT_PROGRESS", "1")
    here = [str(films/w) if (films/w).exists() else w for w in words]
    if words[0] == "probe": monkeypatch.chdir(ROOT)
    else: monkeypatch.chdir(tmp_path)
    code, _, said = command(capsys, *here)
    assert code == 2 and sentence in said and said.startswith("adam_nb: ") and said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())      # nothing was begun


def test_an_unreadable_image_costs_itself_only(films, tmp_path, capsys):
    assert command(capsys, "fit-segmenter", films/"encoder.safetensors", films/"images", films/"masks", "--out", tmp_path/"s", "size=32", "steps=1")[0] == 0
    (tmp_path/"new").mkdir()
    (tmp_path/"new"/"good.png").write_bytes((films/"images"/"b"/"film5.png").read_bytes())
    (tmp_path/"new"/"torn.png").write_bytes((films/"images"/"b"/"film5.png").read_bytes()[:400])
    code, said, errors = command(capsys, "segment", tmp_path/"s", tmp_path/"new", "--out", tmp_path/"out")
    assert code == 1 and "masks of 1 images" in said and "torn.png" in errors and (tmp_path/"out"/"masks"/"good.png").is_file()


def test_export_and_probe(films, tmp_path, capsys):
    code, said, _ = command(capsys, "export", films/"encoder.safetensors", "--to", "smp", "--out", tmp_path/"smp")
    assert code == 0 and (tmp_path/"smp"/"README.md").is_file()
    code, said, _ = command(capsys, "probe", films/"encoder.safetensors", "--preset", "smoke", "--out", tmp_path/"card", "probes=[compositionality]", "n_images=3", "n_patches=8", "levels=0", "control=false")
    card = json.loads((tmp_path/"card"/"card.json").read_text())
    assert code == 0 and {r["probe"] for r in card["rows"]} == {"compositionality"} and (tmp_path/"card"/"card.html").is_file()


def test_every_command_has_a_line_of_help():
    sub = next(a for a in parser()._actions if hasattr(a, "choices") and a.choices)
    assert {c.dest for c in sub._choices_actions} == set(sub.choices) and all(c.help for c in sub._choices_actions)
