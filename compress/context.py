"""What a pass is lent while it runs; and what the training loop asks of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from compress.models.running import Precision
from compress.records.records import Lineage

if TYPE_CHECKING:  # text decides by what it says: no pass reaches the code that cuts it through this
    from compress.text.windows import TextData


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


class Tokens(Protocol):
    """Windows of equal length."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 (n, length)."""
        ...


class Text(Protocol):
    """What is read while training."""

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
    def heldout(self) -> Tokens:
        """Windows for the curve, scored by plain cross-entropy."""
        ...


class Surroundings(Protocol):
    """Text, place and device."""

    @property
    def data(self) -> Text:
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


class Classroom(Surroundings, Protocol):
    """What a training that learns from a model needs besides."""

    @property
    def teacher(self) -> Callable[[], Original]:
        """Loads the model that the run started from."""
        ...
