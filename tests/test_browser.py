"The explorers in a real JupyterLab, opened by headless Chromium and moved by mouse and keyboard."
import os, secrets, shutil, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"), pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = Path(os.environ.get("ADAM_NB_SCREENSHOTS") or ROOT/"outputs"/"screenshots")
SLACK = float(os.environ.get("ADAM_NB_SLACK", 6))       # how much slower than 3 s to open and 150 ms a move a busy machine may be; 1 on one that is quiet
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

# Two cells each: the first makes what the explorer needs (a film of 1024 pixels, a bank of 4,096 parts), the second opens it.
NOTEBOOKS = {
    "decomposer": ("""from adam_nb.phantom import chest_phantom
from adam_nb.widgets import DecomposerExplorer
film = chest_phantom(0, 3, 1024).image""", "explorer = DecomposerExplorer(film, level=2)"),
    "pruner": ("""import numpy as np, torch
from adam_nb.phantom import chest_phantom
from adam_nb.views import pack_id
from adam_nb.widgets import Parts, PrunerExplorer, cut_parts
film = chest_phantom(0, 3, 1024).image
seen = cut_parts([chest_phantom(0, i, 64).image for i in range(8)], 4, lambda x: (x - x.mean((1, 2, 3), keepdim=True)).flatten(1), size=32)
noise = torch.randn(256, 16, seen.keys.shape[1], generator=torch.Generator().manual_seed(0))/80
make = lambda more: Parts((seen.keys.reshape(8, 16, -1).repeat(32, 1, 1) + more*noise).flatten(0, 1), np.tile(seen.pictures, (32, 1, 1)), torch.tensor([pack_id(i, 4, c) for i in range(256) for c in range(16)]))
blurred, bank = make(3), make(1)
assert len(bank) == 4096""", "explorer = PrunerExplorer({'blurred': blurred, 'sharp': bank}, anchor=5, films=[film]*256)"),
    "correspondence": ("""from adam_nb.eve import Eve
from adam_nb.phantom import chest_phantom
from adam_nb.widgets import CorrespondenceExplorer
films = [chest_phantom(0, i, 1024 if i < 2 else 128).image for i in range(11)]
encoder = Eve.random("resnet18", in_channels=1, size=32)""", "explorer = CorrespondenceExplorer(films, {'pixels': None, 'untrained': encoder})"),
    "embedding": ("""import torch
from adam_nb.data import dataset
from adam_nb.widgets import EmbeddingExplorer, landmark_points
points = landmark_points(dataset("phantom_chest", n=12, size=128), size=32)
blocks = lambda x: torch.nn.functional.avg_pool2d(x, 8).flatten(1)""", "explorer = EmbeddingExplorer(points, {'pixels': None, 'blocks': blocks})"),
    "parts": ("""import torch
from adam_nb.data import dataset
from adam_nb.widgets import EmbeddingExplorer, part_points
points = part_points([r.image() for r in dataset("phantom_chest", n=20, size=128)], level=3, size=32)
blocks = lambda x: torch.nn.functional.avg_pool2d(x, 8).flatten(1)""", "explorer = EmbeddingExplorer(points, {'pixels': None, 'blocks': blocks}, projection='tsne')"),
    "monitor": ("from adam_nb.widgets import TrainingMonitor", "explorer = TrainingMonitor(FOLDER + '/run', every=0.5)"),
    "broken": ("""from pathlib import Path
from adam_nb.widgets import DecomposerExplorer
Path("damaged.png").write_bytes(b"no picture")""", "explorer = DecomposerExplorer('damaged.png')"),
}


