"""What a reader sees in a real browser: JupyterLab, Voila and the built site (pytest -m browser).

Needs Chromium and `pip install -e '.[dev,browser,docs]'`. Set FAIRMIX_SHOTS to a folder to keep
the screenshots.
"""

import base64
import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from fairmix_nb.mend import risks_at

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "docs")]
import book  # noqa: E402

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update"""
    "--disable-sync --mute-audio"
).split()
LOCAL = re.compile(r"^(data:|blob:|about:|(https?|wss?)://(127\.0\.0\.1|localhost)[:/])")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, request):
    "A page that knows what it logged and what it asked of other hosts; a screenshot at the end."
    context = browser.new_context(viewport=dict(width=1280, height=900))
    made = context.new_page()
    made.set_default_timeout(60_000)
    made.errors, made.abroad = [], []
    made.on("console", lambda m: made.errors.append(m.text) if m.type == "error" else None)
    made.on("pageerror", lambda e: made.errors.append(str(e)))
    made.on("request", lambda r: None if LOCAL.match(r.url) else made.abroad.append(r.url))
    yield made
    keep(made, re.sub(r"\W+", "_", request.node.name))
    context.close()


def keep(page, name):
    if folder := os.environ.get("FAIRMIX_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url, process, seconds=90):
    end = time.time() + seconds
    while time.time() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=2).read()
            return
        except urllib.error.HTTPError:  # it answers
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{url} did not answer in {seconds} s")


def stop(process):
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()


def notebook(path, *sources):
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None)
        for i, s in enumerate(sources)
    ]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))


MENDED = """import numpy as np
from fairmix_nb.mend import explore, mend_at
rng, y = np.random.default_rng(0), np.arange(10_000) % 10
m = 1.5 + 0.1 * y[:, None] + rng.normal(size=(10_000, 10))
m[np.arange(10_000), y] = np.inf
explore(mend_at(m, y))"""


def workplace(top) -> dict:
    """A copy of the notebooks without their flagged cells and outputs, the tools beside it, and an
    environment of its own."""
    shutil.copytree(ROOT / "nbs", top / "nbs")
    (top / "tools").symlink_to(ROOT / "tools")
    for path in (top / "nbs").glob("*.ipynb"):
        nb = json.loads(path.read_text())
        nb["cells"] = [
            c
            for c in nb["cells"]
            if not {"slow", "cuda"} & book.directives(c).keys()
            and book.directives(c).get("eval") != "false"
        ]
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        path.write_text(json.dumps(nb))
    notebook(
        top / "nbs" / "bars.ipynb",
        "from fairmix_nb import TrainCfg, build, fit, load",
        "cfg = TrainCfg(eps=.1, epochs=12, batch=64)\ndone = fit(build('small_cnn', 10, 1), load('digits'), cfg)\ndone.record['epochs_done']",
        "endless = TrainCfg(eps=.1, epochs=9999, batch=64)\nfit(build('small_cnn', 10, 1), load('digits'), endless)",
        "6 * 7",
    )
    notebook(top / "nbs" / "explore.ipynb", "from fairmix_nb.synthetic import explore\nexplore()")
    notebook(top / "nbs" / "mend.ipynb", MENDED)
    settings = top / "settings" / "@jupyterlab"
    for name, value in {
        "notebook-extension/tracker": dict(windowingMode="none"),
        "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
    }.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(value))
    own = {f"JUPYTER_{k}_DIR": str(top / k.lower()) for k in ("CONFIG", "RUNTIME")}
    own |= dict(
        JUPYTERLAB_SETTINGS_DIR=str(top / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(top / "workspaces"),
        IPYTHONDIR=str(top / "ipython"),
    )
    env = {
        k: v for k, v in os.environ.items() if k not in ("IN_TEST", "TQDM_DISABLE", "MPLBACKEND")
    }
    return (
        env
        | own
        | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", FAIRMIX_CACHE=str(top / "cache"))
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    top = tmp_path_factory.mktemp("browser")
    return top, workplace(top)


@pytest.fixture(scope="module")
def lab(place):
    top, env = place
    port = free_port()
    argv = [
        shutil.which("jupyter-lab") or pytest.skip("no JupyterLab"),
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={top / 'nbs'}",
    ]
    with open(top / "lab.log", "w") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    wait_for(url + "/api", process)
    yield url
    stop(process)


# --- JupyterLab ----------------------------------------------------------------------------

WAIT = """async () => {
  const app = window.jupyterapp; await app.restored;
  const until = async (f) => { for (let i = 0; i < 400; i++) { if (f()) return; await new Promise(r => setTimeout(r, 150)); } throw 'too long: ' + f; };
  await until(() => app.shell.currentWidget && app.shell.currentWidget.context && app.shell.currentWidget.context.isReady);
  const s = app.shell.currentWidget.sessionContext;
  await until(() => s.session && s.session.kernel && s.session.kernel.connectionStatus === 'connected' && s.session.kernel.status === 'idle');
}"""
OUTPUTS = """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code').map(w => ({
  source: w.model.sharedModel.getSource(), count: w.model.executionCount, outputs: w.model.outputs.toJSON()}))"""


IDLE = """async () => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  for (let i = 0; i < 2000 && k.status !== 'idle'; i++) await new Promise(r => setTimeout(r, 100)); }"""

DONE = "(i) => window.jupyterapp.shell.currentWidget.content.widgets[i].model.executionCount"


def open_notebook(page, lab, name):
    page.goto(f"{lab}/lab/tree/{name}?reset")
    page.wait_for_function("() => window.jupyterapp")
    page.evaluate(WAIT)


def close_notebook(page):
    page.evaluate(
        """async () => { const w = window.jupyterapp.shell.currentWidget; await w.context.save();
        await w.sessionContext.shutdown(); }"""
    )


def run_all(page, seconds):
    page.evaluate(
        """(ms) => Promise.race([window.jupyterapp.commands.execute('notebook:run-all-cells'),
                     new Promise((_, no) => setTimeout(() => no('not finished'), ms))])""",
        seconds * 1000,
    )
    page.evaluate(IDLE)


def wrong(cells):
    return [
        (c["source"][:80], str(o)[:300])
        for c in cells
        for o in c["outputs"]
        if o["output_type"] == "error" or o.get("name") == "stderr"
    ]


@pytest.mark.parametrize("path", book.chapters(), ids=lambda p: p.stem)
def test_a_chapter_runs_from_top_to_bottom_in_jupyterlab(page, lab, path):
    open_notebook(page, lab, path.name)
    run_all(page, 240)
    cells = page.evaluate(OUTPUTS)
    assert not wrong(cells), wrong(cells)[:2]
    assert all(c["count"] for c in cells if c["source"].strip()), [
        c["source"][:60] for c in cells if not c["count"]
    ][:2]
    assert (
        any("image/png" in o.get("data", {}) for c in cells for o in c["outputs"])
        and page.locator(".jp-RenderedImage img").count()
    )
    keep(page, f"lab_{path.stem}")
    close_notebook(page)


def sliders_change_label_and_picture(page, where):
    "Move the first slider by keyboard; its number and the picture must both follow."
    page.wait_for_selector(f"{where} .noUi-handle", state="attached")
    handle, picture = (
        page.locator(f"{where} .noUi-handle").first,
        page.locator(f"{where} .widget-image, {where} .widget-html:has(svg)").first,
    )
    handle.scroll_into_view_if_needed()
    readout = page.locator(f"{where} .widget-readout").first
    drawn = "e => e.outerHTML + (e.src || '')"
    before = readout.inner_text(), picture.evaluate(drawn)
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    for _ in range(100):
        after = readout.inner_text(), picture.evaluate(drawn)
        if after[0] != before[0] and after[1] != before[1]:
            return before[0], after[0]
        page.wait_for_timeout(100)
    raise AssertionError((before[0], after[0], before[1] == after[1]))


def test_the_explorer_moves_in_jupyterlab(page, lab):
    open_notebook(page, lab, "explore.ipynb")
    run_all(page, 60)
    sliders_change_label_and_picture(page, ".jp-OutputArea")
    assert "gap" in page.locator(".jp-OutputArea .widget-html").first.inner_text()
    keep(page, "lab_explorer")
    close_notebook(page)


def test_a_network_is_mended_by_hand_in_jupyterlab(page, lab):
    open_notebook(page, lab, "mend.ipynb")
    run_all(page, 60)
    sliders_change_label_and_picture(page, ".jp-OutputArea")
    told = page.locator(".jp-OutputArea .widget-html:has(svg)").first
    assert "worst class" in told.inner_text() and told.locator("circle").count() == 1
    keep(page, "lab_mend")
    close_notebook(page)


def test_bars_finish_and_an_interrupted_training_leaves_the_kernel_usable(page, lab):
    open_notebook(page, lab, "bars.ipynb")
    run = "(i) => { const w = window.jupyterapp.shell.currentWidget.content; w.activeCellIndex = i; return window.jupyterapp.commands.execute('notebook:run-cell'); }"
    begin, bar = (
        run.replace("return ", "void "),
        page.locator(".jp-OutputArea .widget-hprogress, .jp-OutputArea .jupyter-widgets-progress"),
    )
    page.evaluate(run, 0)
    page.evaluate(begin, 1)
    bar.first.wait_for(state="visible")
    page.wait_for_function(
        "() => /[1-9]\\d?\\/12/.test(document.querySelector('.jp-Notebook').innerText)"
    )
    keep(page, "lab_bar_moves")
    page.wait_for_function(DONE, arg=1)
    assert (
        page.evaluate(OUTPUTS)[1]["outputs"][-1]["data"]["text/plain"] == "12" and not bar.count()
    )  # it leaves when it is done
    page.evaluate(begin, 2)
    bar.first.wait_for(state="visible")
    page.wait_for_timeout(2000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    page.wait_for_function(DONE, arg=2)
    page.evaluate(run, 3)
    cells = page.evaluate(OUTPUTS)
    stopped = [o for o in cells[2]["outputs"] if o["output_type"] == "error"]
    assert (
        stopped
        and stopped[0]["ename"] == "KeyboardInterrupt"
        and "stopped in epoch" in stopped[0]["evalue"]
    ), cells[2]["outputs"]
    assert cells[3]["outputs"][0]["data"]["text/plain"] == "42"
    keep(page, "lab_interrupted")
    close_notebook(page)


# --- Voila ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["explore", "mend"])
def test_the_explorer_moves_under_voila(page, place, name):
    top, env = place
    voila, port = shutil.which("voila") or pytest.skip("no Voila"), free_port()
    with open(top / "voila.log", "w") as log:
        process = subprocess.Popen(
            [voila, f"{name}.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"],
            cwd=top / "nbs",
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/voila/static/voila.js", process)
        page.goto(f"http://127.0.0.1:{port}/")
        sliders_change_label_and_picture(page, "body")
    finally:
        stop(process)


# --- the site ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    import build

    out = Path(os.environ.get("FAIRMIX_SITE") or tmp_path_factory.mktemp("site") / "html")
    if not (out / "index.html").exists():
        assert build.build(out) == []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(out))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize(
    "name",
    [
        "index",
        *(p.stem for p in book.chapters()),
        "map",
        "errata",
        "names",
        "glossary",
        "bibliography",
        "mend_explorer",
        *(f"modules/{m}" for m in book.modules()),
    ],
)
def test_a_page_of_the_site_needs_no_network_and_shows_its_formulas(page, site, name):
    page.goto(f"{site}/{name}.html")
    page.evaluate("() => window.MathJax && MathJax.startup ? MathJax.startup.promise : null")
    written, shown, failed = (
        page.locator(css).count() for css in (".math", "mjx-container", "mjx-merror")
    )
    assert shown >= written > 0 or not written, (written, shown)
    assert not failed and not page.errors and not page.abroad, (failed, page.errors, page.abroad)
    broken = page.evaluate(
        "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    )
    assert not broken, broken
    if name in ("03_theory", "05_tempering"):
        assert shown > 100


def test_a_network_is_mended_by_hand_on_the_site(page, site):
    "What the page says is what Python says of the numbers that its sliders show."
    import build

    data = json.loads(build.mend_data().removeprefix("window.MEND = ").rstrip(";\n"))
    y = np.array(data["y"])
    m = np.frombuffer(base64.b64decode(data["margins"]), np.float16).reshape(len(y), -1)
    page.goto(f"{site}/mend_explorer.html")
    said, seen = page.locator("#said"), []

    def agrees():
        b = page.evaluate("[...document.querySelectorAll('#sliders input')].map(e => +e.value)")
        r = risks_at(m.astype(float), y, np.array(b))
        told = [float(v) for v in re.findall(r"([\d.]+) %", said.inner_text())]
        assert np.allclose([told[0], told[2]], [100 * r.max(), 100 * r.mean()], atol=0.15), told
        dot = page.locator("#here")
        seen.append((told[0], dot.get_attribute("cx"), dot.get_attribute("cy")))

    for name in data["choices"]:
        page.locator("#choice").select_option(name)
        agrees()
    page.locator("#sliders input").first.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    agrees()
    assert len(set(seen)) >= len(data["choices"])  # numbers and dot move
    each = page.evaluate(
        "() => { const t = performance.now(); for (let i = 0; i < 20; i++) draw(); "
        "return (performance.now() - t) / 20; }"
    )
    print(f"a frame for {len(y)} images: {each:.1f} ms")
    assert each * 10_000 / len(y) < 50  # every image costs the same
    assert not page.errors and not page.abroad
    page.locator("#clean").check()
    keep(page, "site_mend")


def test_the_site_finds_tempering(page, site):
    page.goto(f"{site}/index.html")
    page.locator("input.sidebar-search").fill("tempering")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert (
        "It was prior tempering" in page.locator("#search-results").inner_text() and not page.abroad
    )
