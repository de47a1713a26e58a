"""A traced graph made simpler where ONNX Runtime does not do it as it loads a model.

turns    A Reshape to the shape that there is, Reshapes in a row that end where they began, and two Transposes
         in a row that undo each other go. Attention leaves them between the heads of a model and those of the
         node that it becomes.
sums     An Add that a LayerNormalization reads becomes a Sum. ONNX Runtime would fuse Add and norm into a
         SkipLayerNormalization that takes four times as long (1.31, 1024 x 384: 2.5 ms against 0.58).
unread   What no output depends on goes.

Pure: lists of nodes in, lists of nodes out; a value keeps its name wherever it is still computed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx import ModelProto, NodeProto, helper

Dimensions = tuple[int | str, ...]


def simpler(model: ModelProto) -> list[NodeProto]:
    """The nodes of a graph, in order, after all three."""
    graph = model.graph
    outputs = [value.name for value in graph.output]
    return needed(with_sums(without_turns(graph.node, outputs, shapes(model))), outputs)


def shapes(model: ModelProto) -> dict[str, Dimensions]:
    """Shapes of the values of which the tracer knows every size; one that changes has a name."""
    graph = model.graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.WhichOneof("value") for d in dims):
            found[value.name] = tuple(d.dim_param or d.dim_value for d in dims)
    return found


def without_turns(
    nodes: Iterable[NodeProto], outputs: Sequence[str], known: Mapping[str, Dimensions]
) -> list[NodeProto]:
    """What changes nothing is left out, and its source read in its place."""
    turned: dict[str, tuple[str, list[int]]] = {}  # result -> source and permutation
    same: dict[str, str] = {}
    before_shapes: dict[str, str] = {}  # result of Reshapes in a row -> what the first of them read
    kept = []
    for node in nodes:
        node = _reading(node, same)
        if node.op_type == "Reshape" and node.output[0] not in outputs:
            shape = known.get(node.output[0])
            source = before_shapes.get(node.input[0], node.input[0])
            if shape is not None and shape == known.get(source):
                same[node.output[0]] = source
                continue
            before_shapes[node.output[0]] = source
        if node.op_type == "Identity" and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]
            continue
        if node.op_type == "Transpose":
            turn = list(attributes(node)["perm"])
            origin, before = turned.get(node.input[0], ("", []))
            undone = before and [before[axis] for axis in turn] == sorted(turn)
            if undone and node.output[0] not in outputs:
                same[node.output[0]] = origin
                continue
            turned[node.output[0]] = (node.input[0], turn)
        kept.append(node)
    return kept


def with_sums(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Sums in the place of the additions that norms read."""
    normed = {node.input[0] for node in nodes if node.op_type == "LayerNormalization"}
    return [
        helper.make_node("Sum", node.input, node.output)
        if node.op_type == "Add" and node.output[0] in normed
        else node
        for node in nodes
    ]


def needed(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """The nodes that outputs depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _reading(node: NodeProto, same: Mapping[str, str]) -> NodeProto:
    """A copy that reads the sources of values that are gone."""
    result = NodeProto()
    result.CopyFrom(node)
    del result.input[:]
    result.input.extend(same.get(name, name) for name in node.input)
    return result
