"""Norms, MLPs and changes of shape as nodes of a graph; tokens of a batch lie flat, (tokens, width), or as
they are, (batch, sequence, width)."""

import numpy as np
from onnx import TensorProto
from torch import Tensor

from compress.export.onnx.architecture import Mlp, Norm
from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.linear import linear


def norm(graph: GraphBuilder, x: str, layer: Norm | None) -> str:
    """The norm of x (..., width); x itself where there is none. The same norm of the same x is one node."""
    if layer is None:
        return x
    key = ("norm", x, layer.name)
    if key not in graph.shared:
        gain, *bias = _gain_and_bias(graph, layer)
        operator = "SimplifiedLayerNormalization" if layer.kind == "rms" else "LayerNormalization"
        graph.shared[key] = graph.op(operator, x, gain, *bias, axis=-1, epsilon=layer.epsilon)
    return graph.shared[key]


def add_norm(graph: GraphBuilder, stream: str, x: str, layer: Norm | None) -> tuple[str, str]:
    """(stream + x, norm(stream + x)).

    Two nodes: the operators that do both take twice as long for a prompt (1.31, 512 x 576: 199 us against 98)
    and no less for a token. A Sum where ONNX Runtime would make one of them of an Add, or one of the Add and
    what is before it.
    """
    apart = x in graph.not_before_add or (layer is not None and layer.kind == "layer")
    total = graph.op("Sum" if apart else "Add", stream, x)
    return total, norm(graph, total, layer)


def mlp(graph: GraphBuilder, x: str, layer: Mlp, forms: Forms) -> str:
    """x (..., width) -> (..., width).

    Gate and up as one product and a split gained nothing: decoding took 0.98 (int4) and 1.02 (int8) times as
    long with widths of 576 and 1536.
    """
    up = linear(graph, x, layer.up, forms)
    if layer.gate is None:
        inner = _activate(graph, layer.activation, up)
    else:
        gate = linear(graph, x, layer.gate, forms)
        inner = graph.op("Mul", _activate(graph, layer.activation, gate), up)
    return linear(graph, inner, layer.down, forms)


def softcapped(graph: GraphBuilder, x: str, cap: float | None) -> str:
    """cap * tanh(x / cap); x itself for None."""
    if cap is None:
        return x
    factor = graph.constant(float(cap))
    return graph.op("Mul", graph.op("Tanh", graph.op("Div", x, factor)), factor)


def unflatten(graph: GraphBuilder, x: str, width: int, shape: str) -> str:
    """(batch * sequence, width) -> (batch, sequence, width); `shape` holds [batch, sequence].

    Without one, x is in that shape already.
    """
    if not shape:
        return x
    key = ("unflatten", width)
    if key not in graph.shared:
        graph.shared[key] = graph.op("Concat", shape, graph.constant([width]), axis=0)
    return graph.sized(
        graph.op("Reshape", x, graph.shared[key]), TensorProto.FLOAT, ["batch", "sequence", width]
    )


def flatten(graph: GraphBuilder, x: str, width: int, rows: str = "tokens") -> str:
    """(batch, sequence, width) -> (batch * sequence, width), of which the number of rows is called `rows`."""
    return graph.sized(graph.op("Reshape", x, graph.constant([-1, width])), TensorProto.FLOAT, [rows, width])


def counting(graph: GraphBuilder, count: int) -> str:
    """0 .. count - 1, int64. A node without inputs is folded at load: the file does not hold the numbers."""
    key = ("counting", count)
    if key not in graph.shared:
        bounds = (graph.constant(np.asarray(i)) for i in (0, count, 1))
        graph.shared[key] = graph.op("Range", *bounds)
    return graph.shared[key]


def _activate(graph: GraphBuilder, activation: str, x: str) -> str:
    if activation == "silu":
        return graph.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(1.0 * x)
    if activation == "relu":
        return graph.op("Relu", x)
    return graph.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _gain_and_bias(graph: GraphBuilder, layer: Norm) -> list[str]:
    """A norm's weights, stored once however often it is used."""

    def stored(name: str, tensor: Tensor) -> str:
        return graph.once(name, lambda full: graph.weight(full, tensor.numpy()))

    gain = stored(f"{layer.name}.weight", layer.weight)
    return [gain] if layer.bias is None else [gain, stored(f"{layer.name}.bias", layer.bias)]
