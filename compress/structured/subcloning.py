"""A smaller model of the same kind, with weights taken from a larger one: blocks chosen, widths sliced.

Initialising a student from its teacher matters more than the loss it learns from. Weight subcloning (Samragh
et al. 2023, arXiv 2312.09299): keep the channels, neurons and key-value groups that carry most, and correct
for what is gone. Here:

- channels of the residual stream by the squared norm of all that writes to them, each writer counted alike;
- neurons by |gate row| |up row| |down column|; key-value groups by |v rows| |o columns|, and inside a group
  the query heads by |q rows| |o columns|;
- the gain of a norm over d channels, of which d' hold a share r of the energy, times sqrt(r d / d'): then a
  kept channel leaves the norm with the value it had.

Widths can be sliced in models built of q, k, v, o, gate, up and down projections and RMSNorms (Llama,
Mistral, Qwen 2 and 3); blocks can be chosen in any. Everything not named by those is copied if its shape is
the same.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.models.checkpoints import quiet_transformers
from compress.models.conv1d import of_config
from compress.structured.blocks import (
    KeptBlocks,
    handed_on,
    keep_in_config,
    lists_of_blocks,
    renamed,
    require_first,
)
from compress.structured.slicing import Cuts, assembled, cut, cut_masks, held
from compress.structured.width import require_free_width

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_LAYOUT: dict[str, tuple[str | None, ...]] = {  # leaf of a module's name -> kinds of its weight's axes
    "embed_tokens": (None, "hidden"), "lm_head": (None, "hidden"),
    "q_proj": ("heads", "hidden"), "k_proj": ("kv", "hidden"), "v_proj": ("kv", "hidden"),
    "o_proj": ("hidden", "heads"), "gate_proj": ("neurons", "hidden"), "up_proj": ("neurons", "hidden"),
    "down_proj": ("hidden", "neurons"), **dict.fromkeys(_NORMS, ("hidden",)),
}  # fmt: skip


@dataclass(frozen=True)
class Widths:
    """What a student may have less of; all as in the configuration."""

    hidden: int
    neurons: int
    heads: int
    kv: int
    head: int  # width of one, never changed

    @classmethod
    def of(cls, config: Any) -> "Widths":
        """A model's."""
        heads = config.num_attention_heads
        return cls(
            config.hidden_size,
            getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def check(model: Any, blocks: KeptBlocks, widths: Widths) -> None:
    """Refuse what the model does not have or this file cannot slice.

    Raises:
        UserError: names the field.
    """
    for (name, found), field in zip(lists_of_blocks(model), ("blocks", "decoder_blocks"), strict=False):
        kept = blocks[name]
        if not kept:
            raise UserError(f"student.{field}: names none; name some, or leave it out to keep all")
        for block in kept:
            if not 0 <= block < len(found):
                raise UserError(f"student.{field}: {block}, but the model has blocks 0 to {len(found) - 1}")
        require_first(found, kept, f"student.{field}")
    own = Widths.of(model.config)
    for field, asked, has in (
        ("hidden", widths.hidden, own.hidden), ("intermediate", widths.neurons, own.neurons),
        ("heads", widths.heads, own.heads), ("kv_heads", widths.kv, own.kv),
    ):  # fmt: skip
        if asked > has:
            raise UserError(f"student.{field}: {asked}, but the model has only {has}; ask for no more")
    if widths.heads % widths.kv or widths.heads // widths.kv > own.heads // own.kv:
        raise UserError(
            f"student.heads: {widths.heads} query heads on {widths.kv} key-value heads; a multiple, with "
            f"at most {own.heads // own.kv} on each as in the model"
        )
    if widths.hidden != own.hidden:
        require_free_width(model, "student.hidden")
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if widths != own and not {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"} <= leaves:
        raise UserError(
            f"student: {type(model).__name__} can be given fewer blocks, not other widths; leave out hidden, "
            "intermediate, heads and kv_heads"
        )
    try:
        _config(model.config, blocks, widths).validate()
    except Exception as error:  # what is wrong is the last line of a chain of validators
        raise UserError(
            f"student: model_type '{model.config.model_type}' cannot have a width of {widths.hidden} and "
            f"{widths.heads} heads ({str(error).strip().splitlines()[-1].strip()}); choose others"
        ) from None


def _config(own: Any, blocks: KeptBlocks, widths: Widths) -> Any:
    """The student's, from the model's."""
    config = copy.deepcopy(own)
    keep_in_config(config, *blocks.values())
    if widths != Widths.of(own):
        config.hidden_size, config.intermediate_size = widths.hidden, widths.neurons
        config.num_attention_heads, config.num_key_value_heads = widths.heads, widths.kv
        config.head_dim = widths.head
    return config


def random(model: Any, blocks: KeptBlocks, widths: Widths, seed: int) -> Any:
    """A model of that shape with random weights, a function of the seed; torch's generator is left alone."""
    config = _config(model.config, blocks, widths)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        result = of_config(config, dtype=torch.float32)
    if result.can_generate():
        result.generation_config = copy.deepcopy(model.generation_config)
    return result.eval()


@torch.no_grad()
def subclone(
    model: Any, blocks: KeptBlocks, widths: Widths, masks: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """A model of that shape with weights taken from `model`, and the masks of what it took.

    `blocks`: which stay, of each list of blocks by its name, an encoder's first.

    Raises:
        UserError: a parameter of another shape that is not known.
    """
    cuts, gain = ({}, 1.0) if widths == Widths.of(model.config) else _choose(model, blocks, widths)
    taken = cut(held(model), cuts)
    if gain != 1.0:
        norms = [name for name in taken if _leaf(name) in _NORMS]
        taken |= {name: taken[name] * gain for name in norms}
    masks = cut_masks(masks, cuts)
    for (prefix, found), kept in zip(lists_of_blocks(model), blocks.values(), strict=True):
        taken = renamed(handed_on(taken, prefix, found, kept), prefix, kept)
        masks = renamed(masks, prefix, kept)
    return assembled(model, _config(model.config, blocks, widths), taken), masks


def _choose(model: Any, kept_blocks: KeptBlocks, widths: Widths) -> tuple[Cuts, float]:
    """What is kept of every parameter, and the factor on the gains of norms."""
    ((prefix, blocks),) = kept_blocks.items()
    channels, gain = _channels(model, prefix, widths)
    inside = {f"{prefix}.{block}.": _inside(model, f"{prefix}.{block}", widths) for block in blocks}
    cuts = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = next((found for block, found in inside.items() if name.startswith(block)), {})
        kept = {**own, "hidden": channels}
        kinds = _LAYOUT.get(_leaf(name), ())[: parameter.dim()]
        cuts[name] = [(axis, kept[kind]) for axis, kind in enumerate(kinds) if kind in kept]
    return cuts, gain


def _leaf(parameter: str) -> str:
    """The last part of the name of the module that holds a parameter."""
    return parameter.rpartition(".")[0].rpartition(".")[2]


def _channels(model: Any, prefix: str, widths: Widths) -> tuple[Tensor, float]:
    """The channels of the residual stream, over all blocks of the teacher, and the factor on gains."""
    writers = [model.get_input_embeddings().weight.detach().float().T]
    for block in range(model.config.num_hidden_layers):
        writers += [_weight(model, f"{prefix}.{block}", leaf) for leaf in ("o_proj", "down_proj")]
    energy = torch.stack([w.square().sum(1) / w.square().sum() for w in writers]).mean(0)  # (hidden,)
    chosen = _largest(energy, widths.hidden)
    share = float(energy[chosen].sum() / energy.sum())
    return chosen, (share * len(energy) / widths.hidden) ** 0.5


def _inside(model: Any, block: str, widths: Widths) -> dict[str, Tensor]:
    """The neurons and heads of a block, as entries of the axes of their kind."""
    own = Widths.of(model.config)
    gate, up, down, q, v, o = (
        _weight(model, block, f"{leaf}_proj") for leaf in ("gate", "up", "down", "q", "v", "o")
    )
    group = own.heads // own.kv
    sizes = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    out = o.T.reshape(own.heads, -1).norm(dim=1)  # (heads,)
    values = v.reshape(own.kv, -1).norm(dim=1)  # (kv,)
    groups = _largest(values * out.view(own.kv, group).norm(dim=1), widths.kv)
    queries = (q.reshape(own.heads, -1).norm(dim=1) * out).view(own.kv, group)
    heads = torch.cat([g * group + _largest(queries[g], widths.heads // widths.kv) for g in groups])
    one = torch.arange(own.head)
    return {
        "neurons": _largest(sizes, widths.neurons),
        "kv": (groups[:, None] * own.head + one).flatten(),
        "heads": (heads[:, None] * own.head + one).flatten(),
    }


def _weight(model: Any, block: str, leaf: str) -> Tensor:
    modules = model.get_submodule(block).named_modules()
    weight: Tensor = next(m for n, m in modules if n.rpartition(".")[2] == leaf).weight
    return weight.detach().float()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, rising; of equal ones the first."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values
