"""Files read a second time, from the definitions of their formats: what was loaded must be what they say."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .forked import Wrong


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `Wrong` where it has a name twice, of which a reader takes one."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise Wrong("a name is given twice, and one of the two was taken")
    return dict(pairs)


_FREE = {"config", "changed", "notes", "machine", "protocol"}  # of records: what holds any value


def require_said(found: Any, said: Any) -> None:
    """What a record holds is what its JSON says; what it does not say is a default."""
    if isinstance(said, Mapping) and isinstance(found, Mapping):
        for key, value in said.items():
            if key in _FREE and json.dumps(found.get(key)) == json.dumps(value):
                continue
            if key in found:
                require_said(found[key], value)
    elif isinstance(said, list) and isinstance(found, list):
        if len(said) != len(found):
            raise Wrong(f"{len(found)} entries of {len(said)}")
        for one, other in zip(found, said, strict=True):
            require_said(one, other)
    elif isinstance(said, float) and (said != said or said in (float("inf"), -float("inf"))):
        raise Wrong(f"{said} passes for a number that was measured")
    elif isinstance(said, str) and not isinstance(found, str | None):
        if str(found) != said and float(said) != found:  # a number that is written as text is that number
            raise Wrong(f"{found!r:.60} where the file says {said!r:.60}")
    elif found != (float(said) if isinstance(found, float) and isinstance(said, int) else said):
        raise Wrong(f"{found!r:.60} where the file says {said!r:.60}")


_KINDS = {
    "F32": "<f4",
    "F16": "<f2",
    "F64": "<f8",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "u1",
    "I8": "i1",
    "BOOL": "?",
}


def stored(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, from the definition of the format."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        raw = data[8 + length :][slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(raw, _KINDS[entry["dtype"]])
        found[name] = array.reshape(entry["shape"])
    return found


def require_stored(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """A model's state is what the safetensors files of a folder hold, all of it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    held: dict[str, np.ndarray] = {}
    for name in files:
        held |= stored(folder / name)
    for name, array in held.items():
        other = next(
            (state[key] for key in (name, f"model.{name}", f"transformer.{name}") if key in state), None
        )
        if other is None:
            if not name.endswith(("lm_head.weight", "position_ids", ".attn.bias", ".masked_bias")):
                raise Wrong(f"'{name}' is stored and not used")
            continue
        value = other.detach().float().numpy()
        if value.shape != array.shape:
            value = value.T
        if value.shape != array.shape or not np.array_equal(value, array.astype(np.float32)):
            raise Wrong(f"'{name}' is not what the file holds")


def require_same_values(file: Path, model: torch.nn.Module) -> None:
    """A model's parameters are, but for the order of values, what a GGUF file holds."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with contextlib.redirect_stderr(io.StringIO()):
        tensors = GGUFReader(file).tensors
    wanted = sorted(_sorted_hash(dequantize(t.data, t.tensor_type)) for t in tensors if "rope" not in t.name)
    found = {_sorted_hash(p.detach().numpy()) for p in model.parameters()}
    missing = [value for value in wanted if value not in found]
    if missing or len(wanted) < len(list(model.parameters())):
        raise Wrong(f"{len(missing)} of {len(wanted)} tensors are not in the model as the file holds them")


def _sorted_hash(array: np.ndarray) -> str:
    values = np.sort(np.asarray(array, dtype=np.float32).reshape(-1)) + 0.0  # no -0
    return f"{len(values)} {hashlib.sha256(values.tobytes()).hexdigest()}"
