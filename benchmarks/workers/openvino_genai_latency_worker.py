"""OpenVINO GenAI, timed by its own clock: it has no step that could be timed from outside.

    python openvino_genai_latency_worker.py openvino_genai THREADS

A prefill is its time to the first token, a decode the time between two tokens; the text is its own greedy
one. Its cache of prompts seen before is off: the same prompt again would be read in no time.
Rows of a batch are read one after another, and the first go on while the last are still read: there a prefill
is the time of a call that gives each row one token, and decodes are the steps that give one to all of them.
"""

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import openvino
import openvino_genai as ov

from compress import CAUSAL, Worker, peak_rss_bytes

CHUNK = 256  # tokens of prompts in a step, OpenVINO GenAI's default


class Pipeline:
    """An exported folder."""

    name, device, task, mask_token, weight_bytes, context = "openvino_genai", "cpu", CAUSAL, None, 0, 8192

    def __init__(self, path: Path, name: str, threads: int, provider: str = "cpu") -> None:
        schedule = ov.SchedulerConfig()
        schedule.enable_prefix_caching = False
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipe = ov.LLMPipeline(str(path), "CPU", scheduler_config=schedule, **options)

    def generate(self, tokens: np.ndarray, count: int) -> tuple[float, list[float]]:
        """Seconds to the first of `count` tokens a row, and between tokens that all rows got at once."""
        options = ov.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = count, True, False
        prompt = openvino.Tensor(tokens.astype(np.int64))
        mask = openvino.Tensor(np.ones(tokens.shape, dtype=np.int64))
        told = self.pipe.generate(ov.TokenizedInputs(prompt, mask), options).perf_metrics.raw_metrics
        # of every step in which a row got a token: when, in milliseconds, and how many rows did
        stamps, rows = np.asarray(told.m_new_token_times) / 1000, np.asarray(told.m_batch_sizes)
        steps = np.diff(stamps)[(rows[1:] == len(tokens)) & (rows[:-1] == len(tokens))]
        return told.m_times_to_first_token[0] / 1e6, steps.tolist()  # that one is in microseconds


class OpenVinoWorker(Worker):
    def time_round(
        self, prompt: str, following: str, repetitions: int, warm_up: int, rehearse: bool = True
    ) -> dict[str, Any]:
        pipe, tokens, decodes = self.loaded, np.load(prompt), np.load(following).shape[1]
        if rehearse:
            pipe.generate(tokens, 1)
        prefill = [self._prefill(tokens) for _ in range(repetitions)]
        decode = []
        if decodes:
            mixed = tokens.size // CHUNK if len(tokens) > 1 else 0
            decode = pipe.generate(tokens, mixed + decodes + 1)[1][warm_up:]
        return {"prefill": prefill, "decode": decode, "peak_rss_bytes": peak_rss_bytes()}

    def _prefill(self, tokens: np.ndarray) -> float:
        began = perf_counter()
        first, _ = self.loaded.generate(tokens, 1)
        return first if len(tokens) == 1 else perf_counter() - began


OpenVinoWorker.answer(sys.argv[1:], Pipeline)
