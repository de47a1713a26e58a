"""README and docs are run: Python, recipes, commands; links, names and sentences are checked."""

import re
import shutil
from pathlib import Path
from typing import Any

import doc_pages
import pytest
import typer
from cli_helpers import built_once
from doc_pages import FOREIGN, PAGES, ROOT, blocks, commands
from test_cli_demo import run_demo

from compress.cli.commands import app
from compress.measure import harness
from compress.records.protocol import MeasureProtocol
from compress.records.results import Result
from compress.run.recipe import shipped
from compress.run.registry import names
from compress.text.windows import Windows

DOCS = ROOT / "docs"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOT_RUN = 7  # blocks that need a network, a GPU, a server or several processes; keep them few


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def place(page_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages suppose it, with what `make demo` left."""
    demo = built_once(tmp_path_factory, "demo", run_demo) / "run"
    shutil.copytree(demo, page_folder / "runs/demo", ignore=shutil.ignore_patterns(".steps", ".work"))
    (page_folder / "runs/demo/.steps").mkdir()  # by which a run is known
    return page_folder


RUNNABLE = [
    page
    for page in PAGES
    if any(block.language in ("python", "yaml", "console") for block in blocks(page))
    and page.stem not in shipped()  # recipes' own pages: test_recipes_shipped.py runs them
]


@pytest.fixture
def _little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many turns as ever, of shorter prompts, by one thread; few windows where a page names no number."""
    whole = harness.measure

    def short(targets: Any, base: Any, windows: Any, protocol: Any = None, **more: Any) -> Any:
        less = MeasureProtocol(threads=1, prefill_tokens=16)
        few = Windows(windows.tokens[:4], windows.bytes, windows.sha256)
        return whole(targets, base, few, less, **more)

    monkeypatch.setattr(harness, "measure", short)
    monkeypatch.setattr("compress.api.usable_cores", lambda: 1)


@pytest.mark.usefixtures("_little_is_measured")
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_a_page_runs(page: Path, place: Path) -> None:
    for line in doc_pages.run_page(page, place):
        print("left out:", line)


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    marked = [block for page in PAGES for block in blocks(page) if block.reason is not None]
    nowhere = [block for block in marked if not str(block.reason).startswith("tests/")]
    assert len(nowhere) <= NOT_RUN, [str(block) for block in nowhere]
    for block in marked:
        assert block in nowhere or (ROOT / str(block.reason).split()[0]).is_file(), str(block)
    written = sum(page.read_text(encoding="utf-8").count("<!-- not run") for page in PAGES)
    assert written == len(marked), "a mark that stands before no block"


def test_commands_and_their_options_exist() -> None:
    shown: set[str] = set()
    for block in [b for page in PAGES for b in blocks(page) if b.language == "console"]:
        for words in commands(block.text):
            assert words[0] in FOREIGN | {"compress-lm", "."}, f"{block}: {words[0]}"
            if words[0] == "compress-lm":
                options = COMMANDS[words[1]].params
                known = {option for p in options for option in [*p.opts, *p.secondary_opts]}
                assert {w for w in words if re.match(r"--?[a-z]", w)} <= known, f"{block}: {words}"
                shown.add(words[1])
            if words[:2] == ["make", words[-1]]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), str(block)
    assert shown | {"quantize"} >= set(COMMANDS), "a command that no page shows"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        assert "://" in link or (page.parent / link).exists(), link
    for file in re.findall(
        r"`(?:python )?((?:benchmarks|compress/run/recipes|notebooks|tests)/[\w./-]+)", text
    ):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_passes_and_recipes_that_are_named_exist(page: Path) -> None:
    known, text = set(names()), page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:quantize|prune|tune|export|fold|store|round)_[a-z_]+)[`:]", text):
        assert name in known or name == "prune_random", name


def test_every_recipe_that_is_shipped_is_named() -> None:
    index = (DOCS / "recipes/index.md").read_text(encoding="utf-8")
    assert [name for name in shipped() if f"[{name}]" not in index and f"`{name}`" not in index] == []


def prose(text: str) -> str:
    """A page without blocks, tables, headings, code, links' targets and generated parts."""
    text = re.sub(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", ".", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\||#|<).*$", ".", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"`[^`]*`", "x", text)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "results.md"], ids=name_of)
def test_no_sentence_has_more_than_two_numbers(page: Path) -> None:
    for paragraph in re.split(r"\n\s*\n|\n- ", prose(page.read_text(encoding="utf-8"))):
        for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
            found = re.findall(r"(?<![\w.,-])[−-]?\d[\d,.:]*\b(?![-\w])", sentence)
            assert len(found) <= 2, f"{found}: {' '.join(sentence.split())}"


def test_the_tree_of_architecture_exists() -> None:
    (block,) = (b for b in blocks(DOCS / "architecture.md") if b.language == "text")
    paths: list[Path] = []
    parents: list[str] = []
    for line in block.text.splitlines():  # two columns of indentation are one level
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        paths.append(Path(*parents))
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []
    told = re.findall(r"`(\w+/[\w/]+\.py)`", (DOCS / "architecture.md").read_text(encoding="utf-8"))
    assert [path for path in told if not (ROOT / "compress" / path).exists()] == []
    shown = {ROOT / path for path in paths}
    folders = {p.parent for p in (ROOT / "compress").glob("*/__init__.py")}
    assert {str(p.relative_to(ROOT)) for p in folders - shown} == set()


@pytest.fixture
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files import each other by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.usefixtures("_benchmarks")
def test_generated_pages_are_what_the_benchmarks_left() -> None:
    import docs_results
    import recipe_pages
    from readme_table import insert

    assert (DOCS / "results.md").read_text(encoding="utf-8") == docs_results.page()
    for name in docs_results.NOTES:
        text = (DOCS / f"notes/{name}.md").read_text(encoding="utf-8")
        assert docs_results.note(name, text) == text
    for recipe, line in recipe_pages.lines().items():
        text = (DOCS / f"recipes/{recipe}.md").read_text(encoding="utf-8")
        assert insert(text, recipe_pages.block(line)) == text


def test_every_field_of_results_is_explained() -> None:
    page = (DOCS / "measuring.md").read_text(encoding="utf-8")
    assert [name for name in Result.model_fields if f"`{name}`" not in page] == []


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p for page in DOCS.rglob("*.md") if (p := page.relative_to(DOCS).as_posix()) not in config] == []
