"""The page in headless Chromium: it draws, it sorts, it asks the network for nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_records import demo_run

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


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(render(*demo_run())[0], encoding="utf-8")
    (folder / "compare.html").write_text(compare([demo_run("one"), demo_run("two")]), encoding="utf-8")
    return folder


def dom(page: Path, profile: Path, address_end: str = "") -> str:
    """The document after its scripts ran; fails on any console message, refused requests among them."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri() + address_end],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    return done.stdout


def with_script(page: Path, script: str) -> Path:
    """A copy of the page that runs one more script at its end."""
    # the last end tag is the page's own; Plotly's script holds others
    before, after = page.read_text(encoding="utf-8").rsplit("</body>", 1)
    driven = page.with_name("driven.html")
    driven.write_text(f"{before}<script>{script}</script></body>{after}", encoding="utf-8")
    return driven


def rows(html: str) -> list[str]:
    """ "variant runtime" of each measured row, top to bottom."""
    table = html[html.index('<table id="results"') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    cells = [re.findall(r"<t[hd][^>]*>([^<]*)", row) for row in body.split("<tr")[1:]]
    return [f"{row[0]} {row[1]}" for row in cells]


def test_plots_are_drawn_and_nothing_is_requested(pages: Path, tmp_path: Path) -> None:
    script = 'document.body.dataset.requests = performance.getEntriesByType("resource").length'
    html = dom(with_script(pages / "report.html", script), tmp_path / "profile")
    assert 'data-requests="0"' in html
    plots = html.split('data-plot="')[1:]
    assert len(plots) == 4
    for plot in plots:
        assert "main-svg" in plot
        assert "scatterlayer" in plot
    assert re.search(r'class="annotation-text[^>]*>[^<]*student-int4', plots[0])


def test_sorting_by_address(pages: Path, tmp_path: Path) -> None:
    html = dom(pages / "report.html", tmp_path / "profile", "#sort=kl,desc")
    assert 'data-key="kl" aria-sort="descending"' in html
    assert len(re.findall(r'<th[^>]* aria-sort="none"', html)) == 15
    order = rows(html)
    assert order[0] == "pruned PyTorch"
    assert order[-2:] == ["base PyTorch", "base ONNX Runtime"]
    assert html.index("Kneser-Ney trigram</th>") > html.index('class="references"')


def test_sorting_by_click_and_switching_a_picture(pages: Path, tmp_path: Path) -> None:
    script = """
      const button = document.querySelector('th[data-key="decode"] button');
      button.click(); button.click();
      document.querySelector('input[name="speed"][value="prefill"]').click();
      document.querySelector('input[name="scale"][value="linear"]').click();
    """
    html = dom(with_script(pages / "report.html", script), tmp_path / "profile")
    assert 'data-key="decode" aria-sort="descending"' in html
    assert rows(html)[0] == "student-int4 ONNX Runtime"
    assert "prefill (tokens/s)</text>" in html
    assert "decode (tokens/s)</text>" not in html


def test_comparison_is_drawn(pages: Path, tmp_path: Path) -> None:
    html = dom(pages / "compare.html", tmp_path / "profile")
    assert html.count("one, PyTorch</text>") == 2
    assert html.count("two, ONNX Runtime</text>") == 2