@contextmanager
def jupyter(folder: Path):
    "A JupyterLab on loopback with settings of its own; yields address and token."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token = secrets.token_hex(16)
    own = {k: str(folder/k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", f"--ServerApp.root_dir={folder}", "--allow-root"]
    quiet = folder/"jupyterlab_settings_dir"/"@jupyterlab"/"apputils-extension"
    quiet.mkdir(parents=True, exist_ok=True)
    (quiet/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')        # no question over the pictures
    with open(folder/"server.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(240):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            if server.poll() is not None: raise RuntimeError((folder/"server.log").read_text()[-2000:])
            time.sleep(.25)
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate(); server.wait(120)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    for name, (make, show) in NOTEBOOKS.items():
        cells = [nbformat.v4.new_code_cell(f"{make}\nprint('all is made')"), nbformat.v4.new_code_cell(f"{show}\nexplorer".replace("FOLDER", repr(str(folder))))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}), folder/f"{name}.ipynb")
    with jupyter(folder) as (address, token), playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser, address, token, folder
        browser.close()


SRC = "Array.from(document.querySelectorAll('.adam-explorer img')).map(i => i.src)"
ASK = """async code => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({code, store_history: false}); let text = '';
  future.onIOPub = m => { if (m.header.msg_type === 'stream') text += m.content.text; if (m.header.msg_type === 'error') text += m.content.evalue };
  await future.done; return text }"""
PIXEL = """([n, x, y]) => { const img = document.querySelectorAll('.adam-explorer img')[n], c = document.createElement('canvas');
  c.width = img.naturalWidth; c.height = img.naturalHeight; const g = c.getContext('2d'); g.drawImage(img, 0, 0);
  return Array.from(g.getImageData(Math.floor(x*c.width), Math.floor(y*c.height), 1, 1).data).slice(0, 3) }"""
BYTES = "Promise.all(Array.from(document.querySelectorAll('.adam-explorer img')).map(i => fetch(i.src).then(r => r.blob()).then(b => b.size)))"


class Explorer:
    "A notebook that has been run in the browser, and the pictures of its explorer."
    def __init__(self, lab, name: str, pictures: bool = True):
        browser, address, token, self.folder = lab
        self.name, self.errors, self.times = name, [], {"sliders and clicks": [], "other controls": []}
        self.page = browser.new_page(viewport={"width": 1500, "height": 1500})
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?token={token}&reset", timeout=120_000, wait_until="commit")
        self.page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext", timeout=90_000)
        self.page.evaluate("async () => { const c = window.jupyterapp.shell.currentWidget.sessionContext; await c.ready; await c.session.kernel.info; }")
        self.page.evaluate("window.jupyterapp.shell.collapseLeft()")
        self.page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function("document.querySelector('.jp-OutputArea') && document.querySelector('.jp-OutputArea').innerText.includes('all is made')", timeout=400_000)
        start = time.perf_counter()
        if not pictures: self.page.wait_for_selector(".adam-explorer [role=alert]", timeout=60_000); return
        self.page.wait_for_function("(() => { const i = document.querySelectorAll('.adam-explorer img'); return i.length && Array.from(i).every(x => x.naturalWidth > 50) })()", timeout=60_000)
        self.opened = time.perf_counter() - start

    def changes(self, move, *which: int):
        "Times the way from a move to other pictures of the numbers `which` (none: of all); fails when one stays."
        before, start = self.page.evaluate(SRC), time.perf_counter()
        move()
        which = which or range(len(before))
        self.page.wait_for_function(f"([old, which]) => {{ const now = {SRC}; return which.every(i => now[i] !== old[i]) }}", arg=[before, list(which)], timeout=60_000)
        self.times["sliders and clicks" if getattr(move, "quick", False) else "other controls"].append(time.perf_counter() - start)
    def press(self, key: str, slider: int = 0, times: int = 1):
        "A key, on a slider's handle."
        handle = self.page.locator(".adam-explorer .noUi-handle").nth(slider)
        def act():
            handle.focus()
            for _ in range(times): self.page.keyboard.press(key)
        act.quick = True
        return act
    def click(self, cell: int, pad: int = 0):
        "A click with the mouse on a cell of a picture, where a person would click."
        button = self.page.locator(".adam-explorer .adam-cells").nth(pad).locator("button").nth(cell)
        button.scroll_into_view_if_needed()
        box = button.bounding_box()
        def act(): self.page.mouse.click(box["x"] + box["width"]/2, box["y"] + box["height"]/2)
        act.quick = True
        return act
    def space(self, cell: int, pad: int = 0):
        "The space bar on a cell of a picture."
        button = self.page.locator(".adam-explorer .adam-cells").nth(pad).locator("button").nth(cell)
        def act(): button.focus(); self.page.keyboard.press("Space")
        act.quick = True
        return act
    def cells(self, pad: int = 0) -> int: return self.page.locator(".adam-explorer .adam-cells").nth(pad).locator("button").count()
    def choose(self, label: str, value: str):
        "An option of a drop-down list."
        return lambda: self.page.get_by_label(label, exact=True).select_option(value)
    def enter(self, label: str, text: str):
        "Text into a box, then Enter."
        def act():
            box = self.page.get_by_label(label, exact=True)
            box.fill(text); box.press("Enter")
        return act
    def tick(self, label: str): return self.page.locator(".adam-explorer .widget-checkbox", has_text=label).locator("input").click
    def button(self, label: str): return self.page.locator(".adam-explorer").get_by_role("button", name=label, exact=True).click
    def pixel(self, picture: int, x: float, y: float) -> np.ndarray:
        "RGB at a place (shares of width and height) of a picture as it is on the screen."
        return np.array(self.page.evaluate(PIXEL, [picture, x, y]))
    def ask(self, code: str) -> str:
        "What the kernel prints."
        return self.page.evaluate(ASK, f"print({code})").strip()
    def message(self) -> str:
        return self.page.evaluate("(document.querySelector('.adam-explorer [role=alert]') || {innerText: ''}).innerText")       # in one go: it may be on its way out
    def quiet(self):
        "Waits until the message has gone, which comes after the picture; fails when it stays."
        self.page.wait_for_function("!document.querySelector('.adam-explorer [role=alert]')", timeout=10_000)

    def finish(self):
        "Screenshot and latencies; no error may have come up, and no picture may be large."
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(5, 5)
        self.page.locator(".adam-explorer").first.screenshot(path=SCREENSHOTS/f"{self.name}.png")
        sizes, said = self.page.evaluate(BYTES), [f"opened in {self.opened:.1f} s"]
        for kind, seconds in self.times.items():
            if seconds: said.append(f"{kind}: {len(seconds)} moves, median {1000*np.median(seconds):.0f} ms, p95 {1000*np.percentile(seconds, 95):.0f} ms")
        print(f"\n{self.name}: {'; '.join(said)}; pictures of {', '.join(f'{s/1000:.0f}' for s in sizes)} kB")
        assert max(sizes) <= 300_000, sizes
        moves = self.times["sliders and clicks"]
        assert self.opened <= 3*SLACK and (not moves or np.percentile(moves, 95) <= .15*SLACK), said
        mine = [e for e in self.errors if "favicon" not in e]
        assert not mine, mine
        assert not self.page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']").count()
        self.page.close()


def near(pixel, colour: str, by: int = 60) -> bool:
    "Whether a pixel has a colour, as well as JPEG keeps it."
    return np.abs(pixel - [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).max() < by


def test_decomposer(lab):
    e = Explorer(lab, "decomposer")
    assert e.cells() == 4
    e.changes(e.press("ArrowRight"))
    assert e.cells() == 8 and e.ask("explorer.level") == "3"                    # 2 rows of 4
    e.changes(e.click(5))
    assert e.ask("explorer.part") == "5"
    e.changes(e.space(6))                                                       # by the keyboard too
    assert e.ask("explorer.part") == "6"
    e.changes(e.click(5))
    assert near(e.pixel(0, .255, .75), "#E69F00") and not near(e.pixel(0, .255, .25), "#E69F00")      # its left edge is framed, the part above it is not
    e.changes(e.button("other views"))
    for name in ("crop", "rotation", "jitter", "blur"): e.changes(e.tick(name), 1)
    assert e.ask("sorted(explorer.on)") == "[]"
    for key in ["ArrowRight"]*3 + ["ArrowLeft"]*5 + ["ArrowRight"]*2: e.changes(e.press(key))
    draws = int(e.ask("explorer.draws"))
    e.changes(e.press("ArrowLeft", times=3))
    e.page.wait_for_function("document.querySelectorAll('.adam-cells button').length === 1")
    assert e.ask("explorer.level") == "0" and int(e.ask("explorer.draws")) <= draws + 3      # the last value counts; nothing piles up
    e.changes(e.press("ArrowRight", times=1)); e.changes(e.press("ArrowRight")); e.changes(e.press("ArrowRight")); e.changes(e.click(2))
    e.page.wait_for_timeout(300)
    before = e.page.evaluate(SRC)
    e.enter("open", "nowhere.png")()
    e.page.wait_for_selector(".adam-explorer [role=alert]")
    assert "nowhere.png" in e.message() and e.page.evaluate(SRC) == before       # a sentence, and the picture stays
    e.changes(e.click(5))
    e.quiet()
    for name in ("crop", "rotation", "jitter", "blur"): e.changes(e.tick(name), 1)
    e.finish()


def test_pruner(lab):
    e = Explorer(lab, "pruner")
    assert e.cells() == 16
    e.changes(e.press("ArrowLeft", times=1), 2)
    assert e.ask("round(explorer.threshold, 2)") == "0.79"
    e.changes(e.click(10))
    assert e.ask("explorer.anchor") == "10"
    e.changes(e.enter("film", "7"), 1, 2)
    assert e.ask("explorer.anchor") == str(7*16 + 10)
    for cell in (0, 3, 6, 9, 12, 15, 5): e.changes(e.click(cell), 1, 2)
    for key in ["ArrowLeft"]*8 + ["ArrowRight"]*4: e.changes(e.press(key), 2)
    e.changes(e.choose("the same", "unknown"), 2)
    e.changes(e.choose("the same", "place"), 2)
    kept = int(e.ask("explorer.report['kept']"))
    e.changes(e.choose("checkpoint", "blurred"), 1, 2)
    assert e.ask("explorer.bank") == "blurred" and int(e.ask("explorer.report['kept']")) > kept      # alike parts are less alike there
    e.finish()


def test_correspondence(lab):
    e = Explorer(lab, "correspondence")
    assert e.cells() == 256
    first = e.page.locator(".adam-explorer .adam-cells button").first.element_handle()
    for cell in (0, 100, 37, 200, 255, 120, 9, 136): e.changes(e.click(cell))
    assert e.ask("explorer.point") == str(((136 % 16 + .5)/16, (136//16 + .5)/16))
    assert first.evaluate("b => b.isConnected")                                        # a click does not make 256 buttons anew
    assert near(e.pixel(0, 8.5/16, 8.5/16 - 9.5/440), "#E69F00", 90)                   # the ring is where the mouse was
    for key in ["ArrowRight"]*8 + ["ArrowLeft"]*4: e.changes(e.press(key), 0, 2)
    for key in ["ArrowRight"]*4: e.changes(e.press(key, slider=1), 0, 2)
    assert e.ask("round(100*explorer.point[1], 3)") == "55.625"
    e.changes(e.choose("to", "the same, turned"), 1, 2)
    e.changes(e.choose("to", "film 1"), 1, 2)
    e.enter("name", "hilum")()
    e.changes(e.button("pin"), 0, 1)
    e.changes(e.tick("in 10 patients"), 2)
    for cell in (40, 90, 150): e.changes(e.click(cell))
    e.enter("name", "apex")(); e.tick("click pins")()
    e.changes(e.click(53))                                                             # a click that pins, in the strip too
    assert e.ask("list(explorer.pins)") == "['hilum', 'apex']"
    e.changes(e.button("unpin")); e.tick("click pins")()
    e.enter("file", str(e.folder/"points.csv"))(); e.button("save points")()
    e.page.wait_for_function("document.querySelector('.adam-explorer [role=alert]') && document.querySelector('.adam-explorer [role=alert]').innerText.includes('points.csv')", timeout=60_000)
    lines = (e.folder/"points.csv").read_text().splitlines()
    assert len(lines) == 12 and lines[0].startswith("name,film,patient,x,y") and lines[1].startswith("hilum,0,")
    e.changes(e.choose("encoder", "untrained"), 1, 2)
    e.changes(e.click(60))
    e.finish()


def test_embedding(lab):
    e = Explorer(lab, "embedding")
    assert e.cells(0) == e.cells(1) == 576
    for cell in (0, 575, 300): e.changes(e.click(cell))
    e.changes(e.enter("point", "33"))
    assert e.ask("explorer.selected") == "33"
    for cell in (0, 23, 552, *range(29, 560, 41)): e.changes(e.click(cell, pad=1))
    e.changes(e.choose("right", "pixels"), 1, 2)
    e.changes(e.choose("right", "blocks"), 1, 2)
    e.changes(e.enter("point", "77"))
    for method in ("tsne", "pca"):
        e.changes(e.choose("map", method), 0, 1)                                # other places in both maps
        assert e.ask("explorer.projection") == method and e.ask("explorer.selected") == "77"
    e.enter("point", "999")()
    e.page.wait_for_selector(".adam-explorer [role=alert]")
    assert "no point 999" in e.message() and e.ask("explorer.selected") == "77"
    e.finish()


def test_embedding_of_parts(lab):
    "All parts of a level, by t-SNE from the start."
    e = Explorer(lab, "parts")
    assert e.ask("len(explorer.points)") == "160" and e.ask("explorer.projection") == "tsne"
    for cell in (0, 575, 300, *range(29, 560, 61)):
        e.changes(e.click(cell))
        assert e.ask("explorer.selected == explorer.nearest_at('pixels', *((v + .5)/24*1.1 - .05 for v in (%d, %d)))" % (cell % 24, 23 - cell//24)) == "True", cell
    for point in ("21", "100"):
        if e.ask("explorer.selected") != point: e.changes(e.enter("point", point))
        e.changes(e.choose("map", "pca" if point == "21" else "tsne"), 0, 1)
        assert e.ask("explorer.selected") == point and e.ask(f"explorer.points.label[{point}]") == f"part {int(point) % 8}"       # 8 parts a film
    e.finish()


def test_monitor(lab):
    import json
    run = lab[3]/"run"
    run.mkdir()
    def write(*lines):
        with open(run/"log.jsonl", "a") as f: f.writelines(json.dumps(v) + "\n" for v in lines)
    def step(k): return {"event": "step", "stage": 0, "step": k, "global_step": k, "loss": 7 - k/40, "chance": 6.9, "kept_fraction": 1 - k/900, "positive": .4 + k/400, "negative_mean": .1, "images_per_s": 60 + k % 7, "seconds": 2.1}
    write({"event": "stage_start", "stage": 0, "levels": [4], "global_step": 0, "steps": 200, "n_images": 512}, *(step(k) for k in range(10, 100, 10)))
    e = Explorer(lab, "monitor")
    e.changes(lambda: write(step(100), step(110)))                                       # another process writes, and the picture follows by itself
    assert e.ask("explorer.progress['step']") == "110"
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"): e.changes(e.press(key))
    e.changes(lambda: write("no event"))
    assert e.ask("explorer.follower.broken") == "1"
    e.tick("look every")()
    e.page.wait_for_timeout(1500)
    before = e.page.evaluate(SRC)
    write(step(120), {"event": "finished", "global_step": 120})
    e.page.wait_for_timeout(1500)
    assert e.page.evaluate(SRC) == before                                                # switched off: it waits to be asked
    e.changes(e.button("look again"))
    assert e.ask("explorer.progress['state']") == "finished"
    (run/"log.jsonl").unlink()
    e.changes(e.button("look again"))
    assert e.ask("explorer.progress['state']") == "waiting"                              # a run that is to begin again
    e.changes(lambda: write({"event": "stage_start", "stage": 0, "levels": [4], "global_step": 0, "steps": 200, "n_images": 512}, *(step(k) for k in range(10, 100, 10))) or e.button("look again")())
    e.enter("run", "/no/such/run")()
    e.page.wait_for_selector(".adam-explorer [role=alert]")
    assert "no run /no/such/run" in e.message()
    e.finish()


def test_what_cannot_be_opened_is_told_inside(lab):
    e = Explorer(lab, "broken", pictures=False)
    assert "damaged.png" in e.message()
    assert not e.page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']").count()
    e.page.close()
