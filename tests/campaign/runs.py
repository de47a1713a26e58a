"""Tiny runs of every kind of step, what a finished one holds, and the processes that they run in.

`Ground` makes text, checkpoints and recipes; `Kind` is one command; `Forks` and `Shell` start it; `state` is
what its folder holds in the end, without the few fields that are times, speeds and memory; `processes` and
`tree` tell what was left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cli_helpers import write_text

ROOT = Path(__file__).parents[2]
MARK = "CAMPAIGN_CASE"  # in the environment of every process of a case
_TRAIN = {"tokens": 1024, "batch": 4, "heldout_points": 2, "checkpoint_seconds": 0}
_CHECK = {"check_tokens": 64}
_INT4 = {"kind": "int4", "group": 32}
_EVEN = {"kind": "int4", "group": 32, "symmetric": True}
_SCALES = {"tokens": 128, "batch": 2, "window": 32, "heldout_tokens": 64, "checks": 2}
_BLOCKS = {"steps": 4, "heldout_windows": 2, "checks": 2}
_AUTO = {"measured_windows": 1, "measured_tokens": 32, "moment_windows": 2}

# name -> the model that the recipe starts from, and its chains
RECIPES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "created": ("", {
        "base": [{"train": {**_TRAIN, "average": "ema"}}, {"export_onnx": _CHECK}],
        "adam": [{"train": {**_TRAIN, "optimizer": "adamw"}}],
    }),
    "fine-tuned": ("plain", {
        "base": [{"train": {**_TRAIN, "optimizer": "sgd", "accumulate": 2}}],
        "gradual": [{"prune_gradual": {"tokens": 1024, "batch": 4, "checkpoint_seconds": 0}}],
    }),
    "distilled": ("plain", {
        "online": [{"prune_magnitude": {"pattern": "2:4"}}, {"distill": _TRAIN}, "store_sparse"],
    }),
    "student": ("plain", {
        "cached": [{"student": {"blocks": 2}}, {"distill": {**_TRAIN, "targets": "cached"}}],
        "own-text": [{"student": {"blocks": 2}}, {"distill": {**_TRAIN, "tokens": 256, "on_policy": 0.5}}],
    }),
    "structured": ("plain", {
        "healed": [{"prune_structured": {"target": {"parameters": 0.8}}}, {"distill": _TRAIN}],
    }),
    "trimmed": ("plain", {
        "trimmed": ["prune_vocabulary", {"quantize_gptq": {"format": _INT4}}, {"export_onnx": _CHECK}],
    }),
    "masked": ("plain", {
        "alps": [{"prune_alps": {"steps": 20}}, "store_sparse"],
        "sparsegpt": [{"prune_sparsegpt": {"pattern": "2:4"}}],
        "wanda": ["prune_wanda", {"quantize_gptq": {"format": _INT4}}],
    }),
    "quantized": ("plain", {
        "gptq": [{"quantize_gptq": {"format": _INT4}}],
        "round": [{"quantize_round": {"format": "int8"}}],
        "hqq": [{"quantize_hqq": {"format": _INT4}}],
        "nf4": ["quantize_bitsandbytes"],
    }),
    "allotted": ("plain", {
        "auto": [{"quantize_auto": {"bits_per_weight": 4, **_AUTO}}],
    }),
    "coded": ("plain", {
        "coded": [{"quantize_round": {"format": {"kind": "coded"}}}],
    }),
    "tuned": ("plain", {
        "scales": [{"quantize_gptq": {"format": _INT4}}, {"tune_scales": _SCALES}],
        "blocks": [{"quantize_round": {"format": _INT4}}, {"tune_blocks": _BLOCKS}],
    }),
    "smoothed": ("plain", {
        "smooth": [
            {"fold_scales": {"method": "smoothquant"}}, {"quantize_gptq": {"format": "int8"}},
            "round_activations",
        ],
        "awq": [{"fold_scales": {"method": "awq", "samples": 64}}, {"quantize_gptq": {"format": _INT4}}],
    }),
    "exported": ("plain", {
        "base": [{"export_onnx": _CHECK}],
        "gguf": [
            {"quantize_round": {"format": _EVEN, "embeddings": {"kind": "int8", "group": 32}}},
            {"export_gguf": _CHECK}, {"export_onnx": {**_CHECK, "cache": "int8", "cache_tokens": 64}},
        ],
        "tensors": [
            {"quantize_round": {"format": _EVEN, "embeddings": None}}, {"export_compressed_tensors": _CHECK},
        ],
    }),
    "streamed": ("sharded", {
        "rounded": [{"quantize_round": {"format": _INT4}}],
        "pruned": ["prune_magnitude"],
        "gptq": [{"quantize_gptq": {"format": _INT4}}],
    }),
}  # fmt: skip
# a process per artifact is measured in, each with imports of its own: these take longest
SLOW = ("measured", "bench")
# what is not the same in two runs of one recipe: keys of JSON objects, with why
TIMES = {
    "seconds", "peak_rss_bytes",  # of a step
    "tokens_per_second", "measuring_seconds",  # of its notes, where it trained or measured layers
    "prefill_tokens_per_second", "decode_tokens_per_second", "prefill_seconds_p50", "prefill_seconds_p95",
    "decode_seconds_p50", "decode_seconds_p95", "decode_seconds_p99", "load_seconds",
    "prefill_round_seconds", "decode_round_seconds", "timing_session", "busy_share",  # of a result
    "seal",  # a hash of all of these
    "timed_rounds", "threads_wait", "processes",  # of its protocol: how long there was time, how busy it was
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One command: its arguments without the place where it writes, and how that is named."""

    name: str
    arguments: tuple[str, ...]
    output: str = "run"  # below the folder of a case: a folder, or for bench a file

    def command(self, case: Path) -> list[str]:
        """All of its arguments."""
        return [*self.arguments, "-o", str(case / self.output)]


