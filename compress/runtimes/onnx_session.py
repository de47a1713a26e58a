"""Opening a graph in ONNX Runtime. Imports neither torch nor transformers."""

from pathlib import Path

import onnxruntime

from compress.errors import UserError, door, reason
from compress.host.files import require_regular
from compress.host.machine import adds_products_in_32_bits
from compress.host.steady import Steady
from compress.runtimes.base import Ids, Waiting
from compress.runtimes.providers import require_provider

GRAPH = "model.onnx"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"  # of an encoder-decoder
PRESENT, PAST = "present", "past_key_values"  # keys and values of a text, as a graph gives and takes them
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph that is given as bytes
# Kernels put their weights into an order of their own at loading, on one thread, or all at once on all of
# them; then all originals are still there. SmolLM2-135M, 2 threads with AVX2, seconds to the first token of
# a prompt of 32 and peak memory: int4 (87 MB) 0.45 and 0.34 s, 196 and 247 MB (258 and 260 after 1000
# tokens); int8 (139 MB) 0.41 and 0.34 s, 253 and 347 MB; float32 0.90 and 0.60 s, 698 and 1090 MB. Small
# files have memory to spare.
_PACK_TOGETHER = "session.prepack.enable_parallel"
_TOGETHER_UP_TO = 1 << 27  # bytes of weights
_STOP_SPINNING = "session.force_spinning_stop"  # at the end of a run, not some time after it
_ALLOW_SPINNING = "session.intra_op.allow_spinning"
PADDING, RIGHT = "padding", "right"  # in the metadata of a graph that fails where a row is padded on the left
_NUMBERS = {"context", "weight_bytes", "start_token", "mask_token"}  # of them: counts and tokens
PROCESSOR = "processor"  # in the graph's metadata, where not every processor computes it right


def find_graph(path: Path, name: str) -> Path | None:
    """A graph in a folder, or in `onnx` inside it, if there is one."""
    return next((p for p in (path / name, path / "onnx" / name) if p.is_file()), None)


def graph_file(path: Path, name: str = GRAPH) -> Path:
    """A graph in a folder, or in `onnx` inside it.

    Raises:
        UserError: no such file.
    """
    graph = find_graph(path, name)
    if graph is None:
        raise UserError(f"{path}: holds no {name}; export it first, with the pass export_onnx")
    return graph


def files_of(*graphs: Path) -> Steady:
    """The files of graphs, which ONNX Runtime maps: to be asked before each use whether they are the same."""
    return Steady(file for graph in graphs for file in graph.parent.glob(f"{graph.name}*"))


def facts_of(session: onnxruntime.InferenceSession, path: Path) -> dict[str, str]:
    """What `export_onnx` noted in a graph: `context`, `weight_bytes`, and what a kind of model needs.

    Raises:
        UserError: another tool's graph.
    """
    facts: dict[str, str] = session.get_modelmeta().custom_metadata_map
    if "context" not in facts:
        raise UserError(f"{path}: holds a graph of another tool; give one that export_onnx wrote")
    for name in _NUMBERS & facts.keys():
        if not (facts[name].isascii() and facts[name].isdecimal() and len(facts[name]) < 16):
            raise UserError(f"{path}: its graph says {name}: {facts[name][:40]!r}, no count; export it again")
    return facts


def right_only(either: bool) -> dict[str, str]:
    """What the metadata say of a graph that takes rows padded on `either` side, or on the right only."""
    return {} if either else {PADDING: RIGHT}


def require_side(takes_left: bool, mask: Ids) -> None:
    """Raise UserError for a mask (batch, length) that such a graph fails on."""
    if not takes_left and not mask[:, 0].all():
        raise UserError(
            "attention_mask: begins with 0, and this model's graph takes rows padded on the right only; set "
            "the tokenizer's padding_side to right"
        )


def open_session(
    graph: Path, threads: int | None, provider: str = "cpu", *, waiting: Waiting = "spin"
) -> onnxruntime.InferenceSession:
    """A session that runs what `provider` can of a graph, and the rest on the CPU; `threads` None: any.

    `waiting`: what threads do while they have nothing to do. They `spin` within a run and for a while after
    it: fastest alone, but it keeps another session on the same cores from its own; `stop` ends that with the
    run. Where other programs use the cores they should `sleep`: a thread that spins holds the core which the
    one it waits for needs (docs/notes/latency.md).

    Raises:
        UserError: no such provider, one that does not start, a graph that ONNX Runtime cannot load, or one
            that this processor would compute wrongly.
    """
    wanted = require_provider(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*")) <= _TOGETHER_UP_TO:
        options.add_session_config_entry(_PACK_TOGETHER, "1")
    if waiting == "stop":
        options.add_session_config_entry(_STOP_SPINNING, "1")
    if waiting == "sleep":
        options.add_session_config_entry(_ALLOW_SPINNING, "0")
    for file in graph.parent.glob(f"{graph.name}*"):
        require_regular(file)
    with door(f"{graph}: ONNX Runtime cannot load it", "export it again"):
        model: Path | bytes = graph
        if provider == "openvino":
            model = without_defaults(graph)
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.parent))
        providers = list(dict.fromkeys([wanted, require_provider("cpu")]))
        session = onnxruntime.InferenceSession(model, options, providers=providers)
        needed = session.get_modelmeta().custom_metadata_map.get(PROCESSOR)
        for value in (
            *session.get_inputs(),
            *session.get_outputs(),
        ):  # what is no UTF-8 fails where it is read
            _ = value.name, value.shape
    if needed is not None and not adds_products_in_32_bits():
        raise UserError(
            f"{graph}: made for processors with {needed}, which this one does not report; sums would be cut "
            "off at 16 bits. Export again without `processor`"
        )
    if wanted not in session.get_providers():
        raise UserError(
            f"provider: '{provider}' does not start here, and ONNX Runtime went on without it; see to "
            "its driver and libraries, or take cpu"
        )
    return session


def refused_at_run(error: Exception, what: object) -> Exception:
    """What to raise in place of an error of a session's run: a graph that loads need not run.

    What ONNX Runtime raises becomes one line that begins with `what`; any other error is a bug, and stays.
    """
    # bound memory is run with plain errors of Python's
    if not (type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError):
        return error
    return UserError(f"{what}: ONNX Runtime cannot run its graph ({reason(error)})")


def without_defaults(graph: Path) -> bytes:
    """A graph in which every input must be given: OpenVINO takes one with a default for a constant."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    inputs = {value.name for value in model.graph.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    return model.SerializeToString()
