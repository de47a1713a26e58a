"""OpenVINO GenAI, timed by its own clock: it has no step that could be timed from outside.

    python openvino_genai_latency_worker.py openvino_genai THREADS

A prefill is its time to the first token, a decode the time between two tokens; the text is its own greedy
one. Its cache of prompts seen before is off: the same prompt again would be read in no time.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as ov

from compress.measure.worker import Worker, serve
from compress.memory import peak_rss_bytes


class Pipeline:
    """An exported folder."""

    name, device, task, mask_token, weight_bytes, context = "openvino_genai", "cpu", "causal", None, 0, 8192

    def __init__(self, path: Path, name: str, threads: int, provider: str = "cpu") -> None:
        schedule = ov.SchedulerConfig()
        schedule.enable_prefix_caching = False
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipe = ov.LLMPipeline(str(path), "CPU", scheduler_config=schedule, **options)

    def generate(self, tokens: np.ndarray, count: int) -> list[float]:
        """Seconds to each of `count` tokens, from the start."""
        options = ov.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = count, True, False
        prompt = openvino.Tensor(tokens.astype(np.int64))
        mask = openvino.Tensor(np.ones(tokens.shape, dtype=np.int64))
        told = self.pipe.generate(ov.TokenizedInputs(prompt, mask), options).perf_metrics.raw_metrics
        first = told.m_times_to_first_token[0] / 1e6  # in microseconds, where the stamps are in milliseconds
        # one for every step, which all rows take together
        stamps = np.asarray(told.m_new_token_times)
        return [first, *(first + (stamps[1:] - stamps[0]) / 1000)]


class OpenVinoWorker(Worker):
    def time_round(
        self, prompt: str, following: str, repetitions: int, warm_up: int, rehearse: bool = True
    ) -> dict[str, Any]:
        pipe, tokens, decodes = self._loaded, np.load(prompt), np.load(following).shape[1]
        if rehearse:
            pipe.generate(tokens, 1)
        prefill = [pipe.generate(tokens, 1)[0] for _ in range(repetitions - 1)]
        # the last prefill is that of the text which goes on
        times = pipe.generate(tokens, decodes + 1) if repetitions else []
        decode = np.diff(times)[warm_up:].tolist()
        return {"prefill": [*prefill, *times[:1]], "decode": decode, "peak_rss_bytes": peak_rss_bytes()}


serve(lambda advance: OpenVinoWorker(sys.argv[1], int(sys.argv[2]), advance, Pipeline))
