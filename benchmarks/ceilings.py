"""What the machine could do at most: how fast it reads memory, how fast it multiplies matrices.

    python benchmarks/ceilings.py THREADS

Prints a JSON object: `bytes_per_second`, a sum over 1 GB of float32, and `float32` and `int8`, operations a
second (two per multiplication) of products of 2048 x 2048 matrices, torch's in float32 and ONNX Runtime's of
unsigned by signed 8-bit integers. Each the best of some repetitions. A decoder reads all its weights for
every token, so it cannot decode faster than the first allows, batch by batch; it multiplies every weight of
its blocks with every token of a prompt, so it cannot read one faster than the others allow, whichever of them
is the faster: codes may be widened to floats, or floats rounded to integers.
"""

import json
import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

SIZE, READ = 2048, 1 << 28
REPETITIONS = 5


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    reading = best(torch.ones(READ).sum)
    left, right = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
    floats = best(lambda: left @ right)
    session = integer_product(threads)
    random = np.random.default_rng(0)
    codes = {
        "a": random.integers(0, 127, (SIZE, SIZE), dtype=np.uint8),
        "b": random.integers(-127, 127, (SIZE, SIZE), dtype=np.int8),
    }
    integers = best(lambda: session.run(None, codes))
    print(
        json.dumps(
            {
                "bytes_per_second": 4 * READ / reading,
                "float32": 2 * SIZE**3 / floats,
                "int8": 2 * SIZE**3 / integers,
            }
        )
    )


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest repetition, after one that is not counted."""
    run()
    found = []
    for _ in range(REPETITIONS):
        start = perf_counter()
        run()
        found.append(perf_counter() - start)
    return min(found)


def integer_product(threads: int) -> onnxruntime.InferenceSession:
    """One MatMulInteger."""
    square = (SIZE, SIZE)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "product",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, square),
            helper.make_tensor_value_info("b", TensorProto.INT8, square),
        ],
        [helper.make_tensor_value_info("c", TensorProto.INT32, square)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


if __name__ == "__main__":
    main(int(sys.argv[1]))
