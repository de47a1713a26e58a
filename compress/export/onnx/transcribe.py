"""A traced graph written again, with the model's codes where its matrices were left out.

Nodes of ONNX are copied, after `simplify.py`. `compress::Linear` and `compress::Embedding` become what
`linear.py` and `embedding.py` write for a decoder, so a layer of codes has the same forms and bytes in every
graph; layers that read the same input share its rounding to 8 bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from onnx import ModelProto, ValueInfoProto, numpy_helper

from compress.export.onnx.architecture import Linear
from compress.export.onnx.biases import STATES, adding_biases, attention_with_biases
from compress.export.onnx.embedding import embedding
from compress.export.onnx.forms import Forms, form_of
from compress.export.onnx.graph import Dimensions, GraphBuilder
from compress.export.onnx.linear import linear
from compress.export.onnx.simplify import attributes, simpler
from compress.export.onnx.trace import DOMAIN, HOLDER

_ROWS: Dimensions = ("batch", "sequence")


def transcribe(
    graph: GraphBuilder,
    traced: ModelProto,
    layers: Mapping[str, Linear],
    forms: Forms,
    shapes: Mapping[str, Dimensions],
    heads: Collection[str] = (),
) -> list[Linear]:
    """Write a traced graph into `graph`: its inputs, what of its constants is read, nodes, outputs.

    `layers`: what the nodes of ours stand for, by module name; of a token table the rows are tokens.
    `shapes`: of the inputs, and of outputs that are not (batch, sequence, a width). `heads`: weights that
    another graph of the same file multiplies by. Returns the linear layers among them that an output
    depends on.
    """
    nodes = simpler(traced)
    outputs = [value.name for value in traced.graph.output]
    read = {name for node in nodes for name in node.input}
    for value in traced.graph.input:
        graph.input(value.name, value.type.tensor_type.elem_type, shapes[value.name])
    products = {
        node.output[0]: layers[attributes(node)["layer"].decode()]
        for node in nodes
        if (node.domain, node.op_type) == (DOMAIN, "Linear")
    }
    multiplied = {layer.name for layer in products.values()}.union(heads)
    adding = adding_biases(nodes, products, forms)
    # by result, not by layer: a model may use one layer in several places
    without_bias = {name for node in nodes if node.output[0] in adding for name in node.input[:STATES]}
    names: dict[str, str] = {}  # what is called otherwise here
    used: list[Linear] = []
    for tensor in traced.graph.initializer:
        if tensor.name in read:
            array = numpy_helper.to_array(tensor)
            if array.ndim and np.issubdtype(array.dtype, np.floating):
                names[tensor.name] = graph.weight(tensor.name.removeprefix(HOLDER), array)
            else:
                names[tensor.name] = graph.constant(array)
    for node in nodes:
        inputs = [names.get(name, name) for name in node.input]
        if node.output[0] in adding:
            attention_with_biases(graph, node, inputs, adding[node.output[0]])
            continue
        if node.domain != DOMAIN:
            graph.node(node.op_type, inputs, list(node.output), node.domain, **attributes(node))
            continue
        layer = layers[attributes(node)["layer"].decode()]
        if node.op_type == "Embedding":
            result = _rows(graph, layer, inputs[0], forms, layer.name in multiplied)
        else:
            bare = replace(layer, bias=None) if node.output[0] in without_bias else layer
            result = _product(graph, bare, inputs[0], forms)
            used.append(layer)
        if node.output[0] in outputs:
            graph.node("Identity", [result], [node.output[0]])
        else:
            names[node.output[0]] = result
    for value in traced.graph.output:
        shape = _shape(value, shapes.get(value.name, _ROWS))
        graph.output(value.name, value.type.tensor_type.elem_type, shape)
    return used


def _rows(graph: GraphBuilder, table: Linear, ids: str, forms: Forms, tied: bool) -> str:
    """ids (...) -> (..., width)."""
    flat = graph.op("Reshape", ids, graph.constant([-1]))
    rows = embedding(graph, table.name, flat, table.weight, forms, tied)
    return graph.op("Reshape", rows, _with_last(graph, graph.op("Shape", ids), int(table.weight.shape[1])))


def _product(graph: GraphBuilder, layer: Linear, x: str, forms: Forms) -> str:
    """x (..., in) -> (..., out)."""
    if form_of(layer, forms) != "float":
        return linear(graph, x, layer, forms)
    y = linear(graph, _flat(graph, x, int(layer.weight.shape[1])), layer, forms)
    return graph.op("Reshape", y, _with_last(graph, graph.op("Shape", x, end=-1), layer.outputs))


def _flat(graph: GraphBuilder, x: str, columns: int) -> str:
    """(..., columns) -> (rows, columns), once for all layers that read x."""
    if ("flat", x) not in graph.shared:
        graph.shared["flat", x] = graph.op("Reshape", x, graph.constant([-1, columns]))
    return graph.shared["flat", x]


def _with_last(graph: GraphBuilder, leading: str, last: int) -> str:
    return graph.op("Concat", leading, graph.constant([last]), axis=0)


def _shape(value: ValueInfoProto, changing: Dimensions) -> list[int | str]:
    """A declared shape in which the sizes that change have names of ours."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else changing[i] for i, d in enumerate(dims)]
