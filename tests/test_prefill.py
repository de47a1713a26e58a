"""A prompt read in chunks is the prompt read at once, and no call sees more of it than a chunk."""

import numpy as np
import pytest
from cli_helpers import invoke
from export_models import MODELS, exported, tiny_bundle, tokens, torch_logits

from compress.runtimes.onnx_runtime import OnnxRuntime
from compress.runtimes.torch_runtime import TorchRuntime


def seen_by(runtime):
    """Lengths of the texts that the model itself is called with, as they come."""
    lengths = []
    if isinstance(runtime, OnnxRuntime):
        run = runtime._run
        runtime._run = lambda cache, part, logits: (lengths.append(part.shape[1]), run(cache, part, logits))
    else:
        runtime._model.register_forward_pre_hook(
            lambda model, given, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
        )
    return lengths


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_the_logits_of_the_whole_in_both_runtimes(name, tmp_path):
    bundle = tiny_bundle(name)
    bundle.save(tmp_path / "torch")
    exported(bundle, tmp_path / "onnx")
    ids = tokens(batch=2, length=40)
    expected = torch_logits(bundle.model, ids)
    tolerance = 1e-5 * np.abs(expected).max()
    for runtime in (
        OnnxRuntime(tmp_path / "onnx", threads=1, prefill_chunk=9),
        TorchRuntime(tmp_path / "torch", threads=1, prefill_chunk=9),
    ):
        lengths = seen_by(runtime)
        state = runtime.prefill(ids[:1, :30])  # longer than a window of 7, no multiple of 9
        assert lengths == [9, 9, 9, 3]
        assert np.abs(state.logits - expected[:1, 29]).max() < tolerance
        assert np.abs(runtime.decode(state, ids[:1, 30]).logits - expected[:1, 30]).max() < tolerance
        state = runtime.prefill(ids[:, :30])
        assert max(lengths) == 9
        assert state.length == 30
        for position in (30, 31):
            state = runtime.decode(state, ids[:, position])
            assert np.abs(state.logits - expected[:, position]).max() < tolerance


def test_the_command_reads_in_chunks(tmp_path):
    tiny_bundle("llama").save(tmp_path / "model")
    command = ("generate", tmp_path / "model", "-p", "w3 w4 w5 w6 w7 w8", "--tokens", 6, "--threads", 1)
    assert invoke(*command, "--prefill-chunk", 2).out == invoke(*command).out
    assert "prefill-chunk" in invoke(*command, "--prefill-chunk", 0).err
