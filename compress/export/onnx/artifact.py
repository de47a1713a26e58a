"""An ONNX artifact: graph, weights, tokenizer, configuration, and what `onnxruntime-genai` wants to read."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from compress.artifact.bundle import Bundle, quantized_layers
from compress.artifact.counts import file_record
from compress.artifact.folder import MANIFEST
from compress.export.onnx.architecture import Decoder, Linear
from compress.export.onnx.attention import CacheScales
from compress.export.onnx.decoder import forms_of_ends, write_decoder
from compress.export.onnx.encoder import encoder_inputs, write_encoder
from compress.export.onnx.families import describe
from compress.export.onnx.forms import Forms, form_of
from compress.export.onnx.genai import FILE as GENAI_FILE
from compress.export.onnx.genai import genai_config
from compress.export.onnx.graph import DATA_FILE, GraphBuilder
from compress.export.onnx.seq2seq import write_seq2seq
from compress.models.checkpoints import quiet_transformers, save_configurations
from compress.records.manifest import Manifest
from compress.runtimes.onnx_session import PROCESSOR, right_only
from compress.tasks.base import longest_text
from compress.tasks.registry import task_of
from compress.tasks.seq2seq import start_token
from compress.version import __version__


def write_artifact(
    bundle: Bundle, folder: Path, forms: Forms, cache: Sequence[CacheScales] | None = None
) -> dict[str, Any]:
    """Write the graph of `bundle` and everything a runtime needs beside it into an empty `folder`.

    With `cache`, scales per block, a decoder's key-value cache holds 8-bit codes. Returns facts of the graph:
    task, forms, bytes, context. Raises UserError for an architecture or a group size that has no form here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    task = task_of(bundle.model.config)
    if task.continues:
        facts = _write_decoder(bundle, folder, forms, cache)
    elif task.writes:
        facts = _write_seq2seq(bundle, folder, forms)
    else:
        facts = _write_encoder(bundle, folder, forms)
    with quiet_transformers():
        save_configurations(bundle.model, folder)
        bundle.tokenizer.save_pretrained(folder)
    file_bytes = sum(file.stat().st_size for file in (*folder.glob("*.onnx"), folder / DATA_FILE))
    model_type = str(bundle.model.config.model_type)
    return {"task": task.name, "model_type": model_type, "file_bytes": file_bytes, **facts}


def _write_decoder(
    bundle: Bundle, folder: Path, forms: Forms, cache: Sequence[CacheScales] | None
) -> dict[str, Any]:
    decoder = describe(bundle.model)
    with GraphBuilder(folder) as graph:
        write_decoder(graph, decoder, forms, cache)
        weight_bytes = graph.weight_bytes
        facts = {"context": str(decoder.context), "weight_bytes": str(weight_bytes)}
        graph.save(decoder.model_type, facts | _needs(forms))
    settings = genai_config(bundle.model, bundle.tokenizer, decoder)
    if settings is not None:
        (folder / GENAI_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return {
        **_facts(
            _forms(decoder.matrices(), forms) + _forms([decoder.head], forms_of_ends(forms)),
            forms,
            weight_bytes,
            decoder.context,
        ),
        "layers": len(decoder.blocks),
        "cache": "float32" if cache is None else "int8",
        "cache_bytes_per_token": _cache_bytes(decoder, 4 if cache is None else 1),
    }


def _write_encoder(bundle: Bundle, folder: Path, forms: Forms) -> dict[str, Any]:
    model, tokenizer, task = bundle.model, bundle.tokenizer, task_of(bundle.model.config)
    inputs, longest = encoder_inputs(model, tokenizer), longest_text(model)
    with GraphBuilder(folder) as graph:
        used, either, closed = write_encoder(graph, model, task, inputs, forms)
        weight_bytes = graph.weight_bytes
        facts = {"task": task.name, "context": str(longest), "weight_bytes": str(weight_bytes)}
        if (mask_token := task.mask_token(tokenizer)) is not None:
            facts["mask_token"] = str(mask_token)
        graph.save(model.config.model_type, facts | _needs(forms) | right_only(either))
    facts_of_all = _facts(_forms(used, forms), forms, weight_bytes, longest)
    left_out = {"closed_heads_left_out": closed} if closed else {}
    return {**facts_of_all, "inputs": inputs, "padded_left": either, **left_out}


def _write_seq2seq(bundle: Bundle, folder: Path, forms: Forms) -> dict[str, Any]:
    model, task, longest = bundle.model, task_of(bundle.model.config), longest_text(bundle.model)
    facts = {"task": task.name, "context": str(longest), "start_token": str(start_token(model))}
    used, weight_bytes, either = write_seq2seq(folder, model, forms, facts | _needs(forms))
    return {**_facts(_forms(used, forms), forms, weight_bytes, longest), "padded_left": either}


def write_manifest(bundle: Bundle, folder: Path, facts: dict[str, Any]) -> None:
    """The manifest of the folder: the lineage up to the export, and what was checked."""
    steps = bundle.lineage.steps
    Manifest(
        kind="onnx",
        compress_version=__version__,
        fingerprint=steps[-1].fingerprint if steps else "",
        lineage=bundle.lineage,
        layers=quantized_layers(bundle.model),
        files={path.name: file_record(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST},
        onnx=facts,
    ).write(folder / MANIFEST)


def _needs(forms: Forms) -> dict[str, str]:
    """What a runtime must know of the processor that the graph is for."""
    return {} if forms.processor == "any" else {PROCESSOR: forms.processor}


def _forms(layers: Iterable[Linear], forms: Forms) -> list[str]:
    return [form_of(layer, forms) for layer in layers]


def _facts(used: Iterable[str], forms: Forms, weight_bytes: int, context: int) -> dict[str, Any]:
    """What is noted of every graph; `used`: the form of each matrix."""
    return {
        "linear_forms": dict(Counter(used)),
        "accuracy_level": forms.accuracy_level,
        "weight_bytes": weight_bytes,
        "context": context,
    }


def _cache_bytes(decoder: Decoder, bytes_per_value: int) -> int:
    """What each token of a text costs in keys and values."""
    attentions = [block.attention for block in decoder.blocks]
    return sum(2 * a.cache_heads * a.head_width * bytes_per_value for a in attentions)
