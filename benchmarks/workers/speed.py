"""Decode speed of one model beside another's, in ONNX Runtime, in turns.

    python speed.py BASE OUT EVALUATION THREADS

BASE and OUT are folders that `export_onnx` wrote. One process holds both; they are timed in turns, so that a
drifting machine hits both alike. Prints a JSON object of tokens per second, of the medians.
"""

import json
import sys
from pathlib import Path

import numpy as np

from compress.measure.latency import Samples, round_order, summarise, time_round
from compress.runtimes.onnx_runtime import OnnxRuntime

PROMPT, DECODES, WARM_UP, ROUNDS, PREFILLS = 32, 20, 4, 6, 2


def main() -> None:
    base, out, evaluation, threads = sys.argv[1:]
    text = np.load(evaluation).astype(np.int32)
    runtimes = {name: OnnxRuntime(Path(path), int(threads)) for name, path in (("base", base), ("own", out))}
    samples = {name: Samples() for name in runtimes}
    for number in range(ROUNDS):
        row = text[number % len(text)][None]
        prompt, following = row[:, :PROMPT], row[:, PROMPT : PROMPT + WARM_UP + DECODES]
        for name in round_order(list(runtimes), number):
            samples[name].extend(time_round(runtimes[name], prompt, following, PREFILLS, WARM_UP))
    found = {name: summarise(own, PROMPT, 1)["decode_tokens_per_second"] for name, own in samples.items()}
    print(
        json.dumps({"decode_tokens_per_second": found["own"], "base_decode_tokens_per_second": found["base"]})
    )


main()
