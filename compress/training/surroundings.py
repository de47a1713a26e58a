"""What a training needs around it; a pass's context is one."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from compress.training.forward import Precision


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
