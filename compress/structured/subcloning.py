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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.checkpoints import quiet_transformers
from compress.models.stacks import decoder_blocks
from compress.structured.blocks import keep_in_config
from compress.structured.width import require_free_width
from compress.tasks.registry import auto_class

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


def check(model: Any, blocks: list[int], widths: Widths) -> None:
    """Refuse what the model does not have or this file cannot slice.

    Raises:
        UserError: names the field.
    """
    _, found = decoder_blocks(model)
    if not blocks:
        raise UserError("student.blocks: names none; name some, or leave it out to keep all")
    for block in blocks:
        if not 0 <= block < len(found):
            raise UserError(f"student.blocks: {block}, but the model has blocks 0 to {len(found) - 1}")
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


def _config(own: Any, blocks: list[int], widths: Widths) -> Any:
    """The student's, from the model's."""
    config = copy.deepcopy(own)
    keep_in_config(config, blocks)
    if widths != Widths.of(own):
        config.hidden_size, config.intermediate_size = widths.hidden, widths.neurons
        config.num_attention_heads, config.num_key_value_heads = widths.heads, widths.kv
        config.head_dim = widths.head
    return config


def smaller(model: Any, blocks: list[int], widths: Widths, seed: int) -> Any:
    """A model of that shape with random weights, a function of the seed; torch's generator is left alone."""
    config = _config(model.config, blocks, widths)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        result = auto_class(config).from_config(config, dtype=torch.float32)
    result.generation_config = copy.deepcopy(model.generation_config)
    return result.eval()


class Cut:
    """Which entries of a model a student takes."""

    def __init__(self, model: Any, blocks: list[int], widths: Widths) -> None:
        self.model, self.blocks, self.widths, self.own = model, blocks, widths, Widths.of(model.config)
        self.prefix, _ = decoder_blocks(model)
        self.whole = widths == self.own
        self.entries: dict[tuple[int | None, str], Tensor] = {}
        self.gain = 1.0
        if not self.whole:
            self._choose_channels()
            for block in blocks:
                self._choose_inside(block)

    def origin(self, name: str) -> tuple[int | None, str]:
        """A student's parameter or module: (the teacher's block, its name there)."""
        if not name.startswith(f"{self.prefix}."):
            return None, name
        number, _, rest = name.removeprefix(f"{self.prefix}.").partition(".")
        block = self.blocks[int(number)]
        return block, f"{self.prefix}.{block}.{rest}"

    def cut(self, name: str, tensor: Tensor, leaf: str) -> Tensor:
        """The student's part of a teacher's tensor that belongs to the student's module `name`."""
        if self.whole or leaf not in _LAYOUT:
            return tensor
        block, _ = self.origin(name)
        for axis, kind in enumerate(_LAYOUT[leaf][: tensor.dim()]):
            if kind is not None:
                chosen = self.entries[None if kind == "hidden" else block, kind]
                tensor = tensor.index_select(axis, chosen.to(tensor.device))
        return tensor

    @torch.no_grad()
    def fill(self, student: Any) -> None:
        """Copy the chosen entries into the student.

        Raises:
            UserError: a parameter of another shape that is not known.
        """
        source = dict(self.model.named_parameters())
        for name, target in student.named_parameters():
            module, _, _ = name.rpartition(".")
            leaf = module.rpartition(".")[2]
            value = self.cut(module, source[self.origin(name)[1]], leaf)
            if value.shape != target.shape:
                raise UserError(
                    f"student: it is not known how to slice '{name}'; leave out hidden, intermediate, heads "
                    "and kv_heads"
                )
            target.copy_(value * self.gain if leaf in _NORMS and not self.whole else value)

    def _weight(self, block: int, leaf: str) -> Tensor:
        modules = self.model.get_submodule(f"{self.prefix}.{block}").named_modules()
        return next(m for n, m in modules if n.rpartition(".")[2] == leaf).weight.detach().float()

    def _choose_channels(self) -> None:
        """The channels of the residual stream, over all blocks of the teacher."""
        writers = [self.model.get_input_embeddings().weight.detach().float().T]
        for block in range(self.model.config.num_hidden_layers):
            writers += [self._weight(block, "o_proj"), self._weight(block, "down_proj")]
        energy = torch.stack([w.square().sum(1) / w.square().sum() for w in writers]).mean(0)  # (hidden,)
        chosen = _largest(energy, self.widths.hidden)
        share = float(energy[chosen].sum() / energy.sum())
        self.gain = (share * self.own.hidden / self.widths.hidden) ** 0.5
        self.entries[None, "hidden"] = chosen

    def _choose_inside(self, block: int) -> None:
        """The neurons and heads of a block."""
        own, head, group = self.own, self.own.head, self.own.heads // self.own.kv
        down = self._weight(block, "down_proj").norm(dim=0)
        sizes = (
            self._weight(block, "gate_proj").norm(dim=1) * self._weight(block, "up_proj").norm(dim=1) * down
        )
        self.entries[block, "neurons"] = _largest(sizes, self.widths.neurons)
        out = self._weight(block, "o_proj").T.reshape(own.heads, -1).norm(dim=1)  # (heads,)
        values = self._weight(block, "v_proj").reshape(own.kv, -1).norm(dim=1)  # (kv,)
        groups = _largest(values * out.view(own.kv, group).norm(dim=1), self.widths.kv)
        queries = self._weight(block, "q_proj").reshape(own.heads, -1).norm(dim=1) * out
        each = self.widths.heads // self.widths.kv
        heads = torch.cat([g * group + _largest(queries.view(own.kv, group)[g], each) for g in groups])
        inside = torch.arange(head)
        self.entries[block, "kv"] = (groups[:, None] * head + inside).flatten()
        self.entries[block, "heads"] = (heads[:, None] * head + inside).flatten()


def masks(cut: Cut, student: nn.Module, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks of what a student took over, under its own names: (out, in) each."""
    result = {}
    for name, _ in student.named_modules():
        origin = cut.origin(name)[1] if name else ""
        if origin in held:
            result[name] = cut.cut(name, held[origin], name.rpartition(".")[2])
    return result


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, rising; of equal ones the first."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values
