"""What may be asked of a teacher: the fields that distilling passes share."""

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.artifact.bundle import Bundle
from compress.context import Original
from compress.training.objectives.losses import Divergence
from compress.training.teaching.teachers import Teacher


class Guidance(BaseModel):
    """How to learn from one teacher or several."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teachers: tuple[Teacher, ...] = Field(
        (Teacher(),), min_length=1, description="whose distributions are averaged; default: the recipe's base"
    )
    divergence: Divergence = Field(
        "forward_kl", description="from the teacher's distribution to the student's"
    )
    temperature: float = Field(1.0, gt=0, le=100)
    cross_entropy: float = Field(0.2, ge=0, le=1, description="w: the weight of the text itself")
    targets: Literal["online", "cached"] = Field(
        "online", description="cached: the teacher runs once, beforehand, and sampled tokens are kept"
    )
    samples: int = Field(12, ge=1, le=1024, description="tokens kept per position (cached only)")
    hidden: float = Field(
        0.0, ge=0, le=1e4, description="weight of the distance of hidden states at the start"
    )
    hidden_pairs: tuple[tuple[int, int], ...] | None = Field(
        None, min_length=1, description="(student's block, teacher's block); spread over the depth if null"
    )
    relations: float = Field(
        0.0, ge=0, le=1e4, description="weight of the divergence of attention relations at the start"
    )
    relation_blocks: tuple[int, int] = Field(
        (-1, -1), description="(student's block, teacher's block) whose relations are matched; -1: the last"
    )
    relation_heads: int | None = Field(
        None, ge=1, le=4096, description="heads the relations are cut into; the student's where they divide"
    )
    fade: float = Field(
        0.5, gt=0, le=1, description="share of the steps over which both weights fall to zero"
    )
    on_policy: float = Field(
        0.0, ge=0, le=1, description="share of the steps whose text the student itself continues"
    )
    prompt: float = Field(
        0.5, gt=0, lt=1, description="share of a window that stays as text (on-policy only)"
    )

    @model_validator(mode="after")
    def _cache_holds_what_is_needed(self) -> "Guidance":
        if self.targets == "online":
            return self
        if self.divergence != "forward_kl":
            raise ValueError(
                f"targets: cached samples estimate forward_kl only, not {self.divergence}; use online"
            )
        for field in ("hidden", "relations", "on_policy"):
            if getattr(self, field):
                raise ValueError(f"targets: with cached ones the teacher does not run, which {field} needs; "
                                 "use online")  # fmt: skip
        return self

    def load_teachers(self, base: Callable[[], Original]) -> list[tuple[Original, float]]:
        """The teachers and their weights; `base` loads the recipe's."""
        return [(base() if t.model == "base" else Bundle.load(t.model), t.weight) for t in self.teachers]

    def learns_from_base(self) -> bool:
        """Whether the recipe's base is among the teachers."""
        return any(teacher.model == "base" for teacher in self.teachers)

    def other_models(self) -> tuple[str, ...]:
        """The models it learns from besides the recipe's base."""
        return tuple(teacher.model for teacher in self.teachers if teacher.model != "base")
