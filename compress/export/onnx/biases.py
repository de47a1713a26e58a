"""Biases that attention adds as it takes queries, keys and values, where their products would in a pass each.

An integer product ends in two passes over its result: times the step of each token, plus the bias. Attention
copies what it reads anyway.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto

from compress.export.onnx.architecture import Linear
from compress.export.onnx.forms import Forms, form_of
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.simplify import attributes

# of MultiHeadAttention's inputs: query, key and value; behind them come their biases, one after the other
STATES = 3


def adding_biases(
    nodes: Sequence[NodeProto], products: Mapping[str, Linear], forms: Forms
) -> dict[str, list[Linear]]:
    """First results of the attentions that can add biases, and the three layers whose these are.

    `products`: the layers of a graph by the names of their results.
    """
    reads = Counter(name for node in nodes for name in node.input)
    found = {}
    for node in nodes:
        if node.op_type != "MultiHeadAttention" or (len(node.input) > STATES and node.input[STATES]):
            continue
        states = [products[name] for name in node.input[:STATES] if name in products and reads[name] == 1]
        if len(states) == STATES and all(_adds_later(layer, forms) for layer in states):
            found[node.output[0]] = states
    return found


def attention_with_biases(
    graph: GraphBuilder, node: NodeProto, inputs: Sequence[str], states: Sequence[Linear]
) -> None:
    """Write an attention that adds the biases of query, key and value."""
    biases = np.concatenate([layer.bias.numpy() for layer in states if layer.bias is not None])
    bias = graph.once(f"{states[0].name}.biases", lambda name: graph.weight(name, biases))
    given = [*inputs[:STATES], bias, *inputs[STATES + 1 :]]
    graph.node(node.op_type, given, list(node.output), node.domain, **attributes(node))


def _adds_later(layer: Linear, forms: Forms) -> bool:
    """Whether a layer's bias takes a pass of its own."""
    return layer.bias is not None and form_of(layer, forms) == "token"
