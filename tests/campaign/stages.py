"""The modules beside this package that make tiny models for the tests, by whichever way this one is run.

Threads are one, from the start: a fork of a process in which threads have run would wait for them for ever.
"""

import os
import sys
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import encoder_models  # noqa: E402
import export_models  # noqa: E402
import seq2seq_models  # noqa: E402
import torch  # noqa: E402
import tqdm  # noqa: E402
import training_set  # noqa: E402

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0

__all__ = ["encoder_models", "export_models", "seq2seq_models", "training_set"]
