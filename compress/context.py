"""What a pass is lent while it runs; and how much of that a training asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from compress.models.running import Precision
from compress.records.manifest import Lineage

if TYPE_CHECKING:  # text decides by what it says: no pass reaches the code that cuts it through this
    from compress.text.windows import TextData

_Bundle = TypeVar("_Bundle", bound=Any)  # compress.Bundle, which stands above this file


class Original(Protocol):
    """The model that a run started from, as passes ask for it."""

    @property
    def model(self) -> Any:
        """In eval mode, float32."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its own."""
        ...

    @property
    def lineage(self) -> Lineage:
        """Where it comes from."""
        ...


@dataclass
class Context:
    """What the pipeline lends to a pass while it runs.

    Attributes:
        data: the disjoint token windows.
        teacher: loads the recipe's base model.
        seed: the only source of randomness a pass may use.
        workdir: a folder that survives a kill; gone once the step is done. Checkpoints and exports go here.
        device: where to compute.
        threads: CPU threads in use.
        precision: `bfloat16` where the machine computes it natively, else `float32`.
        logs: where trackers of a training write; stays with the run.
    """

    data: "TextData"
    teacher: Callable[[], Original]
    seed: int
    workdir: Path
    device: torch.device
    threads: int
    precision: Precision
    logs: Path | None = None


def lend(
    kind: str,
    bundle: _Bundle,
    data: "TextData",
    teacher: Callable[[], Original],
    *,
    seed: int,
    workdir: Path,
    device: torch.device,
    precision: Precision,
    logs: Path | None = None,
) -> tuple[_Bundle, Context]:
    """What a pass of a kind is called with: a bundle, with its exports for an export only, and a context."""
    context = Context(
        data=data,
        teacher=teacher,
        seed=seed,
        workdir=workdir,
        device=device,
        threads=torch.get_num_threads(),
        precision=precision,
        logs=logs,
    )
    return bundle if kind == "export" else bundle.evolve(exports={}), context


class TokenWindows(Protocol):
    """Windows of equal length."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 (n, length)."""
        ...


class TrainingText(Protocol):
    """The text that a training reads."""

    @property
    def window(self) -> int:
        """Inputs per window where a plan names none."""
        ...

    @property
    def train(self) -> NDArray[np.int32]:
        """The tokens to learn from, int32 (tokens,)."""
        ...

    @property
    def begin(self) -> tuple[int, ...]:
        """What every window that is cut from them begins with."""
        ...

    @property
    def end(self) -> tuple[int, ...]:
        """And ends with."""
        ...

    @property
    def heldout(self) -> TokenWindows:
        """Windows for the curve, scored by plain cross-entropy."""
        ...


class TrainingContext(Protocol):
    """What the training loop asks of a `Context`: text, place and device."""

    @property
    def data(self) -> TrainingText:
        """What to learn from."""
        ...

    @property
    def seed(self) -> int:
        """Of the data's order, of dropout and of sampling."""
        ...

    @property
    def workdir(self) -> Path:
        """Where the checkpoint lives."""
        ...

    @property
    def logs(self) -> Path | None:
        """Where trackers write; inside `workdir` if None."""
        ...

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        ...

    @property
    def precision(self) -> Precision:
        """What the forward pass computes in."""
        ...


class DistillationContext(TrainingContext, Protocol):
    """What a training asks for that learns from a teacher: the teacher, besides."""

    @property
    def teacher(self) -> Callable[[], Original]:
        """Loads the model that the run started from."""
        ...
