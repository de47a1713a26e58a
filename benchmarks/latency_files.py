"""How each tool gets its files from the same float32 model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import WORKERS, Bench, call
from latency_points import Passes, Point

import compress

WEIGHTS = (".onnx", ".data", ".bin", ".safetensors", ".gguf")
Commands = Iterator[list[Any]]


def files_of(point: Point, bench: Bench) -> Path:
    """The file or folder that the point's runtime loads, written the first time."""
    base, windows = bench.prepared(0)
    folder = bench.folder / "deployed"
    folder.mkdir(exist_ok=True)
    if "passes" in point.settings:
        made = exported(point.settings["passes"], base, folder)
        return made if point.runtime == "torch" else made / "onnx"
    out = folder / f"{point.tool} {point.weights}".replace(" ", "_")
    if not out.is_dir():
        print(f"writing {out}", flush=True)
        partial = out.with_name(out.name + ".partial")
        partial.mkdir(exist_ok=True)
        for command in _WRITERS[point.tool](point, bench.python(point.tool), base, windows, partial):
            call(command, folder / f"{out.name}.log")
        partial.rename(out)
    gguf = out / "artifact" / "model.gguf"
    return gguf if gguf.is_file() else out


def file_bytes(path: Path) -> int:
    """Of the weights: all of a file, or of a folder's, without tokenizers."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in WEIGHTS]
    return sum(f.stat().st_size for f in files if "tokenizer" not in f.name)


def exported(passes: Passes, base: Path, folder: Path) -> Path:
    """An artifact of ours inside `folder`, which is made once; its graph is in `onnx`."""
    words = json.dumps(passes)
    name = "ours-" + "".join(c if c.isalnum() else "-" for c in words).strip("-")
    made = folder / name / "deployed"
    if not made.is_dir():
        print(f"writing {made}", flush=True)
        bundle = compress.load(base)
        for step in passes:
            for kind, fields in step.items():
                bundle = bundle.apply(compress.pass_class(kind).model_validate(fields), text="stdlib")
        bundle.save(made)
    return made


def _llama_cpp(point: Point, python: str, base: Path, windows: Path, out: Path) -> Commands:
    yield [python, WORKERS / "llama_cpp_worker.py", base, windows, out, json.dumps(point.settings)]


def _openvino_genai(point: Point, python: str, base: Path, windows: Path, out: Path) -> Commands:
    export = [Path(python).with_name("optimum-cli"), "export", "openvino", "--model", base]
    yield [*export, "--task", "text-generation-with-past", *point.settings["arguments"], out]


def _onnxruntime_genai(point: Point, python: str, base: Path, windows: Path, out: Path) -> Commands:
    build = [python, "-m", "onnxruntime_genai.models.builder", "-i", base, "-o", out, "-e", "cpu"]
    extra = point.settings["extra"]
    yield [*build, "-p", point.settings["precision"], *(["--extra_options", *extra] if extra else [])]


_WRITERS: dict[str, Callable[[Point, str, Path, Path, Path], Commands]] = {
    "llama_cpp": _llama_cpp,
    "openvino_genai": _openvino_genai,
    "onnxruntime_genai": _onnxruntime_genai,
}
