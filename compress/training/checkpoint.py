"""The state of an optimisation on disk, so that a killed run ends with the same weights.

One safetensors file: the parameters that learn, optimiser states, and in its header's metadata a JSON text
with the step and the curve so far, and the SHA-256 of all of it: what a disk has damaged is not gone on with.
One file, replaced in one rename after an fsync, cannot be torn; and safetensors, unlike pickle, cannot run
code.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import UserError
from compress.host.tensor_files import opened
from compress.training import sharding
from compress.training.identity import digest_of

_META, _PROOF = "state", "sha256"


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and values of a model's parameters."""
    return digest_of(model.named_parameters())


def save(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    progress: dict[str, Any],
    others: Mapping[str, Tensor] | None = None,
    writes: bool = True,
) -> None:
    """Write parameters, optimiser states and `progress` (JSON) in place of what is there.

    Args:
        path: of the file.
        model: its parameters that learn are saved; what the others are is part of the identity.
        optimizers: their states are saved, by the names of the parameters.
        progress: JSON.
        others: more tensors, by name.
        writes: False gathers the shards that lie on this process and leaves writing to another.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"other.{name}": value for name, value in (others or {}).items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):  # SGD's momentum is None before its first step
                    tensors[f"optimizer.{number}.{key}.{names[id(parameter)]}"] = value
    tensors = {name: sharding.whole(value).contiguous() for name, value in tensors.items()}
    if not writes:
        return
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        said = json.dumps(progress)
        save_file(tensors, partial, metadata={_META: said, _PROOF: _proof(said, tensors)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the checkpoint cannot be written ({error}); free some space, run again"
        ) from None


def restore(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    identity: str,
    others: Mapping[str, Tensor] | None = None,
) -> dict[str, Any] | None:
    """Load what `save` wrote; None, with nothing changed, if there is none of this `identity`."""
    if not path.is_file():
        return None
    parameters = dict(model.named_parameters())
    try:
        with opened(path) as file:
            found = file.metadata() or {}
            progress: dict[str, Any] = json.loads(found[_META])
            if progress.get("identity") != identity:
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            if found.get(_PROOF) != _proof(found[_META], tensors):
                return None
    except (UserError, KeyError, ValueError, AttributeError, RecursionError):
        return None  # torn, or not ours: begin again
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "model":
                sharding.put(parameters[rest], value)
            elif kind == "other":
                sharding.put((others or {})[rest], value)
            else:
                number, field, name = rest.split(".", 2)
                parameter = parameters[name]
                spread = sharding.like(value, parameter) if value.shape == parameter.shape else value
                optimizers[int(number)].state[parameter][field] = spread.to(parameter.device)
    return progress


def _proof(said: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is said and of the tensors, in the order of their names."""
    named = ((f"{name} {t.dtype} {tuple(t.shape)}", t) for name, t in sorted(tensors.items()))
    return digest_of([(said, torch.empty(0)), *named])
