"""Run an artifact in PyTorch: the reloaded bundle behind the runtime's face.

Method. The bundle is loaded from disk, put into eval mode, and called under `inference_mode` with the
key-value cache that the architecture itself makes. Logits leave as float32, whatever the weights' type.
Quantized layers rebuild their float weights in each call, so resident weights stay those of the codes,
and a decode step costs at least one pass over the dequantized model: int8 and int4 are smaller here, not
faster. Where an architecture gives back nothing to go on with, each step reads the whole text again.

Limits: CPU unless the bundle says otherwise. torch knows only a process-wide number of threads: it is set
for the time of each call and put back afterwards.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from compress.artifact.bundle import Bundle
from compress.artifact.counts import parameter_counts, weight_bytes
from compress.models.attention import strays, turning_point
from compress.models.checkpoints import load_tokenizer, loading
from compress.models.running import device_of
from compress.models.stock import load_compressed_tensors
from compress.runtimes.base import Logits, State, Tokens
from compress.tasks import seq2seq
from compress.tasks.base import Task, longest_text
from compress.tasks.registry import task_of

# Tokens of a prompt that go through the model at once. 8192 tokens through 4 blocks of width 256, whose cache
# is 34 MB, took 198 MB at once, 116 MB by 512, and 89 MB by 128, in nearly twice the time.
_CHUNK = 512
# Fixed work of a block of a decoded token, in bytes that are read in that time: SmolLM2-135M in float32 took
# 81 ms where reading it takes 25 (21 GB/s), and 41 where it takes 11 (51 GB/s).
_BLOCK_BYTES = 45_000_000
_KEYS_AND_VALUES = "past_key_values"
_FORGETFUL = frozenset({"recurrent_gemma", "rwkv"})  # what they keep is inside them, or no cache
_WINDOWS = ("sliding_window", "layer_types", "attention_chunk_size")  # what a cache looks at
_TOGETHER = 8  # texts that share a call where they may: codes are then unpacked once for all of them


@dataclass
class TorchState:
    """Key-value cache, the logits that follow it [batch, V], and how many tokens it holds.

    `lengths` [batch]: where rows are of unlike lengths, those; the shorter ones are padded in front.
    `text` [batch, length]: the tokens themselves, of a model that may have to read them again.
    """

    cache: Any
    logits: Logits
    length: int
    lengths: npt.NDArray[np.int64] | None = None
    text: Tokens | None = None


class TorchRuntime:
    """An artifact folder, Hugging Face folder or GGUF file, loaded in torch; or what stock `transformers`
    makes of a folder of compressed-tensors."""

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        *,
        stock: bool = False,
        verify: bool = True,
    ) -> None:
        """Load; `threads` None leaves the number to torch, prompts go through `prefill_chunk` tokens at a
        time, `stock`: the folder is of compressed-tensors, `verify` as in, and raises UserError as,
        `Bundle.load`.
        """
        self.name = "transformers" if stock else "torch"
        self._chunk = prefill_chunk or _CHUNK
        self._threads = threads or torch.get_num_threads()
        with self._session():
            if stock:
                with loading(f"{path}: cannot be loaded by transformers"):
                    self._model: Any = load_compressed_tensors(path)
                tokenizer = load_tokenizer(path)
            else:
                bundle = Bundle.load(path, masks=False, verify=verify)
                self._model, tokenizer = bundle.model.eval(), bundle.tokenizer
        self.task: Task = task_of(self._model.config)
        self.mask_token = self.task.mask_token(tokenizer)
        accepted = set(inspect.signature(self._model.forward).parameters)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._memory = _memory(self._model, accepted)
        self._turn = turning_point(self._model.config.get_text_config())
        # keys of a text that becomes longer than this are others: neither in parts nor back
        self.rewinds = self._keeps_keys_and_values(accepted) and self._turn is None
        # rows of unlike lengths may share a call: each row is told its positions and its padding
        self.joins = self.rewinds and {"attention_mask", "position_ids"} <= accepted
        self.device = str(device_of(self._model))
        # which inputs are outliers depends on all that a call is given
        rules = (getattr(module, "activations", None) for module in self._model.modules())
        self.together = 1 if any(getattr(rule, "outliers", None) for rule in rules) else _TOGETHER
        self.width = self.task.width(self._model.config)  # of an answer's rows
        self.weight_bytes = weight_bytes(self._model)
        blocks = int(getattr(self._model.config.get_text_config(), "num_hidden_layers", 0))
        self.step_bytes = self.weight_bytes + _BLOCK_BYTES * blocks

    def _keeps_keys_and_values(self, accepted: set[str]) -> bool:
        """Whether the architecture's cache can be cut, which a recurrent state cannot."""
        if not self.task.continues or "past_key_values" not in accepted:
            return False
        layers = self._new_cache().layers
        recording = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")
        return all(
            type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and recording)
            for layer in layers
        )

    def _new_cache(self) -> Any:
        """Of keys and values; with all of them where a window is told of that the model does not heed."""
        text = self._model.config.get_text_config()
        unheeded = any(strays(text, field) for field in _WINDOWS)
        return DynamicCache() if unheeded else DynamicCache(config=self._model.config)

    @property
    def context(self) -> int:
        """The largest number of tokens the model takes."""
        return longest_text(self._model)

    def parameter_counts(self) -> tuple[int, int]:
        """(parameters, those that are not zero), tied ones once."""
        return parameter_counts(self._model)

    def logits(self, tokens: Tokens, types: Tokens | None = None, *, text: Tokens | None = None) -> Logits:
        """[batch, length] -> float32 [batch, length, V], or hidden states [batch, length, width].

        Of an encoder-decoder, the logits of the second half, [batch, length - length // 2, V], or of `text`
        [batch, targets] written of the whole; of a classifier of texts, those of its labels, [batch, 1,
        labels]. `types` [batch, length]: which of two texts each token is of.
        """
        with self._session():
            given = {"token_type_ids": types, "text": text}
            more = {name: self._ids(value) for name, value in given.items() if value is not None}
            return _numpy(self.task.answers(self._model, self._ids(tokens), **more))

    def prefill(self, tokens: Tokens) -> TorchState:
        """Read prompts [batch, length] into a fresh cache, in chunks."""
        with self._session():
            if not self.task.writes:
                scores = self.task.answers(self._model, self._ids(tokens))
                return TorchState(None, _numpy(scores[:, -1]), tokens.shape[1])
            if not self.task.continues:
                reading, first = seq2seq.read(self._model, self._ids(tokens))
                return TorchState(reading, _numpy(first), tokens.shape[1])
            cache = self._new_cache() if self.rewinds else None
            # a recurrent state goes on by single tokens only, whatever stands beside it
            step = self._chunk if self.rewinds else tokens.shape[1]
            for start in range(0, tokens.shape[1], step):
                logits, cache = self._call(tokens[:, start : start + step], cache, **self._last_only)
        text = None if self._turn is None else tokens
        return TorchState(cache, _numpy(logits[:, -1]), tokens.shape[1], text=text)

    def decode(self, state: State, tokens: Tokens) -> TorchState:
        """Append one token per row, [batch]. The cache grows in place: the state given is used up."""
        if not isinstance(state, TorchState):
            raise TypeError(f"a state of the torch runtime is wanted, not {type(state).__name__}")
        with self._session():
            if isinstance(state.cache, seq2seq.Reading):
                logits = seq2seq.proceed(self._model, state.cache, self._ids(tokens[:, None]))
                return TorchState(state.cache, _numpy(logits), state.length + 1)
            own, given, cache = _own_positions(state), tokens[:, None], state.cache
            text = None if state.text is None else np.concatenate((state.text, given), axis=1)
            if text is not None and state.length == self._turn:
                given, cache = text, None
            logits, cache = self._call(given, cache, **own, **self._last_only)
        lengths = None if state.lengths is None else state.lengths + 1
        return TorchState(cache, _numpy(logits[:, -1]), state.length + 1, lengths, text)

    def append(self, state: State, tokens: Tokens) -> tuple[TorchState, Logits]:
        """Append tokens (n,) to a state of one row; the logits after each, (n, V)."""
        assert isinstance(state, TorchState)
        if any(state.cache.is_sliding):  # from now on they keep what lies before the window, until a rewind
            state.cache.activate_past_recording()
        with self._session():
            found, cache = self._call(tokens[None], state.cache)
            logits = _numpy(found[0])
        return TorchState(cache, logits[-1:], state.length + len(tokens)), logits

    def rewind(self, state: State, length: int) -> TorchState:
        """Forget all but the first `length` tokens."""
        assert isinstance(state, TorchState)
        # layers with a window drop what lies before it when they are cut, be it by nothing
        if length < state.length or any(state.cache.is_sliding):
            state.cache.crop(length - state.length)
        return TorchState(state.cache, state.logits, length)

    def join(self, parts: Sequence[tuple[State, int]]) -> TorchState:
        """Rows of other states side by side; copies their caches, the shorter ones padded in front."""
        rows = [(state, row) for state, row in parts if isinstance(state, TorchState)]
        lengths = np.array([s.length if s.lengths is None else s.lengths[row] for s, row in rows])
        with self._session():
            cache = copy.copy(rows[0][0].cache)
            cache.layers = [_joined_layer(i, rows, lengths) for i in range(len(cache.layers))]
        logits = np.stack([state.logits[row] for state, row in rows])
        longest = int(lengths.max())
        return TorchState(cache, logits, longest, None if (lengths == longest).all() else lengths)

    def _call(self, tokens: Tokens, cache: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        """Logits after more tokens [batch, n], and what the model keeps of all so far."""
        if self._memory is None:
            whole = tokens if cache is None else np.concatenate([cache, tokens], axis=1)
            out = self._model(input_ids=self._ids(whole), use_cache=False, **options)
            return out.logits[:, -tokens.shape[1] :], whole
        out = self._model(input_ids=self._ids(tokens), use_cache=True, **{self._memory: cache}, **options)
        return out.logits, out[self._memory]

    def _ids(self, tokens: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(tokens, np.int64)).to(self.device)

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


def _memory(model: Any, accepted: set[str]) -> str | None:
    """What a model calls that which it keeps of a text; None where it gives back nothing of the kind."""
    if not task_of(model.config).continues:
        return None
    names = [name for name in (_KEYS_AND_VALUES, "cache_params") if name in accepted]
    return next(iter(names), None) if model.config.model_type not in _FORGETFUL else None


def _own_positions(state: TorchState) -> dict[str, torch.Tensor]:
    """For one more token: the mask of the padding [batch, length + 1] and each row's position [batch, 1]."""
    if state.lengths is None:
        return {}
    seen = np.arange(state.length + 1) >= state.length - state.lengths[:, None]
    device = state.cache.layers[0].keys.device
    return {
        "attention_mask": torch.from_numpy(seen.astype(np.int64)).to(device),
        "position_ids": torch.from_numpy(state.lengths[:, None]).to(device),
    }


def _joined_layer(
    index: int, rows: Sequence[tuple[TorchState, int]], lengths: npt.NDArray[np.int64]
) -> DynamicLayer:
    """A layer's cache [rows, heads, longest, width]: what each row holds stands at the end."""
    layer = copy.copy(rows[0][0].cache.layers[index])
    for side in ("keys", "values"):
        held = [getattr(state.cache.layers[index], side)[row] for state, row in rows]
        # [heads, held, width]; a row may be padded already, and a window may hold less than its length
        held = [h[:, max(0, h.shape[1] - int(n)) :] for h, n in zip(held, lengths, strict=True)]
        longest = max(h.shape[1] for h in held)
        padded = [torch.nn.functional.pad(h, (0, 0, longest - h.shape[1], 0)) for h in held]
        setattr(layer, side, torch.stack(padded))
    if layer.is_sliding:
        layer.cumulative_length = int(lengths.max())
    return layer


def _numpy(tensor: torch.Tensor) -> Logits:
    return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)
