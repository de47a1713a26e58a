"""ONNX Runtime behind the one face: logits, prefill, decode, with the key-value cache bound once.

The cache of a text is one buffer per layer and side, (batch, heads, capacity, width). It is bound as past
and as present of the session, so a step appends to it in place and copies nothing. The buffer starts a
little longer than the prompt and doubles when full. A prompt goes through in chunks: attention's scores take
(heads, chunk, length) floats, not (heads, length, length). Threads are pinned to the number given.

Imports neither torch nor transformers: their memory would be counted as this runtime's.
Limits: the cache in main memory, whatever the provider (see providers.py). Rows of a batch may have unlike
lengths, since attention and positions go by each row's own; such rows get one token at a time.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compress.errors import UserError, door
from compress.runtimes.base import Ids, Logits, State, Tokens, Waiting
from compress.runtimes.onnx_session import (
    facts_of,
    files_of,
    graph_file,
    open_session,
    refused_at_run,
)
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL

# Tokens of a prompt that go through the model at once. Attention multiplies all keys of a chunk by all its
# queries, half of them in vain. SmolLM2-135M, 2 threads, tokens/s of a prompt of 512 and of 2048, by 512 and
# by 256: int4 1445 and 1482, 1234 and 1258; int8 for VNNI 2524 and 2792, 1819 and 1930; int4 with an int8
# cache 904 and 1011, 576 and 608; by 128 less. It takes less memory, too: 8192 tokens through 4 blocks of
# width 256, whose cache is 34 MB, took 152 MB at once, 42 by 512, and 36 by 128.
_CHUNK = 256
# Fixed work of a call and of each block, in bytes that are read in that time. Two cores with AVX2: fits the
# ratios of three pairs, 2 blocks in int4 to 4 in float32 of width 256 (0.52 of a call), and SmolLM2-135M in
# float32 to itself in int4 (0.33) and to half of its parameters in int4 (0.26).
_CALL_BYTES, _BLOCK_BYTES = 14_000_000, 4_000_000
_SPARE = 128  # positions a new cache has beyond its prompt
# of a map: this process's own, where systems tell the two kinds apart
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)
_INPUTS = {"input_ids", "attention_mask", "logits_to_keep"}
_CACHE_TYPES: dict[str, type[Any]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


@dataclass
class Cache:
    """Key-value buffers bound to a session, and how full each row is, (batch,). `logits` is (batch,
    vocabulary); `bound` tells the memory that is bound for them: address and shape."""

    binding: onnxruntime.IOBinding
    buffers: dict[str, onnxruntime.OrtValue]
    logits: Logits
    lengths: NDArray[np.int64]
    capacity: int
    bound: tuple[int, tuple[int, ...]] = (0, ())

    @property
    def length(self) -> int:
        """Of the longest row."""
        return int(self.lengths.max())


class OnnxRuntime:
    """An ONNX artifact folder, loaded; `path` may also be the variant's folder, which holds it as `onnx`."""

    name = "onnxruntime"
    task: Task = CAUSAL
    mask_token: int | None = None
    rewinds = True
    joins = True  # the graph takes a length per row

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        provider: str = "cpu",
        *,
        waiting: Waiting = "spin",
    ) -> None:
        """Load; `threads` None leaves the number to ONNX Runtime, texts go through `prefill_chunk` tokens
        at a time, `provider` runs what it can of the graph, `waiting` as in `open_session`. Raises
        UserError if there is no model, or no such provider, or one that cannot run it.
        """
        graph = graph_file(path)
        self._files = files_of(graph)
        self._path = path
        self._session = open_session(graph, threads, provider, waiting=waiting)
        self.device = provider
        facts = facts_of(self._session, path)
        if facts.get("task", self.task.name) != self.task.name:
            raise UserError(f"{graph}: an encoder's graph without the manifest.json that says so; copy both")
        with door(f"{graph}: not a graph as export_onnx writes it", "export it again"):
            self._cache_shapes: dict[str, tuple[int, int, type[Any]]] = {
                value.name: (int(value.shape[1]), int(value.shape[3]), _CACHE_TYPES[value.type])
                for value in self._session.get_inputs()
                if value.name.startswith("past_key_values.")
            }
            self.vocabulary = int(self._session.get_outputs()[0].shape[2])
            given = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
            if missing := _INPUTS - {value.name for value in given}:
                raise ValueError(f"no input '{min(missing)}'")
        self.context = int(facts["context"])
        self.weight_bytes = int(facts["weight_bytes"])
        blocks = len(self._cache_shapes) // 2
        self.step_bytes = self.weight_bytes + _CALL_BYTES + _BLOCK_BYTES * blocks
        self._chunk = prefill_chunk or _CHUNK
        if provider != "cpu":
            self._try(graph)

    def logits(self, tokens: Tokens) -> Logits:
        """Every position's logits: (batch, length) -> (batch, length, vocabulary), one row at a time."""
        batch, length = tokens.shape
        result = np.empty((batch, length, self.vocabulary), dtype=np.float32)
        for row in range(batch):
            cache = self._open_cache(1, length)
            for start in range(0, length, self._chunk):
                part = tokens[row : row + 1, start : start + self._chunk]
                self._run(cache, part, result[row : row + 1, start : start + part.shape[1]])
        return result

    def prefill(self, tokens: Tokens) -> State:
        """Read a prompt (batch, length) in chunks; only its last position's logits are of use."""
        batch, length = tokens.shape
        cache = self._open_cache(batch, min(length + _SPARE, max(self.context, length)))
        if length <= self._chunk:
            self._run(cache, tokens, cache.logits[:, None])
            return cache
        for row in range(batch):  # attention takes several tokens after others for one row only
            one = self._row(cache, row)
            for start in range(0, length, self._chunk):
                self._run(one, tokens[row : row + 1, start : start + self._chunk], one.logits[:, None])
        cache.lengths[:] = length
        return cache

    def decode(self, state: State, tokens: Tokens) -> State:
        """Append one token per row, (batch,); the state given is used up."""
        assert isinstance(state, Cache)
        self._reserve(state, 1)
        self._run(state, tokens[:, None], state.logits[:, None])
        return state

    def append(self, state: State, tokens: Tokens) -> tuple[State, Logits]:
        """Append tokens (n,) to a state of one row; the logits after each, (n, vocabulary)."""
        assert isinstance(state, Cache)
        self._reserve(state, len(tokens))
        logits = np.empty((1, len(tokens), self.vocabulary), dtype=np.float32)
        self._run(state, tokens[None], logits)
        state.logits[:] = logits[:, -1]
        return state, logits[0]

    def rewind(self, state: State, length: int) -> State:
        """Forget all but the first `length` tokens: what lies behind them in the buffers is written over."""
        assert isinstance(state, Cache)
        state.lengths[:] = length
        return state

    def join(self, parts: Sequence[tuple[State, int]]) -> State:
        """Rows of other states side by side, each with its own length; copies their caches."""
        rows = [(state, row) for state, row in parts if isinstance(state, Cache)]
        lengths = np.array([state.lengths[row] for state, row in rows])
        result = self._new_cache(len(rows), min(int(lengths.max()) + _SPARE, self.context))
        result.logits[:] = [state.logits[row] for state, row in rows]
        result.lengths[:] = lengths
        for name in self._cache_shapes:
            held = {id(state): state.buffers[name].numpy() for state, _ in rows}
            full = self._empty(name, result)
            for i, (state, row) in enumerate(rows):
                full[i, :, : lengths[i]] = held[id(state)][row, :, : lengths[i]]
            self._bind(result, name, full)
        return result

    def _try(self, graph: Path) -> None:
        """Refuse a provider that loads the graph and then cannot run it."""
        tokens = np.zeros((1, 2), dtype=np.int32)
        try:
            self.logits(tokens)
            self.decode(self.prefill(tokens), tokens[:, 0])
        except Exception as error:  # onnxruntime raises bare classes of its own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{graph}: provider '{self.device}' cannot run it, take cpu: {reason}") from error

    def _open_cache(self, batch: int, capacity: int) -> Cache:
        if capacity > self.context:
            raise UserError(f"{capacity} tokens exceed the model's context of {self.context}")
        cache = self._new_cache(batch, capacity)
        for name in self._cache_shapes:
            self._bind(cache, name, self._empty(name, cache))
        return cache

    def _new_cache(self, batch: int, capacity: int) -> Cache:
        """One without buffers."""
        return Cache(
            binding=self._session.io_binding(),
            buffers={},
            logits=np.empty((batch, self.vocabulary), dtype=np.float32),
            lengths=np.zeros(batch, dtype=np.int64),
            capacity=capacity,
        )

    def _row(self, cache: Cache, row: int) -> Cache:
        """One row of a cache, in the same memory."""
        one = self._new_cache(1, cache.capacity)
        one.logits = cache.logits[row : row + 1]
        for name, value in cache.buffers.items():
            self._bind(one, name, value.numpy()[row : row + 1])
        return one

    def _empty(self, name: str, cache: Cache) -> NDArray[Any]:
        """A buffer of zeros.

        Mapped, so that the system gets it back at once when a text ends, and only what is written takes
        memory; from the heap a second prompt of 1000 tokens took 9 MB more than the first (SmolLM2-135M).
        """
        heads, width, kind = self._cache_shapes[name]
        shape = (len(cache.lengths), heads, cache.capacity, width)
        memory = mmap.mmap(-1, math.prod(shape) * np.dtype(kind).itemsize, **_PRIVATE)
        return np.frombuffer(memory, dtype=kind).reshape(shape)

    def _bind(self, cache: Cache, name: str, array: NDArray[Any]) -> None:
        """One buffer as past and present."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        cache.buffers[name] = value
        cache.binding.bind_ortvalue_input(name, value)
        cache.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)

    def _reserve(self, cache: Cache, count: int) -> None:
        """Make room for `count` more tokens: at least double the capacity, up to the context."""
        wanted = cache.length + count
        if wanted <= cache.capacity:
            return
        if wanted > self.context:
            raise UserError(f"the text has reached the model's context of {self.context} tokens")
        held = cache.capacity
        cache.capacity = min(max(2 * held, wanted), self.context)
        for name, value in list(cache.buffers.items()):
            full = self._empty(name, cache)
            full[:, :, :held] = value.numpy()
            self._bind(cache, name, full)

    def _run(self, cache: Cache, tokens: Tokens, logits: Logits) -> None:
        """Append tokens (batch, n), writing the last positions' logits into `logits` (batch, kept, vocab).

        A token of a small model takes milliseconds, and every call of a binding a part of one: what is bound
        already stays.
        """
        lengths = cache.lengths + tokens.shape[1]
        # (batch, longest): the graph takes a row's length from how many ones it has
        longest = int(lengths.max())
        mask = np.ones((len(lengths), longest), dtype=np.int64)
        if len(lengths) > 1:
            mask *= np.arange(longest) < lengths[:, None]
        self._files.require()
        try:  # a damaged graph may have no such input or output
            self._bind_all(cache, tokens, mask, logits)
            self._session.run_with_iobinding(cache.binding)
        except Exception as error:
            raise refused_at_run(error, self._path) from None
        cache.lengths = lengths

    @staticmethod
    def _bind_all(cache: Cache, tokens: Tokens, mask: Ids, logits: Logits) -> None:
        binding = cache.binding
        binding.bind_cpu_input("input_ids", tokens.astype(np.int64))
        binding.bind_cpu_input("attention_mask", mask)
        # the caller's memory is bound as the output: nothing is copied
        place = (logits.ctypes.data, logits.shape)
        if place != cache.bound:
            # an input with a default is unknown to bind_cpu_input
            keep = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray([logits.shape[1]]))
            binding.bind_ortvalue_input("logits_to_keep", keep)
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            cache.bound = place
