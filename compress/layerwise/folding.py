"""Where a scale of a linear layer's inputs can go without changing what the model computes.

W x = (W diag(s)) (x / s): the columns of every layer that reads x are multiplied, and what makes x divides:

    attention_in    the norm before query, key and value: its gain (and bias)
    attention_out   the rows of the value projection: attention only averages them over positions
    mlp_in          the norm before gate and up
    mlp_out         the rows of up, which the gate multiplies

Which of them exist is a fact of the architecture. A plain MLP has no linear way past its activation; in a
post-norm encoder the norm's output is also the residual stream: there the entry is missing. Where several
query heads share a value head, the columns that read one value share its scale.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.layers import matrix
from compress.models.stacks import decoder_blocks

Place = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]


@dataclass(frozen=True)
class Fold:
    """One scale per input channel of `targets`, undone in `source`.

    Attributes:
        place: which of the four.
        source: full name of the norm, or of the linear layer whose rows are divided.
        targets: full names of all layers that read the channels, in their order.
        stacked: of how many stacked parts of the source the rows are the last (GPT-2 stacks q, k, v).
    """

    place: Place
    source: str
    targets: tuple[str, ...]
    stacked: int = 1


# Paths inside a block: the source and its readers.
_LLAMA: dict[Place, tuple[str, tuple[str, ...]]] = {
    "attention_in": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "attention_out": ("self_attn.v_proj", ("self_attn.o_proj",)),
    "mlp_in": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp_out": ("mlp.up_proj", ("mlp.down_proj",)),
}
_GPT2: dict[Place, tuple[str, tuple[str, ...]]] = {
    "attention_in": ("ln_1", ("attn.c_attn",)),
    "attention_out": ("attn.c_attn", ("attn.c_proj",)),
    "mlp_in": ("ln_2", ("mlp.c_fc",)),
}
_BERT: dict[Place, tuple[str, tuple[str, ...]]] = {
    "attention_out": ("attention.self.value", ("attention.output.dense",)),
}
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _BERT,
}


def find_folds(model: Any, places: tuple[Place, ...]) -> list[Fold]:
    """The folds of a model at these places, block by block; the model may hold no data.

    Raises:
        UserError: an architecture whose facts are not known here.
    """
    kind = model.config.model_type
    if kind not in _FAMILIES or getattr(model.config, "add_cross_attention", False):
        raise UserError(
            f"fold_scales: it is not known what a scale can be folded into in model_type '{kind}' "
            f"(known: {', '.join(sorted(_FAMILIES))}, without cross-attention); leave fold_scales out"
        )
    prefix, blocks = decoder_blocks(model)
    stacked = {"attn.c_attn": 3}
    return [
        Fold(
            place,
            f"{prefix}.{index}.{source}",
            tuple(f"{prefix}.{index}.{target}" for target in targets),
            stacked.get(source, 1) if place == "attention_out" else 1,
        )
        for index in range(len(blocks))
        for place, (source, targets) in _FAMILIES[kind].items()
        if place in places
    ]


def shared(model: Any, fold: Fold, values: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Make values (in,) equal where one output of the source feeds several inputs; (in,).

    `reduce` (torch.amax, say) takes (value heads, heads that share one, head width) over its second axis.
    """
    repeats, width = _sharing(model, fold)
    if repeats == 1:
        return values
    heads = values.view(-1, repeats, width)
    return reduce(heads, 1)[:, None].expand_as(heads).reshape(-1)


@torch.no_grad()
def apply_fold(model: Any, fold: Fold, scales: Tensor) -> None:
    """Multiply the targets' columns by scales (in,), equal where `shared` makes them so, and undo it before.

    Raises:
        UserError: scales that are not positive and finite.
    """
    if not (torch.isfinite(scales).all() and (scales > 0).all()):
        raise UserError(
            f"fold_scales: '{fold.targets[0]}' got scales that are not positive and finite; "
            "is the checkpoint sound?"
        )
    for name in fold.targets:
        module = model.get_submodule(name)
        module.weight.mul_(scales.to(module.weight.dtype))  # (out, in) by (in,)
    source = model.get_submodule(fold.source)
    divisor = scales
    repeats, width = _sharing(model, fold)
    if repeats > 1:
        divisor = scales.view(-1, repeats, width)[:, 0].reshape(-1)
    for parameter in _rows(source, fold):
        # rows of a matrix (rows, in), or a vector (rows,)
        shape = (-1, 1) if parameter.dim() == 2 else (-1,)
        parameter.div_(divisor.view(shape).to(parameter.dtype))


def stacked_weight(model: Any, fold: Fold) -> Tensor:
    """The weights of all targets, rows stacked, float32 (out, in)."""
    return torch.cat([matrix(model.get_submodule(name)) for name in fold.targets])


def _rows(source: nn.Module, fold: Fold) -> Iterator[Tensor]:
    """Views of what makes the channels: gain or rows of the weight, and the bias."""
    weight = source.weight
    assert isinstance(weight, Tensor)
    for parameter in (weight, getattr(source, "bias", None)):
        if parameter is not None:
            yield parameter.chunk(fold.stacked)[-1]


def _sharing(model: Any, fold: Fold) -> tuple[int, int]:
    """How many inputs read one output of the source, and the width of a head."""
    if fold.place != "attention_out":
        return 1, 1
    outputs = len(next(_rows(model.get_submodule(fold.source), fold)))
    target = model.get_submodule(fold.targets[0])
    repeats = target.weight.shape[1] // outputs
    if repeats == 1:
        return 1, 1
    attention = model.get_submodule(fold.source.rpartition(".")[0])
    return repeats, int(attention.head_dim)