@dataclass
class Ground:
    """Text, checkpoints and recipes in `folder`, made once."""

    folder: Path
    kinds: dict[str, Kind] = field(default_factory=dict)

    def make(self, forks: Forks) -> None:
        """Write everything."""
        self.folder.mkdir(parents=True)
        write_text(self.folder / "text", 40)
        forks.start([], self.folder, make=str(self.folder))
        status = forks.wait(120)
        assert status == 0, (self.folder / "err").read_text()
        for name, (checkpoint, chains) in RECIPES.items():
            self._recipe(name, checkpoint, chains, "--no-measure")
        self._recipe("measured", "plain", {"int8": [{"quantize_round": {"format": "int8"}}]})
        plain, text = str(self.folder / "plain"), ("--text", str(self.folder / "text"))
        quantize = ("quantize", plain, *text, "--threads", "1", "--effort", "quick", "--no-measure")
        self.kinds["command"] = Kind("command", (*quantize, "--to", "onnx,gguf"))
        bench = ("bench", plain, *text, "--threads", "1", "--window", "32", "--windows", "4")
        self.kinds["bench"] = Kind("bench", bench, "results.jsonl")

    def _recipe(self, name: str, checkpoint: str, chains: dict[str, list[Any]], *more: str) -> None:
        shape = {"preset": "1m", "layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "intermediate": 128}
        created = {"create": {**shape, "vocab_size": 300, "context": 128}}
        recipe = {
            "name": "tiny",
            "threads": 1,
            "model": {"checkpoint": str(self.folder / checkpoint)} if checkpoint else created,
            "data": {
                "text": str(self.folder / "text"), "window": 32, "evaluation_windows": 8,
                "calibration_windows": 8, "heldout_windows": 4,
            },
            "base": chains.get("base", []),
            "variants": {variant: chain for variant, chain in chains.items() if variant != "base"},
            "measure": {"prefill_tokens": 16, "rounds": 2},
            "report": {"prompt": "The model", "sample_tokens": 4},
        }  # fmt: skip
        place = self.folder / f"{name}.yaml"
        place.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        self.kinds[name] = Kind(name, ("run", str(place), *more))


def environment(case: Path, mark: str = "") -> dict[str, str]:
    """Of a command: this one's, with temporary files in the case's own folder."""
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {
        MARK: mark or str(case), "TMPDIR": str(case / "tmp"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }  # fmt: skip
    return {**os.environ, **own}


class Forks:
    """Starts commands in processes forked from one that has imported everything; one at a time."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.log = (work / "forks.log").open("w")
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment(work),
        )  # fmt: skip
        self.pid = 0
        self._answer(300)

    def start(self, command: list[str], case: Path, **more: Any) -> int:
        """Begin a command whose streams go to `out` and `err` in the folder of the case."""
        (case / "tmp").mkdir(exist_ok=True)
        job = {
            "arguments": command, "env": environment(case), "cwd": str(case), "out": str(case / "out"),
            "err": str(case / "err"), **more,
        }  # fmt: skip
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pid = self._answer(60)["pid"]
        return self.pid

    def wait(self, timeout: float) -> int | None:
        """Its exit status; None if it still runs after so many seconds."""
        told = self._answer(timeout, required=False)
        return None if told is None else told["status"]

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.log.close()

    def _answer(self, timeout: float, *, required: bool = True) -> Any:
        assert self.server.stdout is not None
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            if required:
                raise RuntimeError(f"no answer; see {self.log.name}")
            return None
        return json.loads(self.server.stdout.readline())


class Shell:
    """Starts commands as a shell does: `python -m compress`; one at a time."""

    def start(self, command: list[str], case: Path, **more: Any) -> int:
        """As `Forks.start`; `more`: of `Popen`, and `env` on top of the usual."""
        (case / "tmp").mkdir(exist_ok=True)
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL}
        with (case / "out").open("wb") as out, (case / "err").open("wb") as err:
            streams |= {"stdout": out, "stderr": err, "cwd": case, "env": environment(case)}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "compress", *command], start_new_session=True, **{**streams, **more}
            )
        self.pid = self.process.pid
        return self.pid

    def wait(self, timeout: float) -> int | None:
        """As `Forks.wait`."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


@contextlib.contextmanager
def forking(work: Path) -> Iterator[Forks]:
    """The server, ended at the end."""
    forks = Forks(work)
    try:
        yield forks
    finally:
        forks.close()


def finish(runner: Forks | Shell, timeout: float = 120) -> int | None:
    """Wait for a command; one that hangs is killed, with its group, and has no status."""
    status = runner.wait(timeout)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGKILL)
        runner.wait(10)
    return status


def processes(case: Path, session: int) -> list[str]:
    """What of a case still runs: processes of its session, or with its mark in their environment."""
    found = []
    mark = f"{MARK}={case}\0".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            state, _, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and (int(own) == session or mark in (entry / "environ").read_bytes() + b"\0"):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{entry.name} {line[:120]}")
    return found


def orphans(case: Path, session: int, seconds: float = 3.0) -> list[str]:
    """What of a case still runs after so many seconds; it is ended then."""
    deadline = time.monotonic() + seconds
    while (found := processes(case, session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for line in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    return found


def tree(folder: Path) -> set[str]:
    """Everything in a folder, folders with a slash.

    Left out: what Python itself writes, and removes at once, to see whether it can write temporary files; and
    two names that libraries make when they are imported, the same each time: ONNX Runtime's `.ses`, torch's
    folder of compiled code.
    """
    found = {str(p.relative_to(folder)) + "/" * p.is_dir() for p in folder.rglob("*")}
    return {name for name in found if not re.fullmatch(r"tmp/([a-z0-9_]{8}|\.ses|torchinductor_\w+/)", name)}


def state(case: Path, kind: Kind) -> dict[str, Any]:
    """What a finished command left: the bytes of every file, of records all but `TIMES`.

    The page of a run shows times and speeds: in its place stands whether it is what its records give.
    """
    place = case / kind.output
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    found: dict[str, Any] = {}
    for file in files:
        name, data = str(file.relative_to(case)), file.read_bytes()
        if file.name in ("report.html", "report.md"):
            found[name] = drawn(place)[file.name] == data
        elif file.name == ".hashes.json":  # beside each hash: inode and times of the file
            found[name] = {place: known[-1] for place, known in json.loads(data).items()}
        elif file.suffix == ".json" and file.name in ("manifest.json", "run.json"):
            found[name] = _without(json.loads(data))
        elif file.suffix == ".jsonl":
            found[name] = [_without(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = data
    return found


def drawn(run: Path) -> dict[str, bytes]:
    """The page of a run as its records give it now."""
    from compress.api import load_run
    from compress.report import render

    html, markdown = render(*load_run(run))
    return {"report.html": html.encode(), "report.md": markdown.encode()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Files that are not the same, or missing, or too many."""
    told = [f"{name} (too many)" for name in sorted(set(found) - set(expected))]
    told += [f"{name} (missing)" for name in sorted(set(expected) - set(found))]
    for name in sorted(set(found) & set(expected)):
        if found[name] != expected[name]:
            told.append(name + _where(found[name], expected[name]))
    return told


def _where(found: Any, expected: Any) -> str:
    """Where two JSON values differ first, and how."""
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next((k for k in sorted({*found, *expected}) if found.get(k) != expected.get(k)), "")
        return f".{key}" + _where(found.get(key), expected.get(key))
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        return f"[{place}]" + _where(found[place], expected[place])
    return "" if isinstance(found, bytes) else f": {str(found)[:80]}, not {str(expected)[:80]}"


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in TIMES}
    return [_without(inner) for inner in value] if isinstance(value, list) else value
