"""Tiny whole inputs of every kind that the package reads, each in a folder of its own.

All are made of one model of some 40,000 weights by the public passes, so that they are what a user has.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from compress.api import make_artifacts
from compress.artifact.bundle import Bundle
from compress.artifact.integrity import write_sums
from compress.context import Context
from compress.export.gguf.artifact import write_gguf
from compress.export.onnx.artifact import write_artifact, write_manifest
from compress.export.onnx.forms import Forms
from compress.formats import Coded, Int2, Int4, Int8
from compress.measure.unfinished import Unfinished
from compress.passes.export_compressed_tensors import ExportCompressedTensors
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse
from compress.records.results import Result, StepResult, write_results
from compress.records.run import Reference, RunRecord, Sample, SampleBook
from compress.run.recipe import Recipe
from compress.structured.vocabulary import kept_tokens, trimmed_tokenizer
from compress.training import checkpoint

from .stages import encoder_models, export_models, seq2seq_models, training_set

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "threads": 1,
    "model": {"checkpoint": "model"},
    "data": {"text": "text.txt", "window": 16, "evaluation_windows": 4, "calibration_windows": 4,
             "heldout_windows": 4},
    "base": [],
    "variants": {
        "pruned": [{"prune_magnitude": {"sparsity": 0.5}}, {"quantize_round": {"format": "int8"}}],
        "int4": {"passes": [{"quantize_round": {"format": {"kind": "int4", "group": 32}}}]},
        "more": {"from": "pruned", "passes": ["export_onnx"]},
    },
    "measure": {"prefill_tokens": 16, "rounds": 1},
    "report": {"prompt": "def x", "sample_tokens": 4},
}  # fmt: skip


def make(folder: Path) -> None:
    """All of them, in folders of `folder`."""
    torch.manual_seed(0)
    bundle = training_set.tiny_bundle()
    bundle.model.generation_config.eos_token_id = bundle.tokenizer.eos_token_id
    context = training_set.tiny_context(bundle, folder / "scratch")
    text = "\n".join(document.text for document in training_set.documents())
    _plain(folder, bundle)
    _artifacts(folder, bundle, context)
    _exports(folder, bundle, context)
    _texts(folder, bundle, text)
    _records(folder, text)
    shutil.rmtree(folder / "scratch", ignore_errors=True)


def _plain(folder: Path, bundle: Bundle) -> None:
    """Folders as other people's tools leave them."""
    for name, size in (("hf", "5GB"), ("sharded", "60KB")):
        bundle.model.save_pretrained(folder / name, max_shard_size=size)
        bundle.tokenizer.save_pretrained(folder / name)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    half = training_set.tiny_bundle().model.bfloat16()
    half.save_pretrained(folder / "half")
    bundle.tokenizer.save_pretrained(folder / "half")
    for name, other in {
        "gpt2": export_models.tiny_bundle("gpt2"),
        "encoder": encoder_models.tiny_encoder("bert"),
        "seq2seq": seq2seq_models.tiny_seq2seq("t5"),
    }.items():
        other.model.save_pretrained(folder / name)
        other.tokenizer.save_pretrained(folder / name)


def _artifacts(folder: Path, bundle: Bundle, context: Context) -> None:
    """As `Bundle.save` leaves them."""
    bundle.save(folder / "float")
    pruned = PruneMagnitude(sparsity=0.3)(bundle, context)
    pruned.save(folder / "masked")
    StoreSparse()(pruned, context).save(folder / "sparse")
    for name, form in {"int8": Int8(), "int4": Int4(group=32), "coded": Coded(rate=4)}.items():
        QuantizeRound(format=form)(bundle, context).save(folder / name)
    QuantizeRound(format=Int2(group=32))(pruned, context).save(folder / "codes masked")


def _exports(folder: Path, bundle: Bundle, context: Context) -> None:
    """For other runtimes: GGUF of several block types, ONNX, compressed-tensors."""
    for name, form in {
        "F16": None, "Q8_0": Int8(group=32), "Q4_0": Int4(group=32, symmetric=True), "Q4_1": Int4(group=32),
    }.items():  # fmt: skip
        held = bundle if form is None else export_models.quantized(bundle, form)
        (folder / f"gguf {name}").mkdir()
        write_gguf(held, folder / f"gguf {name}" / "model.gguf")
    shutil.copytree(folder / "gguf Q4_0", folder / "gguf with hashes")
    write_sums(folder / "gguf with hashes")
    coded = export_models.quantized(bundle, Int8())
    facts = write_artifact(coded, folder / "onnx", Forms())
    write_manifest(coded, folder / "onnx", facts)
    encoder = encoder_models.tiny_encoder("bert")
    facts = write_artifact(encoder, folder / "onnx encoder", Forms())
    write_manifest(encoder, folder / "onnx encoder", facts)
    for name in ("onnx", "onnx encoder"):
        shutil.copytree(folder / name, folder / f"{name} without hashes")
    for name in ("onnx without hashes", "onnx encoder without hashes"):
        content = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))
        (folder / name / "manifest.json").write_text(
            json.dumps({**content, "files": {}, "seal": ""}), encoding="utf-8"
        )
    step = ExportCompressedTensors(check_tokens=32)
    codes = QuantizeRound(format=Int4(group=32, symmetric=True), embeddings=None)(bundle, context)
    shutil.copytree(step(codes, context).exports["compressed-tensors"], folder / "compressed-tensors")


