"""Open an artifact in the runtime it ships in. Runtimes are imported only when asked for."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from compress.artifact.integrity import verify as verified
from compress.errors import UserError, nearest
from compress.host.files import read_json
from compress.runtimes.base import Runtime, TextRuntime, Waiting
from compress.runtimes.exported import EXPORTED


@dataclass(frozen=True)
class _Opening:
    """How an artifact is opened: the arguments of `open_runtime`."""

    path: Path
    threads: int | None
    prefill_chunk: int | None
    provider: str
    waiting: Waiting
    verify: bool


@dataclass(frozen=True)
class _Known:
    """What is to be known of a runtime without importing it.

    Attributes:
        open: an artifact.
        prepare: imports what opening will need, and tells of nothing that is missing: opening does.
        process_bytes: memory of a process that holds an empty model.
    """

    open: Callable[[_Opening], Runtime]
    prepare: Callable[[], None]
    process_bytes: int


def _open_torch(how: _Opening) -> Runtime:
    from compress.runtimes.torch_runtime import TorchRuntime

    return TorchRuntime(how.path, how.threads, how.prefill_chunk, stock=False, verify=how.verify)


def _open_transformers(how: _Opening) -> Runtime:
    from compress.runtimes.torch_runtime import TorchRuntime

    return TorchRuntime(how.path, how.threads, how.prefill_chunk, stock=True, verify=how.verify)


def _prepare_torch() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401 - pulls in what every architecture needs

    from compress.runtimes import torch_runtime  # noqa: F401


def _open_onnxruntime(how: _Opening) -> Runtime:
    from compress.runtimes.onnx_encoder import OnnxEncoder, holds_encoder
    from compress.runtimes.onnx_runtime import OnnxRuntime
    from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
    from compress.runtimes.onnx_session import DECODER, find_graph

    if holds_encoder(how.path):
        return OnnxEncoder(how.path, how.threads, how.provider, how.waiting)
    if find_graph(how.path, DECODER) is not None:
        return OnnxSeq2Seq(how.path, how.threads, how.provider, how.waiting)
    return OnnxRuntime(how.path, how.threads, how.prefill_chunk, how.provider, waiting=how.waiting)


def _prepare_onnxruntime() -> None:
    from compress.runtimes import onnx_runtime  # noqa: F401


def _open_llama_cpp(how: _Opening) -> Runtime:
    from compress.runtimes.llama_cpp_runtime import LlamaCppRuntime

    return LlamaCppRuntime(how.path, how.threads)


def _prepare_llama_cpp() -> None:
    from compress.runtimes import llama_cpp_runtime  # noqa: F401

    with suppress(ImportError):
        import llama_cpp  # noqa: F401


_KNOWN = {
    "torch": _Known(_open_torch, _prepare_torch, 450_000_000),
    "onnxruntime": _Known(_open_onnxruntime, _prepare_onnxruntime, 120_000_000),
    "llama.cpp": _Known(_open_llama_cpp, _prepare_llama_cpp, 120_000_000),
    "transformers": _Known(_open_transformers, _prepare_torch, 450_000_000),
}
RUNTIMES = tuple(_KNOWN)


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
    if runtime not in _KNOWN:
        raise UserError(f"runtime: '{runtime}' is unknown; {nearest(runtime, RUNTIMES)}")
    return _KNOWN[runtime].open(_Opening(path, threads, prefill_chunk, provider, waiting, verify))


def prepare(runtime: str) -> None:
    """Import what opening an artifact in one of `RUNTIMES` will need, so that it is not timed as loading."""
    if runtime in _KNOWN:
        _KNOWN[runtime].prepare()


def process_bytes(runtime: str) -> int:
    """Memory of a process that holds an empty model; 0 of a runtime that is not ours."""
    return _KNOWN[runtime].process_bytes if runtime in _KNOWN else 0


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
