"""onnxruntime-genai, timed as our runtimes are, but for the text: it appends the likeliest token itself.

    python onnxruntime_genai_latency_worker.py onnxruntime_genai THREADS

A step is `generate_next_token`: the greedy choice, some microseconds, is in it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from compress import CAUSAL, Worker

SPARE = 64  # positions after the prompt


@dataclass
class State:
    generator: og.Generator
    length: int


class GenAI:
    """A folder with `genai_config.json`, with the threads set and everything else as the folder says."""

    name, device, task, mask_token, weight_bytes = "onnxruntime_genai", "cpu", CAUSAL, None, 0

    def __init__(self, path: Path, name: str, threads: int, provider: str = "cpu") -> None:
        folder = path if (path / "genai_config.json").is_file() else path / "onnx"
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.context = 8192

    def prefill(self, tokens: np.ndarray) -> State:
        rows, length = tokens.shape
        options = og.GeneratorParams(self.model)
        # the cache is allocated for max_length at once; min_length keeps it from ending early
        options.set_search_options(
            batch_size=rows, max_length=length + SPARE, min_length=length + SPARE, do_sample=False
        )
        generator = og.Generator(self.model, options)
        generator.append_tokens(tokens if rows > 1 else tokens[0])
        generator.generate_next_token()  # the choice after the prompt: the model is not run again
        return State(generator, length)

    def decode(self, state: State, tokens: np.ndarray) -> State:
        state.generator.generate_next_token()
        return State(state.generator, state.length + 1)


Worker.answer(sys.argv[1:], GenAI)
