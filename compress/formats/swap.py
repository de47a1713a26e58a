"""Put codes in the place of float weights, embeddings and head included.

A head that shares its matrix with the embedding goes on sharing it: one set of codes serves both.
"""

from typing import Any

from torch import nn

from compress.errors import about
from compress.formats.base import Format
from compress.formats.layers import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.split import SplitEmbedding
from compress.models.layers import is_linear, matrix, replace_module, selected
from compress.models.stacks import block_lists
from compress.tasks.registry import task_of


def put_codes(model: nn.Module, name: str, quantized: QuantizedTensor) -> None:
    """Replace the linear layer `name` by one that holds codes; its bias stays as it was."""
    bias = getattr(model.get_submodule(name), "bias", None)
    replace_module(model, name, QuantizedLinear(quantized, bias))


def quantize_embeddings(model: Any, format: Format) -> list[str]:
    """Round what lies outside the blocks to `format`: the token embedding, the head, and an encoder's pooler
    and head for labels; returns the names of what was changed."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = tables(model)
    changed = list(found)
    with about(changed[0]):
        table = QuantizedTensor.round(format, embedding.weight.detach())
    if head is not None:
        tied = head.weight is embedding.weight
        with about(names[id(head)]):
            held = table if tied else QuantizedTensor.round(format, matrix(head))
        changed.append(names[id(head)])
        replace_module(model, changed[-1], QuantizedLinear(held, head.bias))
    for name, module in found.items():
        replace_module(model, name, QuantizedEmbedding(table, embedding_scale(module)))
    for name in _ends(model):
        with about(name):
            put_codes(model, name, QuantizedTensor.round(format, matrix(model.get_submodule(name))))
        changed.append(name)
    return changed


def coded_layers(model: Any, select: tuple[str, ...] = ("*",), skip: tuple[str, ...] = ()) -> list[str]:
    """Names of the layers inside the blocks that hold codes, as `linear_layers` has those in float."""
    return selected(model, lambda module: isinstance(module, QuantizedLinear), select, skip)


def tables(model: Any) -> dict[str, nn.Module]:
    """The token embedding by its name, and those tied to it: an encoder-decoder has three; of a table in two
    formats both parts."""
    table = model.get_input_embeddings()
    if isinstance(table, SplitEmbedding):
        return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedEmbedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedEmbedding)
        or module is table
        or (isinstance(module, nn.Embedding) and module.weight is table.weight)
    }


def embedding_names(model: Any) -> list[str]:
    """Names of the token embedding, of those tied to it, of the head, if there is one, and of an encoder's
    other layers outside the blocks."""
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return [*tables(model), *([] if head is None else [names[id(head)]]), *_ends(model)]


def _ends(model: Any) -> list[str]:
    """Linear layers of an encoder outside the blocks that are no table's: pooler, transform, labels."""
    if task_of(model.config).writes:
        return []
    blocks, head = block_lists(model), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and not name.startswith(blocks)
    ]


def embedding_scale(embedding: nn.Module) -> float:
    """The factor that some models' embeddings (Gemma's, BART's) apply to the rows they look up."""
    if isinstance(embedding, QuantizedEmbedding):
        return embedding.scale
    own = getattr(embedding, "embed_scale", 1.0)  # a number or, beside `scalar_embed_scale`, a tensor
    return float(getattr(embedding, "scalar_embed_scale", own))
