"""llama.cpp, timed as our runtimes are: `llama_decode` on given tokens, logits of each row's last one.

    python llama_cpp_latency_worker.py llama_cpp THREADS

Its own defaults but for the threads and the context, which is no longer than a case needs: its cache is
allocated at once.
"""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as api
import numpy as np

from compress import CAUSAL, Worker

SPARE = 64  # positions after the prompt
BATCH = 2048  # tokens in a call, llama.cpp's default
Array = np.ndarray


@dataclass
class State:
    logits: Array
    length: int


class LlamaCpp:
    """A GGUF file; the cache is one, so a state is used up by the next prefill."""

    name, device, task, mask_token, context = "llama_cpp", "cpu", CAUSAL, None, 8192

    def __init__(self, path: Path, name: str, threads: int, provider: str = "cpu") -> None:
        self.threads = threads
        # kept alive: llama.cpp prints every tensor otherwise
        self.quiet = api.llama_log_callback(lambda level, text, user: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        assert self.model, f"{path}: llama.cpp cannot load it"
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.weight_bytes = api.llama_model_size(self.model)
        self.batch = batch = api.llama_batch_init(BATCH, 0, 1)
        view = np.ctypeslib.as_array  # so that filling it takes no time worth timing
        self.token, self.position = view(batch.token, (BATCH,)), view(batch.pos, (BATCH,))
        self.wanted = view(batch.logits, (BATCH,))
        view(batch.n_seq_id, (BATCH,))[:] = 1
        self.rows = np.full(BATCH, -1)  # what the batch's places are set to
        self.shape, self.session = (0, 0), None

    def prefill(self, tokens: Array) -> State:
        rows, length = tokens.shape
        if self.session is None or self.shape[0] != rows or self.shape[1] < length + SPARE:
            self._open(rows, length + SPARE)
        api.llama_memory_clear(api.llama_get_memory(self.session), True)
        token, position = tokens.ravel(), np.tile(np.arange(length), rows)
        row = np.repeat(np.arange(rows), length)
        ends = position == length - 1
        last = np.empty((rows, self.vocabulary), dtype=np.float32)
        for start in range(0, len(token), BATCH):
            part = slice(start, start + BATCH)
            self._run(token[part], position[part], row[part], ends[part])
            for i in np.flatnonzero(ends[part]):
                last[row[part][i]] = self._logits(int(i))
        return State(last, length)

    def decode(self, state: State, tokens: Array) -> State:
        rows = np.arange(len(tokens))
        self._run(tokens, np.full(len(tokens), state.length), rows, np.ones(len(tokens), dtype=bool))
        for row in range(len(tokens)):
            state.logits[row] = self._logits(row)
        return State(state.logits, state.length + 1)

    def _open(self, rows: int, capacity: int) -> None:
        if self.session is not None:
            api.llama_free(self.session)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = rows * capacity, rows, BATCH
        options.n_threads = options.n_threads_batch = self.threads
        self.session = api.llama_init_from_model(self.model, options)
        assert self.session, "llama.cpp gives no context"
        self.shape = (rows, capacity)

    def _run(self, token: Array, position: Array, row: Array, wanted: Array) -> None:
        batch, count = self.batch, len(token)
        batch.n_tokens = count
        self.token[:count], self.position[:count], self.wanted[:count] = token, position, wanted
        for i in np.flatnonzero(self.rows[:count] != row):
            batch.seq_id[i][0] = int(row[i])
        self.rows[:count] = row
        failed = api.llama_decode(self.session, batch)
        assert failed == 0, f"llama_decode: {failed}"

    def _logits(self, index: int) -> Array:
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.session, index), (self.vocabulary,))


Worker.answer(sys.argv[1:], LlamaCpp)
