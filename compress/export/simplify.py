"""A traced graph made simpler where ONNX Runtime does not do it as it loads a model.

turns    A Reshape to the shape that there is, and two Transposes in a row that undo each other, as attention
         leaves them between the heads of a model and those of the node that it becomes, go.
sums     LayerNormalization of a sum of two tensors of one shape becomes one node, SkipLayerNormalization, that
         also gives the sum where others read it (ONNX Runtime sees this only where it knows all shapes).
unread   What no output depends on goes.

Pure: lists of nodes in, lists of nodes out; a value keeps its name wherever it is still computed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx import ModelProto, NodeProto, helper

from compress.export.graph import MICROSOFT

Shape = tuple[int | str, ...]


def simpler(model: ModelProto) -> list[NodeProto]:
    """The nodes of a graph, in order, after all three."""
    graph = model.graph
    outputs = [value.name for value in graph.output]
    known = shapes(model)
    nodes = without_turns(list(graph.node), outputs, known)
    nodes = with_sums(nodes, outputs, known, {tensor.name for tensor in graph.initializer})
    return needed(nodes, outputs)


def shapes(model: ModelProto) -> dict[str, Shape]:
    """Shapes of the values of which the tracer knows every size; one that changes has a name."""
    graph = model.graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.WhichOneof("value") for d in dims):
            found[value.name] = tuple(d.dim_param or d.dim_value for d in dims)
    return found


def without_turns(
    nodes: Iterable[NodeProto], outputs: Sequence[str], known: Mapping[str, Shape]
) -> list[NodeProto]:
    """What changes nothing is left out, and its source read in its place."""
    turned: dict[str, tuple[str, list[int]]] = {}  # result -> source and permutation
    same: dict[str, str] = {}
    kept = []
    for node in nodes:
        node = _reading(node, same)
        if node.op_type == "Reshape" and node.output[0] not in outputs:
            shape = known.get(node.output[0])
            if shape is not None and shape == known.get(node.input[0]):
                same[node.output[0]] = node.input[0]
                continue
        if node.op_type == "Transpose":
            turn = list(attributes(node)["perm"])
            source, before = turned.get(node.input[0], ("", []))
            undone = before and [before[axis] for axis in turn] == sorted(turn)
            if undone and node.output[0] not in outputs:
                same[node.output[0]] = source
                continue
            turned[node.output[0]] = (node.input[0], turn)
        kept.append(node)
    return kept


def with_sums(
    nodes: Sequence[NodeProto], outputs: Sequence[str], known: Mapping[str, Shape], constants: set[str]
) -> list[NodeProto]:
    """Sums and the norms that read them as one node each, where the sum stood."""
    sums = {node.output[0]: node for node in nodes if node.op_type == "Add" and _alike(node, known)}
    norms: dict[str, NodeProto] = {}  # sum -> its norm
    for node in nodes:
        is_norm = node.op_type == "LayerNormalization" and _is_last_axis(node)
        if is_norm and node.input[0] in sums and constants.issuperset(node.input[1:]):
            norms.setdefault(node.input[0], node)
    folded = {id(norm) for norm in norms.values()}
    read = {name for node in nodes if id(node) not in folded for name in node.input} | set(outputs)
    result = []
    for node in nodes:
        if id(node) in folded:
            continue
        norm = norms.get(node.output[0]) if node.op_type == "Add" else None
        if norm is not None:
            total = ["", "", node.output[0]] if node.output[0] in read else []
            node = helper.make_node(
                "SkipLayerNormalization",
                [*node.input, *norm.input[1:]],
                [norm.output[0], *total],
                domain=MICROSOFT,
                epsilon=attributes(norm).get("epsilon", 1e-5),
            )
        result.append(node)
    return result


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


def _alike(node: NodeProto, known: Mapping[str, Shape]) -> bool:
    first, second = (known.get(name) for name in node.input)
    return first is not None and first == second and len(first) == 3


def _is_last_axis(node: NodeProto) -> bool:
    return attributes(node).get("axis", -1) in (-1, 2)
