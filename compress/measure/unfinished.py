"""What a measurement has learnt so far, in a file: one that is cut off goes on from there.

The turns of timing are kept when the last has ended and are taken up together or not at all, since speeds
compare only where they were interleaved; scores, part by part of the windows. Results of variants are kept by
whoever asked for them (`measure(on_result=...)`), those of steps here.

Limits: what was learnt under another protocol, on another machine or with other versions counts for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.host.files import RECORDS_BYTES, read_json
from compress.measure.latency import Samples, Timing
from compress.measure.quality import Scores
from compress.records.base import write_whole
from compress.records.results import Result


class Unfinished:
    """Timings by the names of their targets, and results of steps by fingerprint; `file` None keeps nothing.

    `common`: protocol, machine and versions.
    """

    def __init__(self, file: Path | None, common: Mapping[str, Any]) -> None:
        self._file, self._common = file, dict(common)
        self._timings: dict[str, Timing] = {}
        self._steps: dict[str, Result] = {}
        self._scores: dict[str, Scores] = {}  # by target and part
        if file is not None and file.is_file():
            # written by another version, or damaged: then there is nothing to go on from
            with suppress(UserError, ValueError, TypeError, KeyError, AttributeError):
                self._read(read_json(file, most=RECORDS_BYTES))

    def timings(self, names: Sequence[str]) -> dict[str, Timing] | None:
        """Those of all these targets, timed in turn with each other; None where one is missing."""
        if not all(name in self._timings for name in names):
            return None
        return {name: self._timings[name] for name in names}

    def keep_timings(self, timings: Mapping[str, Timing]) -> None:
        """All turns have ended."""
        self._timings = dict(timings)
        self._write()

    def step(self, fingerprint: str) -> Result | None:
        """The result of a step that was scored before."""
        return self._steps.get(fingerprint)

    def keep_step(self, result: Result) -> None:
        """A step has been scored."""
        self._steps[result.fingerprint] = result
        self._write()

    def scored(self, name: str, part: range) -> Scores | None:
        """What a target scored on a part of the windows."""
        return self._scores.get(f"{name} {part.start} {part.stop}")

    def keep_scores(self, name: str, part: range, scores: Scores) -> None:
        """A target has been scored on a part."""
        self._scores[f"{name} {part.start} {part.stop}"] = scores
        self._write()

    def _read(self, found: Any) -> None:
        if found["common"] != self._common:
            return
        timings = {
            name: Timing(**{**timing, "rounds": [Samples(**samples) for samples in timing["rounds"]]})
            for name, timing in found["timings"].items()
        }
        steps = [Result.model_validate(line) for line in found["steps"]]
        self._scores = {name: Scores(**scores) for name, scores in found["scores"].items()}
        self._timings, self._steps = timings, {step.fingerprint: step for step in steps}

    def _write(self) -> None:
        if self._file is None:
            return
        content = {
            "common": self._common,
            "timings": {name: asdict(timing) for name, timing in self._timings.items()},
            "scores": {name: asdict(scores) for name, scores in self._scores.items()},
            "steps": [step.model_dump(mode="json") for step in self._steps.values()],
        }
        write_whole(self._file, json.dumps(content))
