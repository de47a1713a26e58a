"""Run an artifact in PyTorch: the reloaded bundle behind the runtime's face.

Method. The bundle is loaded from disk, put into eval mode, and called under `inference_mode` with the
key-value cache that the architecture itself makes. Logits leave as float32, whatever the weights' type.
Quantized layers rebuild their float weights in each call, so resident weights stay those of the codes,
and a decode step costs at least one pass over the dequantized model: int8 and int4 are smaller here, not
faster.

Limits: CPU unless the bundle says otherwise. torch knows only a process-wide number of threads: it is set
for the time of each call and put back afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.bundle import Bundle, parameter_counts, weight_bytes
from compress.runtimes.base import Logits, State, Tokens
from compress.tasks import Task, longest_text, task_of


@dataclass
class TorchState:
    """Key-value cache, the logits that follow it [batch, V], and how many tokens it holds."""

    cache: Any
    logits: Logits
    length: int


class TorchRuntime:
    """An artifact folder, Hugging Face folder or GGUF file, loaded in torch."""

    name = "torch"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        with self._session():
            bundle = Bundle.load(path, masks=False)
            self._model: Any = bundle.model.eval()
        self.task: Task = task_of(self._model.config)
        self.mask_token: int | None = bundle.tokenizer.mask_token_id if self.task == "masked" else None
        accepted = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.device = str(self._model.device)
        self.weight_bytes = weight_bytes(self._model)

    @property
    def context(self) -> int:
        """The largest number of tokens the model takes."""
        return longest_text(self._model)

    def parameter_counts(self) -> tuple[int, int]:
        """(parameters, those that are not zero), tied ones once."""
        return parameter_counts(self._model)

    def logits(self, tokens: Tokens) -> Logits:
        """[batch, length] -> float32 [batch, length, V], or hidden states [batch, length, width]."""
        with self._session():
            if self.task == "causal":
                return _numpy(self._model(input_ids=self._ids(tokens), use_cache=False).logits)
            return _numpy(self._model(input_ids=self._ids(tokens))[0])

    def prefill(self, tokens: Tokens) -> TorchState:
        """Read prompts [batch, length] into a fresh cache."""
        with self._session():
            if self.task != "causal":
                scores = self._model(input_ids=self._ids(tokens))[0]
                return TorchState(None, _numpy(scores[:, -1]), tokens.shape[1])
            return self._step(tokens, None, 0)

    def decode(self, state: State, tokens: Tokens) -> TorchState:
        """Append one token per row, [batch]. The cache grows in place: the state given is used up."""
        if not isinstance(state, TorchState):
            raise TypeError(f"a state of the torch runtime is wanted, not {type(state).__name__}")
        with self._session():
            return self._step(tokens[:, None], state.cache, state.length)

    def _step(self, tokens: Tokens, cache: Any, length: int) -> TorchState:
        out = self._model(
            input_ids=self._ids(tokens), past_key_values=cache, use_cache=True, **self._last_only
        )
        return TorchState(out.past_key_values, _numpy(out.logits[:, -1]), length + tokens.shape[1])

    def _ids(self, tokens: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(tokens, np.int64)).to(self._model.device)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Inference mode on this runtime's number of threads."""
        before = torch.get_num_threads()
        if before != self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            if before != self._threads:
                torch.set_num_threads(before)


def _numpy(tensor: torch.Tensor) -> Logits:
    return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)
