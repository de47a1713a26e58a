"""Matching what lies inside two models: hidden states, and the relations between positions.

Hidden states (Romero et al. 2015, FitNets; Jiao et al. 2020, TinyBERT): over pairs (student block, teacher
block) the mean over positions of  |W h_s - h_t|^2 / |h_t|^2,  W learned where the widths differ, and then
thrown away.

Relations (Wang et al. 2020, MiniLMv2, arXiv 2012.15828): the queries of one block, all heads side by side,
are cut anew into A relation heads of width d; R_QQ = softmax(Q Q^T / sqrt(d)) says how positions relate, and
L = sum over Q, K, V of the mean over heads and positions of KL(R_teacher || R_student). Student and teacher
need not have the same width or number of heads. A decoder's relations look back only, as its attention does.
Positions of padding neither count nor are related to.

Cost: a few products per pair; relations: three (rows, A, window, window) per model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.stacks import decoder_blocks

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_PACKED = ("c_attn", "Wqkv")  # queries, keys and values side by side, one third each
_NEVER = -1e4  # a score whose softmax is 0 in float32, and whose logarithm is still a number


def hidden_distance(
    student: Tensor, teacher: Tensor, through: nn.Module, mask: Tensor | None = None
) -> Tensor:
    """Mean over positions of |W h_s - h_t|^2 / |h_t|^2: (..., d_s), (..., d_t) -> scalar.

    `mask`: (...), nonzero at the positions that count; all while None.

    1 for a student that says 0. Each position counts alike, however large a few of the teacher's states are.
    """
    wanted = teacher.float()
    distances = (through(student.float()) - wanted).pow(2).sum(-1)
    shares = distances / wanted.pow(2).sum(-1).clamp(min=1e-12)
    return shares.mean() if mask is None else shares[mask.bool()].mean()


def relation_divergence(
    student: Tensor, teacher: Tensor, heads: int, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Mean over relation heads and positions of KL(R_teacher || R_student), in nats.

    Args:
        student: queries, keys or values, (rows, window, d_s).
        teacher: the same, (rows, window, d_t).
        heads: A, dividing both widths.
        causal: a position relates to itself and those before only.
        mask: (rows, window), nonzero where there is text; all while None.
    """
    log_s, log_t = (_log_relations(x, heads, causal, mask) for x in (student, teacher))
    if mask is None:
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True) / log_s[..., 0].numel()
    divergences = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)  # (rows, heads, window)
    return divergences.transpose(1, 2)[mask.bool()].mean()


def _log_relations(x: Tensor, heads: int, causal: bool, mask: Tensor | None) -> Tensor:
    rows, window, width = x.shape
    x = x.float().view(rows, window, heads, width // heads).transpose(1, 2)  # (rows, heads, window, d)
    scores = x @ x.mT / math.sqrt(width // heads)  # (rows, heads, window, window)
    if causal:
        later = torch.ones(window, window, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, _NEVER)
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None], _NEVER)
    return F.log_softmax(scores, dim=-1)


def uniform_pairs(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Each student block with the teacher block that ends the same share of the depth, last with last.

    >>> uniform_pairs(2, 4), uniform_pairs(3, 4)
    (((0, 1), (1, 3)), ((0, 0), (1, 2), (2, 3)))
    """
    return tuple((i, max(0, round((i + 1) * teacher / student) - 1)) for i in range(student))


def relation_heads(widths: list[int], most: int) -> int:
    """The largest number of heads, up to `most`, that divides all widths.

    >>> relation_heads([64, 32, 96, 48], 6)
    4
    """
    common = math.gcd(*widths)
    return max(h for h in range(1, most + 1) if common % h == 0)


class Taps:
    """What some modules of a model last put out.

    Attributes:
        values: name -> its output, (rows, window, width).
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.values: dict[str, Tensor] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Listen while the block runs."""

        def tap(name: str) -> Any:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                self.values[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [model.get_submodule(name).register_forward_hook(tap(name)) for name in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.values.clear()


def block_names(model: Any) -> list[str]:
    """The names of a model's blocks."""
    name, blocks = decoder_blocks(model)
    return [f"{name}.{i}" for i in range(len(blocks))]


def looks_back(model: Any) -> bool:
    """Whether the blocks attend to what came before only, whatever the head is for."""
    blocks = decoder_blocks(model)[1]
    return any(getattr(module, "is_causal", False) is True for module in blocks.modules())


def attention_inputs(model: Any, block: int) -> list[str]:
    """Names of the layers that make a block's queries, keys and values: three, or one that packs them.

    Raises:
        UserError: none that is known.
    """
    prefix = block_names(model)[block]
    inside = {n.rpartition(".")[2]: f"{prefix}.{n}" for n, _ in model.get_submodule(prefix).named_modules()}
    for leaves in _SEPARATE:
        if set(leaves) <= inside.keys():
            return [inside[leaf] for leaf in leaves]
    for leaf in _PACKED:
        if leaf in inside:
            return [inside[leaf]]
    raise UserError(
        f"relations: no queries, keys and values are known of in {type(model).__name__}; leave them at 0"
    )


def parts(taps: Taps, names: list[str]) -> tuple[Tensor, ...]:
    """Queries, keys and values, (rows, window, width) each."""
    if len(names) == 1:
        return taps.values[names[0]].chunk(3, dim=-1)
    return tuple(taps.values[name] for name in names)


def widths(model: Any, names: list[str]) -> list[int]:
    """Of queries, keys and values."""
    rows = []
    for name in names:
        out = model.get_submodule(name).weight.shape[0]
        rows += [out // 3] * 3 if len(names) == 1 else [out]
    return rows
