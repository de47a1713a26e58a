"""Open an artifact in the runtime it ships in. Runtimes are imported only when asked for."""

from pathlib import Path
from typing import cast

from compress.artifact.integrity import verify as verified
from compress.errors import UserError, nearest
from compress.host.files import read_json
from compress.runtimes.base import Runtime, TextRuntime, Waiting
from compress.runtimes.exported import EXPORTED

RUNTIMES = ("torch", "onnxruntime", "llama.cpp", "transformers")


def open_runtime(
    path: Path,
    runtime: str,
    threads: int | None = None,
    *,
    prefill_chunk: int | None = None,
    provider: str = "cpu",
    waiting: Waiting = "spin",
    verify: bool = True,
) -> Runtime:
    """Load the artifact at `path`; `threads` pins the number of CPU threads, `prefill_chunk` bounds how many
    tokens of a prompt go through at once (None: what is fast; llama.cpp has its own), `provider` is ONNX
    Runtime's and of no meaning elsewhere, as is `waiting`, how its threads do. `verify`: compare the files'
    hashes with those that are stated beside them.

    Raises:
        UserError: an unknown runtime, an artifact this runtime cannot load or that is not what was written.
    """
    if verify:
        verify_artifact(path, runtime)
    if runtime in ("torch", "transformers"):
        from compress.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(path, threads, prefill_chunk, stock=runtime == "transformers", verify=verify)
    if runtime == "llama.cpp":
        from compress.runtimes.llama_cpp_runtime import LlamaCppRuntime

        return LlamaCppRuntime(path, threads)
    if runtime == "onnxruntime":
        from compress.runtimes.onnx_encoder import OnnxEncoder, holds_encoder
        from compress.runtimes.onnx_runtime import OnnxRuntime
        from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
        from compress.runtimes.onnx_session import DECODER, find_graph

        if holds_encoder(path):
            return OnnxEncoder(path, threads, provider, waiting)
        if find_graph(path, DECODER) is not None:
            return OnnxSeq2Seq(path, threads, provider, waiting)
        return OnnxRuntime(path, threads, prefill_chunk, provider, waiting=waiting)
    raise UserError(f"runtime: '{runtime}' is unknown; {nearest(runtime, RUNTIMES)}")


def verify_artifact(path: Path, runtime: str) -> None:
    """Compare the files that a runtime opens at `path` with the hashes that are stated beside them.

    Raises:
        UserError: one is missing, or is not what was written.
    """
    graphs = ("model.onnx", "decoder_model.onnx")
    inner = runtime == "onnxruntime" and not any((path / name).is_file() for name in graphs)
    verified(path / "onnx" if inner else path)


def open_text_runtime(
    path: Path,
    threads: int | None = None,
    *,
    prefill_chunk: int | None = None,
    provider: str = "cpu",
    waiting: Waiting = "spin",
    verify: bool = True,
) -> TextRuntime:
    """Load the artifact at `path` to continue text, in the runtime it is for; arguments as `open_runtime`.

    Raises:
        UserError: as `open_runtime`, or the artifact is an encoder.
    """
    runtime = open_runtime(
        path,
        detect_runtime(path),
        threads,
        prefill_chunk=prefill_chunk,
        provider=provider,
        waiting=waiting,
        verify=verify,
    )
    if not runtime.task.writes:
        raise UserError(f"{path}: is an encoder, which continues no text; give a decoder")
    return cast(TextRuntime, runtime)


def detect_runtime(path: Path) -> str:
    """The runtime that what lies at `path` is for, as far as it is installed; `torch` for all the rest.

    `onnxruntime` for a folder that holds a graph of `export_onnx`, `llama.cpp` for a GGUF file,
    `transformers` for a folder of compressed-tensors.
    """
    graphs = ("model.onnx", "decoder_model.onnx")
    if any((path / name).is_file() for name in graphs):
        return "onnxruntime"
    if path.suffix == ".gguf" and EXPORTED["gguf"].installed:
        return "llama.cpp"
    return "transformers" if _quantization(path) == "compressed-tensors" else "torch"


def _quantization(folder: Path) -> str | None:
    """What a folder's configuration calls the format of its weights; None for plain ones."""
    try:
        return str(read_json(folder / "config.json")["quantization_config"]["quant_method"])
    except (UserError, KeyError, TypeError):
        return None
