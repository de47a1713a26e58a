"""llama.cpp of its own environment, timed as our runtimes are.

python llama_cpp_latency_worker.py llama_cpp THREADS
"""

import sys
from pathlib import Path
from typing import Any

from compress import Worker, open_runtime


def opened(path: Path, name: str, threads: int, provider: str = "cpu") -> Any:
    """The GGUF file in llama.cpp, whatever the benchmark calls it."""
    return open_runtime(path, "llama.cpp", threads)


Worker.answer(sys.argv[1:], opened)
