"""Opening a graph in ONNX Runtime. Imports neither torch nor transformers."""

from pathlib import Path

import onnxruntime

from compress.errors import UserError

GRAPH = "model.onnx"


def open_session(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    """The session of `model.onnx` in a folder, or in `onnx` inside it; `threads` None leaves them free.

    Raises:
        UserError: no such file, or one that ONNX Runtime cannot load.
    """
    graph = next((p for p in (path / GRAPH, path / "onnx" / GRAPH) if p.is_file()), None)
    if graph is None:
        raise UserError(f"{path}: holds no {GRAPH}; export it first, with the pass export_onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises bare classes of its own
        raise UserError(f"{graph}: ONNX Runtime cannot load it: {error}") from error
