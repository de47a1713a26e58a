"""README and docs as programs: their fenced blocks, and how each kind of block is run.

A block is not run where the line before it is `<!-- not run: REASON -->`. A block whose first line is a
comment with the name of a file (`# my.yaml`) is also written under that name, for the blocks after it.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import Outcome, built_once, invoke, settings, write_text
from tiny_recipes import DATA, save_model, tiny

import compress.run.recipe as recipes
from compress.run.pipeline import make
from compress.run.preflight import preflight

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what a console block may hold beside compress-lm: others' programs, and what tests run elsewhere
FOREIGN = {"python", "pip", "make", "torchrun", "accelerate", "vllm", "llama-cli", "llama-server"}
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def prepared(factory: pytest.TempPathFactory) -> Path:
    """A model and its text, once for all pages."""

    def build(folder: Path) -> None:
        save_model(folder / "model", write_text(folder / "text"))
        parts = sorted((folder / "text").iterdir())
        (folder / "my.txt").write_text("\n".join(part.read_text() for part in parts), encoding="utf-8")

    return built_once(factory, "docs-pages", build)


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            content.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in _FENCE.finditer(content)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a console block."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


def run_command(words: list[str], place: Path) -> Outcome:
    """`compress-lm WORDS`: recipes small, with nothing measured; the rest as it is written."""
    name, *rest = words
    if name == "run" and "--dry-run" not in rest:
        rest += ["--no-measure", *settings("threads=1", *(f"data.{k}={v}" for k, v in DATA.items()))]
    if name == "quantize" and "--no-measure" not in rest:
        rest += ["--no-measure", "--threads", "1"]
    read = recipes._read
    recipes._read = lambda source: tiny(read(source), place / "model", place / "my.txt")
    try:
        return invoke(name, *rest)
    finally:
        recipes._read = read


def run_recipe(content: dict[str, Any], folder: Path, place: Path) -> None:
    """Make every variant of a recipe, or of a part of one, small."""
    whole = {"name": "page", "model": {"checkpoint": "model"}, **content}
    small = tiny(whole, place / "model", place / "my.txt")
    if "create" in whole["model"]:
        small["model"] = whole["model"]
    recipe = recipes.Recipe.parse(small)
    folder.mkdir(parents=True)
    preflight(recipe, folder)
    make(recipe, folder, lambda line: None)


def run_page(page: Path, place: Path) -> list[str]:
    """Every block in order, in `place`, the current folder; what was left out, with reasons."""
    names: dict[str, Any] = {"__name__": "page"}
    left_out: list[str] = []
    for number, block in enumerate(blocks(page)):
        if block.reason is not None:
            left_out.append(f"{block}: {block.reason}")
            continue
        if named := re.match(r"# ([\w.-]+\.\w+)\n", block.text):
            (place / named[1]).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
        elif (block.language == "yaml" and page.parent.name != "recipes") or named:
            run_recipe(yaml.safe_load(block.text), place / f"made-{number}", place)
        elif block.language == "console":
            for words in commands(block.text):
                if words[0] == "compress-lm":
                    outcome = run_command(words[1:], place)
                    assert outcome.code == 0, f"{block}: {' '.join(words)}\n{outcome.err}"
    return left_out
