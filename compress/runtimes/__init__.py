"""Open an artifact in the runtime it ships in. Runtimes are imported only when asked for."""

from pathlib import Path

from compress.errors import UserError, nearest
from compress.runtimes.base import Runtime

RUNTIMES = ("torch", "onnxruntime")


def open_runtime(path: Path, runtime: str, threads: int | None = None) -> Runtime:
    """Load the artifact at `path`; `threads` pins the number of CPU threads.

    Raises:
        UserError: an unknown runtime, or an artifact this runtime cannot load.
    """
    if runtime == "torch":
        from compress.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(path, threads=threads)
    if runtime == "onnxruntime":
        from compress.runtimes.onnx_encoder import OnnxEncoder, holds_encoder
        from compress.runtimes.onnx_runtime import OnnxRuntime

        return (OnnxEncoder if holds_encoder(path) else OnnxRuntime)(path, threads=threads)
    raise UserError(f"runtime: '{runtime}' is unknown; {nearest(runtime, RUNTIMES)}")


def detect_runtime(path: Path) -> str:
    """`onnxruntime` for a folder that holds `model.onnx`, else `torch`."""
    return "onnxruntime" if (path / "model.onnx").is_file() else "torch"
