"""Every notebook's inline tests, one counted test per notebook, in this process."""
import os, re
from pathlib import Path

import pytest
import torch
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

NBS = Path(__file__).resolve().parents[1]/"nbs"
LESSONS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.parent.name not in ("run", "tutorials"))      # test_tutorials.py runs those
FLAGS = os.environ.get("ADAM_NB_TEST_FLAGS", "").split()


def mark(path):
    "A notebook with cells of the flags that were asked for counts as slow."
    flagged = re.search(rf'"#\| ?({"|".join(FLAGS)})\b', path.read_text(encoding="utf-8")) if FLAGS else None
    return pytest.param(path, marks=[pytest.mark.slow] if flagged else [])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", [mark(p) for p in LESSONS], ids=lambda p: str(p.relative_to(NBS)))
def test_notebook(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    skip, threads = set(get_config().tst_flags.split()) - set(FLAGS), torch.get_num_threads()
    try: passed, _ = run_notebook(path, skip_flags=skip, force_flags=FLAGS, do_print=False)
    finally: torch.set_num_threads(threads)          # some notebooks compute with one
    assert passed, f"{path.name}: a cell failed, see above"
