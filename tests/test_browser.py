"The explorers in a real JupyterLab, opened by headless Chromium and moved by mouse and keyboard."
import os, secrets, shutil, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"), pytest.mark.timeout(300)]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NOTEBOOKS = {
    "decomposer": """from adam_nb.phantom import chest_phantom
from adam_nb.widgets import DecomposerExplorer
DecomposerExplorer(chest_phantom(0, 3, 256).image, level=2).widget""",
    "pruner": """from adam_nb.phantom import chest_phantom
from adam_nb.widgets import PrunerExplorer, cut_parts
films = [chest_phantom(0, i, 128).image for i in range(8)]
raw = cut_parts(films, 2, lambda x: (x - x.mean((1, 2, 3), keepdim=True)).flatten(1), size=16)
PrunerExplorer(raw, anchor=5).widget"""}


@contextmanager
def jupyter(folder: Path):
    "A JupyterLab on loopback with settings of its own; yields address and token."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token = secrets.token_hex(16)
    own = {k: str(folder/k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", f"--IdentityProvider.token={token}", "--ServerApp.port_retries=0",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", f"--ServerApp.root_dir={folder}", "--allow-root"]
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
        server.terminate(); server.wait(30)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    for name, source in NOTEBOOKS.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}), folder/f"{name}.ipynb")
    with jupyter(folder) as (address, token), playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser, address, token
        browser.close()


class Explorer:
    "A notebook that has been run in the browser, and the one picture of its explorer."
    def __init__(self, lab, name: str):
        browser, address, token = lab
        self.name, self.errors = name, []
        self.page = browser.new_page(viewport={"width": 1400, "height": 950})
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?token={token}&reset")
        self.page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext", timeout=90_000)
        self.page.evaluate("async () => { const c = window.jupyterapp.shell.currentWidget.sessionContext; await c.ready; await c.session.kernel.info; }")
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_selector(".jp-OutputArea img.widget-image", timeout=120_000)
        self.picture = self.page.locator(".jp-OutputArea img.widget-image").first
        self.page.wait_for_function("document.querySelector('.jp-OutputArea img.widget-image').naturalWidth > 100")

    def changes(self, move) -> float:
        "Seconds from a move to another picture; fails when the picture stays."
        before, start = self.picture.get_attribute("src"), time.perf_counter()
        move()
        self.page.wait_for_function("old => document.querySelector('.jp-OutputArea img.widget-image').src !== old", arg=before, timeout=20_000)
        return time.perf_counter() - start

    def keep(self):
        "A screenshot for people, where `ADAM_NB_SCREENSHOTS` names a folder."
        if folder := os.environ.get("ADAM_NB_SCREENSHOTS"): self.page.screenshot(path=f"{folder}/{self.name}.png")

    def finish(self):
        self.keep()
        mine = [e for e in self.errors if "favicon" not in e]
        assert not mine, mine
        assert not self.page.locator(".jp-OutputArea [data-mime-type='application/vnd.jupyter.error']").count()
        self.page.close()


def test_decomposer(lab):
    e = Explorer(lab, "decomposer")
    handle = e.page.locator(".jp-OutputArea .noUi-handle").first
    def right(): handle.focus(); e.page.keyboard.press("ArrowRight")
    by_key = e.changes(right)
    cells = e.page.locator(".jp-OutputArea .widget-gridbox button")
    assert cells.count() == 8                                       # level 3: 2 rows of 4
    by_mouse = e.changes(cells.nth(5).click)
    again = e.changes(e.page.locator(".jp-OutputArea button", has_text="other views").click)
    print(f"decomposer: slider {by_key:.2f} s, part {by_mouse:.2f} s, other views {again:.2f} s")
    e.finish()


def test_pruner(lab):
    e = Explorer(lab, "pruner")
    handle = e.page.locator(".jp-OutputArea .noUi-handle").first
    def left():
        handle.focus()
        for _ in range(5): e.page.keyboard.press("ArrowLeft")
    by_key = e.changes(left)
    box = e.page.locator(".jp-OutputArea input[type=number]").first
    def other(): box.fill("7"); box.press("Enter")
    by_number = e.changes(other)
    print(f"pruner: threshold {by_key:.2f} s, anchor {by_number:.2f} s")
    e.finish()
