"""ONNX Runtime behind the one face: logits, prefill, decode, with the key-value cache bound once.

The cache of a text is one buffer per layer and side, (batch, heads, capacity, width). It is bound as past
and as present of the session, so a step appends to it in place and copies nothing. The buffer starts a
little longer than the prompt and doubles when full. Threads are pinned to the number given.

Imports neither torch nor transformers: their memory would be counted as this runtime's.
Limits: CPU; rows of a batch have equal lengths.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compress.errors import UserError
from compress.runtimes.base import Logits, State, Tokens
from compress.tasks import Task

_GRAPH = "model.onnx"
_SPARE = 128  # positions a new cache has beyond its prompt
_CHUNK = 512  # positions per call when every position's logits are wanted
_CACHE_TYPES: dict[str, type[Any]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


@dataclass
class Cache:
    """Key-value buffers bound to a session, and how full they are. `logits` is (batch, vocabulary)."""

    binding: onnxruntime.IOBinding
    buffers: dict[str, onnxruntime.OrtValue]
    logits: Logits
    length: int
    capacity: int


class OnnxRuntime:
    """An ONNX artifact folder, loaded; `path` may also be the variant's folder, which holds it as `onnx`."""

    name = "onnxruntime"
    device = "cpu"
    task: Task = "causal"
    mask_token: int | None = None

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load; `threads` None leaves the number to ONNX Runtime. Raises UserError if there is no model."""
        graph = next((p for p in (path / _GRAPH, path / "onnx" / _GRAPH) if p.is_file()), None)
        if graph is None:
            raise UserError(f"{path}: holds no {_GRAPH}; export it first, with the pass export_onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises bare classes of its own
            raise UserError(f"{graph}: ONNX Runtime cannot load it: {error}") from error
        facts = self._session.get_modelmeta().custom_metadata_map
        self._cache_shapes: dict[str, tuple[int, int, type[Any]]] = {
            value.name: (value.shape[1], value.shape[3], _CACHE_TYPES[value.type])
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.vocabulary = int(self._session.get_outputs()[0].shape[2])
        self.context = int(facts["context"])
        self.weight_bytes = int(facts["weight_bytes"])

    def logits(self, tokens: Tokens) -> Logits:
        """Every position's logits: (batch, length) -> (batch, length, vocabulary), one row at a time."""
        batch, length = tokens.shape
        result = np.empty((batch, length, self.vocabulary), dtype=np.float32)
        for row in range(batch):
            cache = self._open_cache(1, length)
            for start in range(0, length, _CHUNK):
                part = tokens[row : row + 1, start : start + _CHUNK]
                self._run(cache, part, result[row : row + 1, start : start + part.shape[1]])
        return result

    def prefill(self, tokens: Tokens) -> State:
        """Read a prompt (batch, length); only its last position's logits are computed."""
        batch, length = tokens.shape
        cache = self._open_cache(batch, min(length + _SPARE, max(self.context, length)))
        self._run(cache, tokens, cache.logits[:, None])
        return cache

    def decode(self, state: State, tokens: Tokens) -> State:
        """Append one token per row, (batch,); the state given is used up."""
        assert isinstance(state, Cache)
        if state.length == state.capacity:
            self._grow(state)
        self._run(state, tokens[:, None], state.logits[:, None])
        return state

    def _open_cache(self, batch: int, capacity: int) -> Cache:
        if capacity > self.context:
            raise UserError(f"{capacity} tokens exceed the model's context of {self.context}")
        cache = Cache(
            binding=self._session.io_binding(),
            buffers={},
            logits=np.empty((batch, self.vocabulary), dtype=np.float32),
            length=0,
            capacity=capacity,
        )
        for name, (heads, width, kind) in self._cache_shapes.items():
            empty = np.zeros((batch, heads, capacity, width), dtype=kind)
            self._bind(cache, name, empty)
        return cache

    def _bind(self, cache: Cache, name: str, array: NDArray[Any]) -> None:
        """One buffer as past and present."""
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        cache.buffers[name] = value
        cache.binding.bind_ortvalue_input(name, value)
        cache.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)

    def _grow(self, cache: Cache) -> None:
        """Double the capacity, up to the context."""
        if cache.length >= self.context:
            raise UserError(f"the text has reached the model's context of {self.context} tokens")
        extra = min(cache.capacity, self.context - cache.capacity)
        for name, value in list(cache.buffers.items()):
            full = value.numpy()
            self._bind(cache, name, np.pad(full, ((0, 0), (0, 0), (0, extra), (0, 0))))
        cache.capacity += extra

    def _run(self, cache: Cache, tokens: Tokens, logits: Logits) -> None:
        """Append tokens (batch, n), writing the last positions' logits into `logits` (batch, kept, vocab)."""
        batch, count = tokens.shape
        total = cache.length + count
        binding = cache.binding
        binding.bind_cpu_input("input_ids", tokens.astype(np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((batch, total), dtype=np.int64))
        # an input with a default is unknown to bind_cpu_input
        keep = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray([logits.shape[1]]))
        binding.bind_ortvalue_input("logits_to_keep", keep)
        # the caller's memory is bound as the output: nothing is copied
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        cache.length = total
