"""The campaign: damaged inputs, kills, full disks, hostile files and odd shapes, drawn from a seed.

    python -m tests.campaign PART... [--count N] [--seed S] [--jobs J] [--work FOLDER]

from the root of the repository. PART is one of `PARTS`, or all of them. It prints a table for each part and,
for every failure that differs from the others, lines that show it again; the exit code is 1 if there was one.
A minute's sample of it runs in `make test` (tests/test_campaign.py).
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .core import Outcome, Part, Settings, distinct, table

# a part is a module here with `run(settings) -> Iterator[Outcome]`, and how many cases it draws unless told
PARTS = {"mutations": 20_000, "hostile": 80, "kills": 200, "disks": 60, "surroundings": 20, "shapes": 60}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=", ".join(PARTS))] = None,
    count: Annotated[int | None, typer.Option(help="cases of each part")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed draws the same cases")] = None,
    jobs: Annotated[int, typer.Option(help="processes at a time")] = 1,
    work: Annotated[Path | None, typer.Option(help="an empty folder; kept")] = None,
) -> None:
    """Run the parts and tell how they ended."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    failed = False
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        for name in parts or PARTS:
            folder = (work or Path(temporary)) / name
            folder.mkdir(parents=True)
            settings = Settings(count or PARTS[name], seed, folder, jobs)
            part: Part = import_module(f".{name}", __package__).run
            print(f"## {name}: {settings.count} cases, seed {seed}\n", flush=True)
            start = time.monotonic()
            outcomes = watched(part, settings)
            print(table(outcomes), f"\n\n{len(outcomes)} cases in {time.monotonic() - start:.0f} s\n")
            for bad in distinct(outcomes):
                print(f"### {bad.target}: {bad.verdict}\n\n{bad.detail}\n\n{bad.again}\n", flush=True)
            failed |= any(outcome.bad for outcome in outcomes)
    raise typer.Exit(int(failed))


def watched(part: Part, settings: Settings) -> list[Outcome]:
    """Its outcomes, with a line on standard error now and then."""
    outcomes, told = [], time.monotonic()
    for outcome in part(settings):
        outcomes.append(outcome)
        if outcome.bad or time.monotonic() - told > 30:
            told = time.monotonic()
            bad = sum(o.bad for o in outcomes)
            last = f"; {outcome.verdict}: {outcome.again}" if outcome.bad else ""
            print(f"{len(outcomes)} of {settings.count}, {bad} bad{last}", file=sys.stderr, flush=True)
    return outcomes


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
