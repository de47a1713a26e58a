"""An ONNX artifact: graph, weights, tokenizer, configuration, and what `onnxruntime-genai` wants to read."""

import json
import shutil
from pathlib import Path
from typing import Any

from compress.bundle import MANIFEST, Bundle, file_record, quantized_layers
from compress.checkpoints import quiet_transformers
from compress.export.architecture import Decoder, describe
from compress.export.decoder import write_decoder
from compress.export.graph import DATA_FILE, MODEL_FILE, GraphBuilder
from compress.export.linear import Forms, form_of
from compress.records import Manifest
from compress.version import __version__

_GENAI = "genai_config.json"


def write_artifact(bundle: Bundle, folder: Path, forms: Forms) -> dict[str, Any]:
    """Write the graph of `bundle` and everything a runtime needs beside it into an empty `folder`.

    Returns facts of the graph: forms, file bytes, input names. Raises UserError for an architecture or a
    group size that has no form here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    decoder = describe(bundle.model)
    with GraphBuilder(folder) as graph:
        write_decoder(graph, decoder, forms)
        weight_bytes = graph.weight_bytes
        facts = {"context": str(decoder.context), "weight_bytes": str(weight_bytes)}
        graph.save(decoder.model_type, facts)
    with quiet_transformers():
        bundle.model.config.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
    (folder / _GENAI).write_text(json.dumps(_genai(bundle, decoder), indent=2) + "\n", encoding="utf-8")
    file_bytes = sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))
    return {
        "model_type": decoder.model_type,
        "linear_forms": _used_forms(decoder, forms),
        "accuracy_level": forms.accuracy_level,
        "weight_bytes": weight_bytes,
        "file_bytes": file_bytes,
        "context": decoder.context,
        "layers": len(decoder.blocks),
    }


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


def _used_forms(decoder: Decoder, forms: Forms) -> dict[str, int]:
    """How many matrices take each form."""
    counts: dict[str, int] = {}
    for block in decoder.blocks:
        attention, mlp = block.attention, block.mlp
        layers = [
            attention.query,
            attention.key,
            attention.value,
            attention.output,
            mlp.gate,
            mlp.up,
            mlp.down,
        ]
        for layer in layers:
            if layer is not None:
                form = form_of(layer.weight, forms)
                counts[form] = counts.get(form, 0) + 1
    head = form_of(decoder.head.weight, forms)
    return {**counts, head: counts.get(head, 0) + 1}


def _genai(bundle: Bundle, decoder: Decoder) -> dict[str, Any]:
    """`genai_config.json`; blocks of a pruned model that differ in heads are not expressible there."""
    config, first = bundle.model.config, decoder.blocks[0].attention
    eos = config.eos_token_id if config.eos_token_id is not None else bundle.tokenizer.eos_token_id
    pad = config.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    return {
        "model": {
            "type": decoder.model_type,
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else eos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "context_length": decoder.context,
            "vocab_size": decoder.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "head_size": first.head_width,
                "hidden_size": int(decoder.embedding.shape[1]),
                "num_attention_heads": first.heads,
                "num_key_value_heads": first.cache_heads,
                "num_hidden_layers": len(decoder.blocks),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": decoder.context, "past_present_share_buffer": True},
    }
