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
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.host.machine import machine
from compress.host.memory import peak_rss_bytes
from compress.run.registry import pass_class
from compress.text.windows import TextData, Windows, digest

HERE = Path(__file__).parent
HIDDEN, INNER, VOCABULARY, HEADS, KEY_VALUE_HEADS, HEAD = 2048, 5632, 32000, 32, 8, 64
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
    index_file = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return layers * BLOCK + 2 * VOCABULARY * HIDDEN + HIDDEN


class NoTokenizer:
    """Stands where a tokenizer belongs; random weights need none."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing."""


def measured(folder: Path, pass_name: str, windows: int, length: int) -> dict[str, Any]:
    """Quantize `folder / "model"`; seconds from loading to saving, peak memory, bytes written."""
    from compress.artifact import bundle

    vars(bundle)["load_tokenizer"] = lambda _: NoTokenizer()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (windows, length)).astype(np.int32)
    given = Windows(tokens, 1, digest(tokens))
    data = TextData("random", length, tokens.reshape(-1), given.sha256, given, given, given)
    context = Context(
        data=data,
        teacher=lambda: Bundle.load(folder / "model"),
        seed=0,
        workdir=folder / "work",
        device=torch.device("cpu"),
        threads=torch.get_num_threads(),
        precision="bfloat16",
    )
    context.workdir.mkdir()
    began = time.monotonic()
    result = pass_class(pass_name)()(Bundle.load(folder / "model", stream=True), context)
    result.save(folder / "artifact")
    written = sum(p.stat().st_size for p in (folder / "artifact").iterdir())
    return {
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": peak_rss_bytes(),
        "artifact_bytes": written,
    }


if __name__ == "__main__":
    typer.run(main)
