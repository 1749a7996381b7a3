"""The house: quick to import, values move forward only, notebooks stay notebooks."""
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adam_nb.plan import _imports

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"), key=lambda p: p.name.split("_")[0])
EXP = re.compile(r"#\|\s*default_exp\s+(\S+)")


def source(path): return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]


def rooms():
    "(number, module, notebook) in the order of reading."
    found = []
    for path in NOTEBOOKS:
        match = EXP.search("\n".join(source(path)))
        if match: found.append((path.name.split("_")[0], match[1].removesuffix(".__init__"), path))
    return found


def test_import_is_quick_and_light():
    code = "import sys, time; t = time.perf_counter(); import adam_nb; d = time.perf_counter() - t; assert 'torch' not in sys.modules; print(d)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout) for _ in range(3)]
    assert min(times) <= 0.2, times


def test_the_command_line_answers_at_once():
    t = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "import sys; from adam_nb.pipeline import main; code = main(['presets']); assert 'torch' not in sys.modules; sys.exit(code)"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "demo" in done.stdout, done.stderr
    assert time.perf_counter() - t < 5


def test_a_plan_needs_no_torch():
    "It is made at every start, also of a run that has nothing left to do."
    code = "import sys; from adam_nb.plan import plan; plan('demo'); plan('phantom_all'); assert not {'torch', 'sklearn', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_module_imports_a_later_one():
    place = {module.split(".")[0]: i for i, (_, module, _) in enumerate(rooms())}      # a package counts as its last room
    for i, (_, module, path) in enumerate(rooms()):
        base = ROOT/"adam_nb"/module.replace(".", "/")
        code = next(p for p in (base.with_suffix(".py"), base/"__init__.py") if p.is_file()).read_text()
        own = {p.stem for p in (base.parent if "." in module else base).glob("*.py")}       # `from .decomposer` within a package is its own; a plain module has none
        for other in _imports(code) - own:
            assert place[other] < i, f"{path.name} imports {other}, which comes later"


def test_each_room_has_one_module():
    names = [m for _, m, _ in rooms()]
    assert len(set(names)) == len(names)
    exported = {str(p.relative_to(ROOT/"adam_nb").with_suffix("")).replace("/", ".").removesuffix(".__init__") for p in (ROOT/"adam_nb").rglob("*.py")}
    assert exported - {"__init__", "_modidx"} == set(names)


@pytest.mark.parametrize("path", sorted((ROOT/"nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_form(path):
    assert path.stat().st_size <= 500_000
    cells = json.loads(path.read_text())["cells"]
    prose = [c for c in cells if c["cell_type"] == "markdown"]
    assert prose and "".join(prose[0]["source"]).startswith("# "), f"{path.name} has no title"
    assert "\n> " in "".join(prose[0]["source"]), f"{path.name} does not say in one line what it is for"
