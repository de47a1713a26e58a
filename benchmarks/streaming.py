"""Peak memory of quantizing a model block by block, and that it does not grow with the number of layers.

    python benchmarks/streaming.py [--layers 4 --layers 31] [--pass-name quantize_gptq]

For each depth: writes a Llama with random bfloat16 weights as safetensors shards (31 layers: 1.5 billion
parameters, 3 GB), quantizes it in a process of its own with random calibration tokens, and compares that
process's peak resident memory with what DESIGN allows: two blocks in float32, the calibration activations
(input and output of a block in float32, in both streams), and 1 GB. One line per depth goes to
`results/streaming.jsonl`. Weights and tokens mean nothing here; only memory and seconds do.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compress import TextData, load, machine, pass_class, peak_rss_bytes

HERE = Path(__file__).parent
HIDDEN, INNER, VOCABULARY, HEADS, KEY_VALUE_HEADS, HEAD = 2048, 5632, 32000, 32, 8, 64
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BLOCK = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE_HEADS * HEAD + 3 * HIDDEN * INNER + 2 * HIDDEN


def main(
    layers: Annotated[list[int] | None, typer.Option()] = None,
    pass_name: str = "quantize_gptq",
    windows: int = 16,
    length: int = 512,
    work: Path = Path("runs/streaming"),
    quantize: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every depth; with --quantize, be the process that is measured."""
    if quantize is not None:
        print(json.dumps(measured(quantize, pass_name, windows, length)))
        return
    allowed = 2 * 4 * BLOCK + 4 * 4 * windows * length * HIDDEN + 10**9
    for depth in layers or [4, 31]:
        folder = work / f"layers-{depth}"
        shutil.rmtree(folder, ignore_errors=True)
        parameters = write_model(folder / "model", depth)
        command = [sys.executable, __file__, "--quantize", folder, "--pass-name", pass_name]
        command += ["--windows", windows, "--length", length]
        output = subprocess.run(
            [str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        line = {
            "pass": pass_name,
            "layers": depth,
            "parameters": parameters,
            "model_bytes": 2 * parameters,
            "calibration_tokens": windows * length,
            "allowed_bytes": allowed,
            **json.loads(output.splitlines()[-1]),
            "machine": machine(),
        }
        results = HERE / "results" / "streaming.jsonl"
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{depth} layers, {parameters / 1e9:.2f} B parameters, {2 * parameters / 1e9:.2f} GB: peak "
            f"{line['peak_rss_bytes'] / 1e9:.2f} GB, allowed {allowed / 1e9:.2f}; {line['seconds']:.0f} s"
        )
        shutil.rmtree(folder)


def write_model(folder: Path, layers: int) -> int:
    """Random weights, a shard per block; how many parameters there are."""
    folder.mkdir(parents=True)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(out: int, columns: int) -> torch.Tensor:
        return (torch.randn(out, columns, generator=generator) * 0.02).bfloat16()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    outer = {"model.embed_tokens": random(VOCABULARY, HIDDEN), "lm_head": random(VOCABULARY, HIDDEN)}
    shards: list[dict[str, torch.Tensor]] = [outer | {"model.norm": ones}]
    place: dict[str, str] = {}
    narrow = KEY_VALUE_HEADS * HEAD
    for index in range(-1, layers):
        if index >= 0:
            block = {
                "self_attn.q_proj": random(HIDDEN, HIDDEN),
                "self_attn.k_proj": random(narrow, HIDDEN),
                "self_attn.v_proj": random(narrow, HIDDEN),
                "self_attn.o_proj": random(HIDDEN, HIDDEN),
                "mlp.gate_proj": random(INNER, HIDDEN),
                "mlp.up_proj": random(INNER, HIDDEN),
                "mlp.down_proj": random(HIDDEN, INNER),
                "input_layernorm": ones,
                "post_attention_layernorm": ones,
            }
            shards = [{f"model.layers.{index}.{name}": tensor for name, tensor in block.items()}]
        file = f"model-{index + 1:05d}.safetensors"
        tensors = {f"{name}.weight": tensor.clone() for name, tensor in shards[0].items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place.update(dict.fromkeys(tensors, file))
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # that no text is read with
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    index_file = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return layers * BLOCK + 2 * VOCABULARY * HIDDEN + HIDDEN


def measured(folder: Path, pass_name: str, windows: int, length: int) -> dict[str, Any]:
    """Quantize `folder / "model"`; seconds from loading to saving, peak memory, bytes written."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (windows, length)).astype(np.int32)
    text = TextData.of_tokens(length, train=tokens.ravel(), heldout=tokens, calibration=tokens)
    (work := folder / "work").mkdir()
    tempfile.tempdir = str(work)  # what a pass puts aside lies beside the model, not in the system's folder
    began = time.monotonic()
    bundle = load(folder / "model", stream=True)
    before = peak_rss_bytes()  # a pass begins a new peak
    bundle = bundle.apply(pass_class(pass_name)(), text=text)
    bundle.save(folder / "artifact")
    written = sum(p.stat().st_size for p in (folder / "artifact").iterdir() if p.name not in TOKENIZER)
    return {
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": max(filter(None, (before, peak_rss_bytes())), default=None),
        "artifact_bytes": written,
    }


if __name__ == "__main__":
    typer.run(main)
