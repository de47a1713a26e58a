"""The page in headless Chromium: it switches, sorts, fits, is legible, and asks the network for nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import label_records
import pytest
from report_records import Records

from compress.report import compare, render

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH (chromium, chromium-browser, google-chrome): page not driven"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
)


DARK = "--blink-settings=preferredColorScheme=0"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, records: Records, labelled_runs: Path) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name in ("topics", "words"):
        (folder / f"{name}.html").write_text(render(*label_records.load(labelled_runs, name))[0], "utf-8")
    (folder / "report.html").write_text(render(*records)[0], encoding="utf-8")
    (folder / "compare.html").write_text(
        compare([records.named("one"), records.named("two")]), encoding="utf-8"
    )
    return folder


def dom(page: Path, profile: Path, address_end: str = "", *flags: str) -> str:
    """The document after its scripts ran; fails on any console message, refused requests among them."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri() + address_end],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout


def with_script(page: Path, script: str) -> Path:
    """A copy of the page that runs one more script once its own is ready."""
    before, after = page.read_text(encoding="utf-8").rsplit("</body>", 1)
    driven = page.with_name("driven.html")
    waiting = f"""
      const waiting = setInterval(() => {{
        if (!document.documentElement.classList.contains("ready")) return;
        clearInterval(waiting);
        {script}
      }}, 20);
    """
    driven.write_text(f"{before}<script>{waiting}</script></body>{after}", encoding="utf-8")
    return driven


def noted(html: str, name: str) -> str:
    """What a script wrote into `document.body.dataset`."""
    match = re.search(rf'<body[^>]* data-{name}="([^"]*)"', html)
    assert match, f"the script did not get as far as {name}"
    return match[1]


def rows(html: str) -> list[str]:
    """ "variant runtime" of each measured row, top to bottom."""
    table = html[html.index('<table id="results"') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in body.split("<tr")[1:]]
    return [f"{row[0]} {row[1]}" for row in cells]


def test_nothing_is_requested(pages: Path, tmp_path: Path) -> None:
    script = 'document.body.dataset.requests = performance.getEntriesByType("resource").length'
    assert noted(dom(with_script(pages / "report.html", script), tmp_path / "profile"), "requests") == "0"


def test_a_browser_that_cannot_unpack_still_shows_pictures(pages: Path, tmp_path: Path) -> None:
    text = (pages / "report.html").read_text(encoding="utf-8")
    page = tmp_path / "old.html"
    page.write_text(
        text.replace("<main>", "<script>delete window.DecompressionStream</script><main>"), encoding="utf-8"
    )
    html = dom(page, tmp_path / "profile")
    assert 'class="ready"' not in html
    plots = html.split('data-plot="')[1:]
    assert len(plots) == 5
    assert all("<use" in plot or "<path" in plot for plot in plots)


def test_sorting_by_address(pages: Path, tmp_path: Path, records: Records) -> None:
    html = dom(pages / "report.html", tmp_path / "profile", "#sort=kl,desc")
    assert 'data-key="kl" aria-sort="descending"' in html
    assert len(re.findall(r'<th[^>]* aria-sort="none"', html)) == 15
    names = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}
    falling = sorted(records.results, key=lambda result: -(result.kl_to_base or 0.0))
    assert rows(html) == [f"{r.variant} {names[r.runtime]}" for r in falling]
    assert html.index("Kneser-Ney trigram</th>") > html.index('class="references"')


def test_sorting_by_click_and_switching_a_picture(pages: Path, tmp_path: Path) -> None:
    script = """
      const button = document.querySelector('th[data-key="decode"] button');
      button.click(); button.click();
      document.querySelector('input[name="speed"][value="prefill"]').click();
      document.querySelector('input[name="quality"][value="nll"]').click();
    """
    html = dom(with_script(pages / "report.html", script), tmp_path / "profile")
    assert 'data-key="decode" aria-sort="descending"' in html
    assert rows(html)[0] == "int4 ONNX Runtime"
    assert 'aria-label="NLL (nats) against prefill (tokens/s)"' in html
    assert "decode (tokens/s)<span>" not in html
    assert 'aria-label="NLL (nats) against on disk (MB)"' in html


