"""Keeps pruned weights, and their gradients, at exactly zero while the rest trains."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.training import sharding


class Masks:
    """Masks of linear layers, (out, in), True where a weight is kept.

    Attributes:
        tensors: module name -> mask; what a checkpoint must hold if they change.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.modules = {name: model.get_submodule(name) for name in masks}
        self.tensors: dict[str, Tensor] = {}
        self.dropped: dict[str, Tensor] = {}
        for name, kept in masks.items():
            self.tensors[name] = kept.to(self._weight(name).device).clone()
        self.refresh()

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Put new masks in the place of those of some layers, and zeros where they say so."""
        if masks:
            for name, kept in masks.items():
                self.tensors[name].copy_(kept)
            self.refresh()
            self.weights()

    def refresh(self) -> None:
        """Follow `tensors` after they were changed in place."""
        for name, kept in self.tensors.items():
            self.dropped[name] = sharding.like(~kept, self._weight(name))

    def layers(self) -> dict[str, Tensor]:
        """The weights as they stand, whole, (out, in)."""
        return {name: sharding.whole(self._weight(name).detach()) for name in self.modules}

    def kept(self) -> dict[str, Tensor]:
        """The masks as they stand, (out, in)."""
        return {name: kept.contiguous() for name, kept in self.tensors.items()}

    @torch.no_grad()
    def weights(self) -> None:
        """Before the first and after every step: Muon's update, unlike its gradient, is dense."""
        for name, dropped in self.dropped.items():
            self._weight(name).masked_fill_(dropped, 0.0)

    def gradients(self) -> None:
        """Before the norm is taken."""
        for name, dropped in self.dropped.items():
            gradient = self._weight(name).grad
            if gradient is not None:
                gradient.masked_fill_(dropped, 0.0)

    def by_parameter(self) -> dict[int, Tensor]:
        """The id of a weight -> True where it is pruned, (out, in)."""
        return {id(self._weight(name)): dropped for name, dropped in self.dropped.items()}

    def _weight(self, name: str) -> nn.Parameter:
        weight = self.modules[name].weight  # looked up each time: sharding puts another in its place
        assert isinstance(weight, nn.Parameter)
        return weight
