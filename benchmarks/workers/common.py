"""What every tool's process shares: what it is given, and what it leaves behind.

    python WORKER.py BASE CALIBRATION OUT SETTINGS

BASE is a Hugging Face folder in float32, CALIBRATION a .npy file of token windows, int32 (n, length), OUT an
empty folder, SETTINGS a JSON object. A worker loads BASE, quantizes with those windows, writes what its tool
writes to `OUT/artifact`, and says with `finish` how long that took; time and peak memory are of loading,
quantizing and writing, imports before it. Afterwards it may undo the codes: the weights that they stand for
go to `OUT/weights.safetensors` as float32 under the names of BASE, for the one scorer of all tools.

Imports only the standard library before a worker asks for more: it runs in every tool's own environment.
"""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Job:
    """The four arguments, and the clock."""

    def __init__(self) -> None:
        base, calibration, out, settings = sys.argv[1:]
        self.base, self.calibration, self.out = Path(base), Path(calibration), Path(out)
        self.settings: dict[str, Any] = json.loads(settings)
        self.artifact = self.out / "artifact"
        self.artifact.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()

    def start(self) -> None:
        """The imports are done."""
        self._began = time.monotonic()

    def windows(self) -> Any:
        """The calibration tokens, int64 (n, length)."""
        import numpy as np

        return np.load(self.calibration).astype(np.int64)

    def finish(self, linear_bytes: int, note: str = "", peak: int = 0) -> None:
        """The artifact is written: seconds, memory and bytes; `peak`: of memory, before the last."""
        seconds = time.monotonic() - self._began
        facts = {
            "seconds": seconds,
            "peak_rss_bytes": max(peak, peak_rss_bytes()),
            "file_bytes": weight_file_bytes(self.artifact),
            "linear_bytes": linear_bytes,
            "note": note,
        }
        (self.out / "facts.json").write_text(json.dumps(facts))

    def save_weights(self, weights: Mapping[str, Any]) -> None:
        """What the codes stand for: name -> tensor (out, in)."""
        import torch
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in weights.items()}
        save_file(tensors, self.out / "weights.safetensors")


def weight_file_bytes(folder: Path) -> int:
    """Of the files that hold weights; configuration and tokenizer are the same for every tool."""
    kinds = (".safetensors", ".gguf", ".pt", ".bin")
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in kinds)


def peak_rss_bytes() -> int:
    """Of this process and of its children that have ended."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * 1024


def linear_bytes(folder: Path, is_linear: Any = None) -> int:
    """Bytes of the tensors inside the decoder blocks that are matrices or belong to a layer's codes."""
    import math
    import struct

    total = 0
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
        for name, entry in header.items():
            inside = ".layers." in name and "norm" not in name
            if name != "__metadata__" and inside and math.prod(entry["shape"]):
                begin, end = entry["data_offsets"]
                total += end - begin
    return total