def test_a_point_is_told_of_and_a_series_is_switched_off(
    pages: Path, tmp_path: Path, records: Records
) -> None:
    script = """
      const plot = document.querySelector('[data-plot="size"]');
      const point = () => plot.querySelector('[data-of="1"] use').getBoundingClientRect();
      const ask = (box) => plot.querySelector(".area").dispatchEvent(new PointerEvent("pointermove",
        { bubbles: true, clientX: box.left + box.width / 2 + 3, clientY: box.top + box.height / 2 }));
      const box = point(), bubble = document.querySelector(".bubble");
      ask(box);
      document.body.dataset.records = bubble.innerText.replaceAll("\\n", " | ");
      document.querySelectorAll(".legend button[data-series='1']").forEach((button) => button.click());
      document.body.dataset.shown = plot.querySelector('[data-of="1"]').style.display;
      document.querySelector('input[name="scale"][value="linear"]').click();
      document.body.dataset.still = plot.querySelector('[data-of="1"]').style.display;
    """
    html = dom(with_script(pages / "report.html", script), tmp_path / "profile")
    line = records.result("base", "onnxruntime")
    said = noted(html, "records")
    assert said.startswith("base · ONNX Runtime | ")
    assert f"perplexity {line.perplexity:.1f}" in said
    assert "decode 900 tokens/s" in said
    assert noted(html, "shown") == noted(html, "still") == "none"


@pytest.mark.parametrize("name", ["report", "compare", "topics"])
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_but_tables_scrolls_sideways(pages: Path, tmp_path: Path, name: str, width: int) -> None:
    script = """
      const outside = Array.from(document.querySelectorAll("main *")).filter((element) =>
        !element.closest(".scroll, svg, pre") && element.getBoundingClientRect().right > innerWidth + 1);
      parent.postMessage({ width: document.documentElement.scrollWidth, outside: outside.length,
        chart: document.querySelector(".area").clientWidth }, "*");
    """
    driven = with_script(pages / f"{name}.html", script)
    frame = tmp_path / "frame.html"  # a window has no less than 500 pixels; a frame has what it is given
    frame.write_text(
        f'<iframe src="{driven.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>onmessage = (event) => Object.assign(document.body.dataset, event.data);</script>"
    )
    html = dom(frame, tmp_path / "profile", "", "--window-size=1400,1000")
    assert int(noted(html, "width")) <= width
    assert noted(html, "outside") == "0"
    assert int(noted(html, "chart")) >= 300


@pytest.mark.parametrize("name", ["report", "words"])
@pytest.mark.parametrize("flag", ["", DARK], ids=["light", "dark"])
def test_all_text_is_legible(pages: Path, tmp_path: Path, flag: str, name: str) -> None:
    """WCAG 2's contrast of at least 4.5 between each text and what it stands on."""
    script = """
      document.querySelectorAll("details").forEach((element) => { element.open = true; });
      const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const light = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4))
        .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
      const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
          const colour = getComputedStyle(at).backgroundColor, alpha = channels(colour)[3];
          if (alpha === undefined || alpha > 0) return colour;
        }
        return "rgb(255, 255, 255)";
      };
      const poor = new Set();
      let count = 0;
      document.querySelectorAll("main *").forEach((element) => {
        const text = Array.from(element.childNodes).some((n) => n.nodeType === 3 && n.data.trim());
        if (!text) return;
        const style = getComputedStyle(element);
        const pair = [element instanceof SVGElement ? style.fill : style.color, ground(element)];
        const [dim, bright] = pair.map(light).sort((a, b) => a - b);
        count += 1;
        if ((bright + .05) / (dim + .05) < 4.5) poor.add(`${element.tagName}.${element.className} ${pair}`);
      });
      document.body.dataset.count = count;
      document.body.dataset.poor = Array.from(poor).join("; ");
      document.body.dataset.surface = getComputedStyle(document.body).backgroundColor;
    """
    html = dom(with_script(pages / f"{name}.html", script), tmp_path / "profile", "", *filter(None, [flag]))
    assert int(noted(html, "count")) > 100
    assert ("<mark>" in html) == (name == "words")
    assert noted(html, "poor") == ""
    assert noted(html, "surface") == ("rgb(20, 24, 28)" if flag else "rgb(255, 255, 255)")


def test_comparison_is_drawn(pages: Path, tmp_path: Path) -> None:
    html = dom(pages / "compare.html", tmp_path / "profile")
    for series in ("one, PyTorch", "two, ONNX Runtime"):
        assert html.count(f"</svg>{series}</button>") == 2


def test_a_text_that_is_code_does_not_run(pages: Path, tmp_path: Path) -> None:
    """Labelled texts with a tag that would open a box, which would say so on the console."""
    script = """
      window.alert = () => console.error("ran");
      document.querySelectorAll("details").forEach((element) => { element.open = true; });
      document.body.dataset.scripts = document.querySelectorAll("main script").length;
    """
    html = dom(with_script(pages / "topics.html", script), tmp_path / "profile")
    assert noted(html, "scripts") == "0"
    assert "&lt;script&gt;alert(" in html
