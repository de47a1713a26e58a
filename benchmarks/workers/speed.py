"""Decode speed of one model beside another's, in ONNX Runtime, in turns.

    python speed.py BASE OUT EVALUATION THREADS

BASE and OUT are folders that `export_onnx` wrote. One process holds both; they are timed in turns, so that a
drifting machine hits both alike. Prints a JSON object of tokens per second, of the medians.
"""

import json
import sys
from pathlib import Path

import numpy as np

from compress import Samples, open_runtime, time_round

PROMPT, DECODES, WARM_UP, ROUNDS, PREFILLS = 32, 20, 4, 6, 2


def main() -> None:
    base, out, evaluation, threads = sys.argv[1:]
    text = np.load(evaluation).astype(np.int32)
    graphs = {"base": Path(base), "own": Path(out)}
    runtimes = {name: open_runtime(path, "onnxruntime", int(threads)) for name, path in graphs.items()}
    samples = {name: Samples() for name in runtimes}
    for number in range(ROUNDS):
        row = text[number % len(text)][None]
        prompt, following = row[:, :PROMPT], row[:, PROMPT : PROMPT + WARM_UP + DECODES]
        for name in list(runtimes)[:: -1 if number % 2 else 1]:
            samples[name].extend(time_round(runtimes[name], prompt, following, PREFILLS, WARM_UP))
    found = {name: own.summary(PROMPT, 1)["decode_tokens_per_second"] for name, own in samples.items()}
    print(
        json.dumps({"decode_tokens_per_second": found["own"], "base_decode_tokens_per_second": found["base"]})
    )


main()