def _texts(folder: Path, bundle: Bundle, text: str) -> None:
    """Text, labelled records, chats, recipes, vocabularies."""
    place = folder / "texts"
    place.mkdir()
    (place / "text.txt").write_text(text[:3000], encoding="utf-8")
    rows = [{"text": line, "label": n % 3, "id": f"r{n}"} for n, line in enumerate(text.splitlines()[:20])]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chats = [{"messages": MESSAGES, "text": "a b"} for _ in range(5)]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    (place / "messages.json").write_text(json.dumps(MESSAGES), encoding="utf-8")
    if find_spec("pyarrow") is not None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), place / "rows.parquet")
        classes = {
            "text": [f"{row['id']} {row['text']}" for row in rows],
            "label": [n % 3 for n in range(20)],
        }
        parquet.write_table(pyarrow.table(classes), place / "classes.parquet")
    table = "".join(f'"the text, {n}",{"ab"[n % 2]}\n' for n in range(20))
    (place / "classes.csv").write_text("text,label\n" + table, encoding="utf-8")
    (place / "words.conll").write_text("".join(f"w{n}\tO\nv\tB-x\n\n" for n in range(20)), encoding="utf-8")
    recipes = folder / "recipe"
    shutil.copytree(folder / "hf", recipes / "model")
    (recipes / "text.txt").write_text(text, encoding="utf-8")
    (recipes / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")
    overrides = ["data.window=8", "variants.pruned.passes.0.prune_magnitude.sparsity=0.25", "seed=3"]
    overrides += ["base.passes=[]", "variants.int4.passes.quantize_round.format={kind: int4, group: 32}"]
    (recipes / "set.txt").write_text("\n".join(overrides), encoding="utf-8")
    pair = folder / "vocabularies"
    bundle.tokenizer.save_pretrained(pair / "larger")
    kept = kept_tokens(bundle.tokenizer, bundle.tokenizer(text[:60])["input_ids"])
    trimmed_tokenizer(bundle.tokenizer, kept).save_pretrained(pair / "smaller")


def _records(folder: Path, text: str) -> None:
    """A run's folder with all records, and what an interrupted one leaves."""
    run = folder / "run"
    shutil.copytree(folder / "hf", folder / "scratch" / "model", dirs_exist_ok=True)
    (folder / "scratch" / "text.txt").write_text(text, encoding="utf-8")
    recipe = {**RECIPE, "model": {"checkpoint": str(folder / "scratch" / "model")}}
    recipe["data"] = {**RECIPE["data"], "text": str(folder / "scratch" / "text.txt")}
    made = make_artifacts(Recipe.parse(recipe), run, lambda line: None)
    results = [
        Result(
            variant=variant.name, runtime="torch", device="cpu", artifact=variant.artifact, disk_bytes=10**5,
            weight_bytes=10**5 // (n + 1), parameters=40_000, nonzero_parameters=39_000, nll=2.5 + n / 10,
            perplexity=float(np.exp(2.5 + n / 10)), bits_per_byte=1.5, nll_ci95=(2.4, 2.7), delta_nll=n / 10,
            delta_nll_ci95=(n / 10 - 0.01, n / 10 + 0.01), kl_to_base=n / 20, kl_ci95=(0.0, n / 10),
            top1_agreement=1 - n / 10, prefill_tokens_per_second=1000.0, decode_tokens_per_second=100.0 + n,
            decode_seconds_p50=0.01, peak_rss_bytes=10**8, load_seconds=0.1, fingerprint=variant.fingerprint,
            protocol={"threads": 1, "batch": 1}, prefill_round_seconds=(0.1, 0.11), timing_session="one",
            decode_round_seconds=(0.01, 0.011), machine={"cpu": "x", "cores": 2}, versions={"torch": "2"},
        )
        for n, variant in enumerate(made.variants)
    ]  # fmt: skip
    write_results(run / "results.jsonl", results)
    RunRecord(
        recipe_name="tiny", base="base", variants=made.variants, data=made.data_record,
        machine={"cpu": "x", "cores": 2}, versions={"torch": "2"},
        references=[Reference(name="unigram", nll=3.0, perplexity=20.1, bits_per_byte=2.0)],
        samples=[Sample(variant="base", runtime="torch", prompt="def x", text="(y):")],
        step_results=[StepResult(variant="int4", step_index=1, pass_name="quantize_round", nll=2.7,
                                 delta_nll=0.2, delta_nll_ci95=(0.1, 0.3), weight_bytes=10**5)],
    ).write(run / "run.json")  # fmt: skip
    work = folder / "unfinished"
    work.mkdir()
    (work / "started").write_text("12.5 1700000000.25", encoding="utf-8")
    SampleBook(samples=[Sample(variant="a", runtime="torch", prompt="p", text="t")]).write(
        work / "samples.json"
    )
    Unfinished(work / "measured.json", {"machine": 1}).keep_step(results[0])
    model, optimizer = trained()
    checkpoint.save(work / "training.safetensors", model, [optimizer], {"identity": "one", "step": 3})


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimiser after a step."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer
