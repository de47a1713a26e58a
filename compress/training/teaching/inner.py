"""What is matched inside student and teacher: hidden states and relations, faded over the first steps.

Padding counts for nothing: `mask` says which positions are text. A model whose blocks look back only, a
decoder with whatever head, has relations that look back only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.tasks.registry import task_of
from compress.training.objectives.base import Moment
from compress.training.teaching import matching
from compress.training.teaching.guidance import Guidance
from compress.training.teaching.teachers import Teachers


class Inner:
    """What is matched inside the models, if anything is."""

    def __init__(self, guidance: Guidance, student: Any, teachers: Teachers, seed: int) -> None:
        self.guidance, self.teacher = guidance, teachers.models[0]
        self.causal = task_of(student.config).continues or matching.looks_back(student)
        self.pairs: list[tuple[str, str]] = []
        self.relations: tuple[list[str], list[str]] = ([], [])
        self.maps = nn.ModuleList()
        self.heads = 0
        self.notes: dict[str, Any] = {}
        if (guidance.hidden or guidance.relations) and len(teachers.models) > 1:
            raise UserError("teachers: hidden states and relations are matched with one teacher; give one")
        if guidance.hidden:
            self._pair_blocks(student, seed)
        if guidance.relations:
            self._relate(student)
        self.student_taps = matching.Taps([s for s, _ in self.pairs] + self.relations[0])
        self.teacher_taps = matching.Taps([t for _, t in self.pairs] + self.relations[1])

    def loss(self, moment: Moment, device: torch.device, mask: Tensor | None = None) -> Tensor | float:
        """The faded sum of both distances, for what the models last computed.

        `mask`: (rows, window), nonzero where there is text; all of it while None.
        """
        weight = max(0.0, 1 - moment.share / self.guidance.fade)
        if not weight:
            return 0.0
        total = torch.zeros((), device=device)
        s, t = self.student_taps, self.teacher_taps
        for (mine, its), through in zip(self.pairs, self.maps, strict=True):
            distance = matching.hidden_distance(s.values[mine], t.values[its], through, mask)
            total = total + self.guidance.hidden / len(self.pairs) * distance
        if self.relations[0]:
            ours, theirs = matching.parts(s, self.relations[0]), matching.parts(t, self.relations[1])
            for left, right in zip(ours, theirs, strict=True):
                divergence = matching.relation_divergence(left, right, self.heads, self.causal, mask)
                total = total + self.guidance.relations * divergence
        return weight * total

    @contextmanager
    def watching(self, student: Any) -> Iterator[None]:
        """Listen to both models while the block runs."""
        with self.student_taps.on(student), self.teacher_taps.on(self.teacher):
            yield

    def _pair_blocks(self, student: Any, seed: int) -> None:
        ours, theirs = matching.block_names(student), matching.block_names(self.teacher)
        pairs = self.guidance.hidden_pairs or matching.uniform_pairs(len(ours), len(theirs))
        for mine, its in pairs:
            self.pairs.append((_at(ours, mine, "hidden_pairs"), _at(theirs, its, "hidden_pairs")))
        small, large = (model.config.get_text_config() for model in (student, self.teacher))
        widths = small.hidden_size, large.hidden_size
        generator = torch.Generator().manual_seed(seed)
        for _ in self.pairs:
            self.maps.append(nn.Identity() if widths[0] == widths[1] else linear_map(*widths, generator))
        self.notes["hidden_pairs"] = [list(pair) for pair in pairs]

    def _relate(self, student: Any) -> None:
        blocks, models = self.guidance.relation_blocks, (student, self.teacher)
        for model, block in zip(models, blocks, strict=True):
            _at(matching.block_names(model), block, "relation_blocks")
        self.relations = (
            matching.attention_inputs(student, blocks[0]),
            matching.attention_inputs(self.teacher, blocks[1]),
        )
        widths = [w for m, n in zip(models, self.relations, strict=True) for w in matching.widths(m, n)]
        wanted = self.guidance.relation_heads
        if wanted and any(width % wanted for width in widths):
            raise UserError(
                f"relation_heads: {wanted} does not divide the widths {sorted(set(widths))} of queries, keys "
                f"and values; take one that does, as {matching.relation_heads(widths, wanted)}"
            )
        self.heads = wanted or matching.relation_heads(
            widths, student.config.get_text_config().num_attention_heads
        )
        self.notes["relation_heads"] = self.heads


def linear_map(narrow: int, wide: int, generator: torch.Generator) -> nn.Linear:
    """W: (teacher's width, student's width), rows of norm about 1."""
    # the caller's random numbers stay as they are
    layer = nn.utils.skip_init(nn.Linear, narrow, wide, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(wide, narrow, generator=generator) / narrow**0.5)
    return layer


def _at(names: list[str], block: int, field: str) -> str:
    if not -len(names) <= block < len(names):
        raise UserError(f"{field}: block {block} of a model with {len(names)}; count from 0")
    return names[block]
