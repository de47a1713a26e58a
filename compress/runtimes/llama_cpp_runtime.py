"""Run a GGUF file in llama.cpp, through its C interface.

Method. `llama_decode` on given tokens, several rows in one call, each a sequence of its own with a key-value
cache of its own. Everything is llama.cpp's own default but for the threads, the layers on a graphics card
(none) and the length of the cache: it is allocated at once, so it is as long as a prompt and some more, and
moves into a longer one when it is full.
Cost: that cache in float16, and 4 * vocabulary bytes for each position whose logits are asked for.
Limits: decoders on the CPU. There is one cache, so a prefill ends whatever was begun before. What llama.cpp
computes are its own roundings: activations in 8 bits where a matrix has codes, keys and values in float16.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import MissingExtra, UserError
from compress.host.steady import Steady
from compress.runtimes.base import Logits, State, Tokens
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL

_CALL = 2048  # tokens in a call, llama.cpp's default
_SPARE = 64  # positions after a prompt, before the cache must move
_Flags = npt.NDArray[np.bool_]


@dataclass
class LlamaCppState:
    """Logits of the next token (rows, vocabulary), tokens so far, and which prefill it goes back to."""

    logits: Logits
    length: int
    prefill: object


class LlamaCppRuntime:
    """A GGUF file, loaded in llama.cpp."""

    name, device = "llama.cpp", "cpu"
    task: Task = CAUSAL
    mask_token: int | None = None

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load; `threads` None leaves the number to llama.cpp.

        Raises:
            MissingExtra: llama-cpp-python is not installed.
            UserError: llama.cpp cannot load the file.
        """
        if find_spec("llama_cpp") is None:
            raise MissingExtra("llama-cpp-python", "llama-cpp", f"running {path.name} in llama.cpp")
        import llama_cpp

        self._api, self._path, self._threads = llama_cpp, path, threads
        self._file = Steady([path])  # llama.cpp maps it
        with _said() as words:
            llama_cpp.llama_backend_init()
            options = llama_cpp.llama_model_default_params()
            options.n_gpu_layers = 0
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load it: {_reason(words)}")
        self.context: int = llama_cpp.llama_model_n_ctx_train(self._model)
        self.weight_bytes: int = llama_cpp.llama_model_size(self._model)
        self._vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._call = _Call(llama_cpp)
        self._session: Any = None
        self._shape = (0, 0)  # rows and positions of each that the cache has room for
        self._prefill = object()  # tells the last one from all others

    def close(self) -> None:
        """Free the model and its cache."""
        self._end_session()
        if self._model:
            self._call.free()
            self._api.llama_model_free(self._model)
            self._model = None

    def logits(self, tokens: Tokens) -> Logits:
        """Every position's logits: (batch, length) -> (batch, length, vocabulary), float32."""
        batch, length = tokens.shape
        return self._read(tokens, np.ones(length, dtype=bool)).reshape(batch, length, self._vocabulary)

    def prefill(self, tokens: Tokens) -> LlamaCppState:
        """Read prompts (batch, length) into an empty cache; states of earlier prefills end."""
        length = tokens.shape[1]
        logits = self._read(tokens, np.arange(length) == length - 1)
        return LlamaCppState(logits, length, self._prefill)

    def decode(self, state: State, tokens: Tokens) -> LlamaCppState:
        """Append one token per row, (batch,). The state given is used up."""
        if not isinstance(state, LlamaCppState) or state.prefill is not self._prefill:
            raise ValueError("a state of this runtime's last prefill is wanted: there is one cache")
        rows = np.arange(len(tokens))
        if state.length == self._shape[1]:
            self._lengthen(state.length + max(_SPARE, state.length // 2))
        logits = self._run(tokens, np.full(len(rows), state.length), rows, np.ones(len(rows), dtype=bool))
        return LlamaCppState(logits, state.length + 1, state.prefill)

    def _read(self, tokens: Tokens, wanted: _Flags) -> Logits:
        """Read (batch, length) into an empty cache; logits of positions `wanted` (length,), row by row."""
        batch, length = tokens.shape
        if self._shape[0] != batch or self._shape[1] < length + _SPARE:
            self._open(batch, length + _SPARE)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._session), True)
        self._prefill = object()
        position, row = np.tile(np.arange(length), batch), np.repeat(np.arange(batch), length)
        return self._run(tokens.ravel(), position, row, np.tile(wanted, batch))

    def _run(
        self,
        token: npt.NDArray[Any],
        position: npt.NDArray[Any],
        row: npt.NDArray[Any],
        wanted: _Flags,
    ) -> Logits:
        """Tokens (n,) with their positions and rows through the model; the logits of those `wanted` (n,)."""
        found = np.empty((int(wanted.sum()), self._vocabulary), dtype=np.float32)
        done = 0
        for start in range(0, len(token), _CALL):
            part = slice(start, start + _CALL)
            self._call.fill(token[part], position[part], row[part], wanted[part])
            self._file.require()
            failed = self._api.llama_decode(self._session, self._call.batch)
            if failed:
                raise UserError(f"{self._path}: llama.cpp failed, llama_decode gave {failed}")
            for index in np.flatnonzero(wanted[part]):
                at = self._api.llama_get_logits_ith(self._session, int(index))
                found[done] = np.ctypeslib.as_array(at, (self._vocabulary,))
                done += 1
        return found

    def _open(self, rows: int, positions: int) -> None:
        """A session whose cache has room for so many rows and positions of each."""
        self._end_session()
        options = self._api.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = rows * positions, rows, _CALL
        if self._threads is not None:
            options.n_threads = options.n_threads_batch = self._threads
        with _said() as words:
            self._session = self._api.llama_init_from_model(self._model, options)
        if not self._session:
            raise UserError(f"{self._path}: llama.cpp gives no session: {_reason(words)}")
        self._shape = (rows, positions)

    def _lengthen(self, positions: int) -> None:
        """Move what the cache holds into a longer one."""
        held = []
        for row in range(self._shape[0]):
            size = self._api.llama_state_seq_get_size(self._session, row)
            buffer = (ctypes.c_uint8 * size)()
            self._api.llama_state_seq_get_data(self._session, buffer, size, row)
            held.append(buffer)
        self._open(self._shape[0], positions)
        for row, buffer in enumerate(held):
            if not self._api.llama_state_seq_set_data(self._session, buffer, len(buffer), row):
                raise UserError(f"{self._path}: llama.cpp cannot move its cache to {positions} positions")

    def _end_session(self) -> None:
        if self._session:
            self._api.llama_free(self._session)
        self._session, self._shape = None, (0, 0)


