"""The teacher's answers, computed once and stored: a few sampled tokens per position (solvers/sampling.py).

    loss = T^2 [ - sum over taken of weight log q_T(token) - H(p_T) ],   E[loss] = T^2 KL(p_T || q_T)

and so for its gradient. With 12 tokens a position takes 76 bytes (100 where the vocabulary is beyond 65,536),
against 98,304 for float16 logits of a vocabulary of 49,152. It pays where windows are seen more than once,
or where both models do not fit in memory: the teacher is dropped before training begins. Windows do not move
between epochs, so that their targets hold.

Targets lie in the step's work folder, in parts that appear whole: a resumed run computes only what is
missing. Processes share the parts among them.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import UserError
from compress.host.progress import SILENT, track
from compress.host.tensor_files import opened
from compress.solvers.sampling import sample
from compress.training.batches import Batches

_PART = 256  # windows per file
_ELEMENTS = 1 << 20  # probabilities per block of sampling: 4 MB of float32
_TOKENS = 2048  # per forward pass of the teacher


def sampled_kl(logits: Tensor, ids: Tensor, weights: Tensor, entropy: Tensor, temperature: float) -> Tensor:
    """An unbiased estimate of T^2 KL(p_T || q_T), from sampled targets.

    Args:
        logits: z, (n, v).
        ids: tokens taken, (n, k).
        weights: theirs, (n, k), rows sum to 1.
        entropy: H(p_T), (n,), in nats.
        temperature: T, that of the targets.
    """
    log_q = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids)  # (n, k)
    return temperature**2 * (-(weights * log_q).sum(-1) - entropy).mean()


class SampledTargets:
    """Targets of the windows that a run visits.

    Attributes:
        numbers: of the windows, rising.
        samples: tokens per position, or all there are.
        bytes: on disk.
    """

    def __init__(self, folder: Path, numbers: NDArray[np.int64], samples: int) -> None:
        self.folder, self.numbers, self.samples = folder, numbers, samples
        self.parts = [self._path(n) for n in range(-(-len(numbers) // _PART))]
        self._open: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(part.stat().st_size for part in self.parts)

    def build(
        self,
        teacher: Callable[[Tensor], Tensor],
        batches: Batches,
        temperature: float,
        identity: str,
        device: torch.device,
        process: tuple[int, int] = (0, 1),
    ) -> "SampledTargets":
        """Compute what is not there yet.

        Args:
            teacher: tokens (rows, window) -> logits y with softmax(y / T) the target, (rows * window, v).
            batches: the windows, that do not move.
            temperature: T.
            identity: what the targets depend on; parts of another are computed anew.
            device: where the teacher is.
            process: (rank, count): this one's share of the parts; it waits for the others'.

        Raises:
            UserError: the disk is full.
        """
        facts = [identity, batches.window, batches.seed, temperature, self.samples, *batches.begin]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(np.ascontiguousarray(batches.stream).data)
        mark = digest.hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [n for n in range(len(self.parts)) if not self._whole(n, mark)]
        mine = [n for n in missing if n % process[1] == process[0]]
        with _bar(sum(len(self._of(n)) for n in mine), process[0] == 0) as bar:
            for number in mine:
                self._write(number, teacher, batches, temperature, mark, device, bar)
            while not all(self._whole(n, mark) for n in missing):
                time.sleep(0.2)  # for the other processes'
            positions = len(self.numbers) * batches.window
            if missing:
                bar.note(
                    f"teacher's targets: {positions:,} positions, {self.samples} tokens each, "
                    f"{self.bytes / 1e6:,.1f} MB"
                )
        return self

    def rows(self, windows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Targets of some windows: ids and weights (windows * window, k), entropies (windows * window,)."""
        found = []
        for place in np.searchsorted(self.numbers, windows):
            part, index = divmod(int(place), _PART)
            if part not in self._open:
                self._open[part] = safe_open(self.parts[part], framework="pt")
            file = self._open[part]
            found.append([file.get_slice(key)[index] for key in ("ids", "weights", "entropy")])
        ids, weights, entropy = (torch.cat(column).to(device) for column in zip(*found, strict=True))
        return ids.long(), weights, entropy

    def _of(self, number: int) -> NDArray[np.int64]:
        return self.numbers[number * _PART : (number + 1) * _PART]

    def _path(self, number: int) -> Path:
        return self.folder / f"targets-{number:05}.safetensors"

    def _whole(self, number: int, mark: str) -> bool:
        try:
            with opened(self.parts[number]) as file:
                return (file.metadata() or {}).get("mark") == mark
        except UserError:
            return False

    @torch.no_grad()
    def _write(
        self,
        number: int,
        teacher: Callable[[Tensor], Tensor],
        batches: Batches,
        temperature: float,
        mark: str,
        device: torch.device,
        bar: Any,
    ) -> None:
        window, k = batches.window, self.samples
        columns: list[list[Tensor]] = [[], [], []]
        for windows in np.array_split(self._of(number), -(-len(self._of(number)) * window // _TOKENS)):
            if not len(windows):
                continue
            tokens = torch.from_numpy(np.stack([batches.fixed(int(n))[:-1] for n in windows])).to(device)
            # one number per position, a function of the seed and the window
            uniform = [np.random.default_rng([batches.seed, int(n)]).random(window) for n in windows]
            draws = torch.from_numpy(np.concatenate(uniform)).to(device)
            logits = teacher(tokens)  # (windows * window, v)
            wide = logits.shape[1] > 2**16
            rows = max(1, _ELEMENTS // logits.shape[1])
            for y, u in zip(logits.split(rows), draws.split(rows), strict=True):
                log_p = torch.log_softmax(y.float() / temperature, dim=-1)
                p = log_p.exp()
                ids, weights = sample(p, k, u)
                entropy = -p.mul_(log_p.clamp_(min=-1e4)).sum(-1)
                made = (ids.to(torch.int32 if wide else torch.uint16), weights, entropy)
                for column, value in zip(columns, made, strict=True):
                    column.append(value.cpu())
            bar.advance(len(windows))
        ids, weights, entropy = (torch.cat(column) for column in columns)
        tensors = {
            "ids": ids.view(-1, window, ids.shape[1]),
            "weights": weights.view(-1, window, ids.shape[1]),
            "entropy": entropy.view(-1, window),
        }
        path = self.parts[number]
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"mark": mark})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"{path}: the teacher's targets cannot be written ({error}); free some space, run again"
            ) from None


def _bar(total: int, main: bool) -> Any:
    from contextlib import nullcontext

    return track(total, "teacher's targets", "windows") if main else nullcontext(SILENT)
