"""The modules beside this package that make tiny models for the tests.

Threads are one, from the start: a fork of a process in which threads have run would wait for them for ever.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import encoder_models
import export_models
import seq2seq_models
import torch
import tqdm
import training_set

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0

__all__ = ["encoder_models", "export_models", "seq2seq_models", "training_set"]