class _Call:
    """llama.cpp's batch, whose arrays are seen as numpy's, so that filling it takes no time worth timing."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.batch = batch = api.llama_batch_init(_CALL, 0, 1)
        view = np.ctypeslib.as_array
        self._token, self._position = view(batch.token, (_CALL,)), view(batch.pos, (_CALL,))
        self._wanted = view(batch.logits, (_CALL,))
        view(batch.n_seq_id, (_CALL,))[:] = 1
        self._rows = np.full(_CALL, -1)  # as the batch has them: a pointer each, so only changes are written

    def fill(
        self, token: npt.NDArray[Any], position: npt.NDArray[Any], row: npt.NDArray[Any], wanted: _Flags
    ) -> None:
        """Tokens, their positions and rows, and whose logits are wanted, each (n,)."""
        count = self.batch.n_tokens = len(token)
        self._token[:count], self._position[:count], self._wanted[:count] = token, position, wanted
        for index in np.flatnonzero(self._rows[:count] != row):
            self.batch.seq_id[index][0] = int(row[index])
        self._rows[:count] = row

    def free(self) -> None:
        """Give the memory back."""
        self._api.llama_batch_free(self.batch)


@contextmanager
def _said() -> Iterator[io.StringIO]:
    """What llama.cpp says meanwhile, a line per tensor and worse; afterwards nothing: its codes tell."""
    log = logging.getLogger("llama-cpp-python")
    words = io.StringIO()
    log.setLevel(logging.NOTSET)
    try:
        with contextlib.redirect_stderr(words):
            yield words
    finally:
        log.setLevel(logging.CRITICAL + 1)


def _reason(words: io.StringIO) -> str:
    """The first of what went wrong, which is the cause of the rest."""
    signs = ("error", "failed", "invalid")
    wrong = (line for line in words.getvalue().splitlines() if any(sign in line for sign in signs))
    return next(wrong, "it does not say why").strip()
