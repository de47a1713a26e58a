"""Hostile files: nothing of them runs, leaves the folder, asks the network, paints the terminal or takes all.

A case changes a copy of a whole input (`hostile_inputs.py`) and opens it in a child as the commands do. It
is `refused` by one line, or `right`: it was read as data. Bad is `code run` (the canary is there), `touched`
(a file outside was written, or the network was asked), `escape printed` (a control character, or markup that
a page does not escape), `hang`, `memory`, `traceback`, `killed`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress import api
from compress.cli import commands
from compress.errors import UserError
from compress.run.store import StepStore

from . import openers
from .core import Outcome, Settings
from .forked import Ended, Wrong, forked
from .hostile_inputs import (
    CANARY,
    ESCAPE,
    MARKUP,
    OUTSIDE,
    TEMPLATES,
    Change,
    both,
    custom_operator,
    edited,
    evil_modules,
    external,
    gguf,
    graph,
    hollow,
    linked,
    nested,
    parquet_bomb,
    pickled,
    pipe,
    remote,
    remote_generation,
    remote_tokenizer,
    remote_type,
    safetensors,
    tokenizer_with,
    without,
    written,
)  # fmt: skip
from .mutations import Campaign, Open

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _Terminal(io.TextIOWrapper):
    """What is printed goes to a person."""

    def isatty(self) -> bool:
        return True


def command(*arguments: str) -> Open:
    """`compress-lm ARGUMENTS` in the folder, on a terminal: right, or one line."""

    def call(folder: Path) -> dict[str, Any]:
        os.chdir(folder)
        os.environ["TERM"] = "dumb"  # no colours of our own
        sys.argv, errors, code = ["compress-lm", *arguments], io.StringIO(), 0
        sys.stdout = _Terminal(os.fdopen(1, "wb", closefd=False), encoding="utf-8", errors="replace")
        with contextlib.redirect_stderr(errors):
            try:
                commands.main()
            except SystemExit as end:
                code = int(end.code or 0)
        sys.stdout.flush()
        said = errors.getvalue()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if "Traceback" in said or (code and len(lines) != 1):
            raise RuntimeError(f"exit code {code}: {said[-1500:]}")
        if _CONTROLS.search(said):
            raise Wrong(f"escapes on standard error: {said!r:.200}")
        if code:
            raise UserError(lines[0])
        return {}

    return call


_DRY = command("run", "recipe.yaml", "--dry-run")
_GENERATE = command("generate", ".", "-p", "def alpha", "--tokens", "4", "--threads", "1")
_CHAT = command("generate", ".", "-p", "hi", "--chat", "--tokens", "4", "--threads", "1")
_COMPARE = command("compare", ".", "-o", "page.html")


def page(folder: Path) -> dict[str, Any]:
    """The pages and tables of a run, none of whose markup is a record's."""
    html = api.write_report(folder).read_text(encoding="utf-8")
    text = (folder / "report.md").read_text(encoding="utf-8")
    if any(part in html for part in ("<script>alert", "<img src=x")) or _CONTROLS.search(html + text):
        raise Wrong("markup of a record stands in the page")
    return command("compare", ".", "-o", "page.html")(folder)


def steps(folder: Path) -> dict[str, Any]:
    """A run's folder is gone on with: steps are looked for, shown and swept up."""
    store = StepStore(folder)
    for place in sorted((folder / ".steps").iterdir()):
        if store.has(place.name):
            store.publish(place.name, "pruned")
    store.forget_others(set())
    return {}


def _records(**changes: str) -> dict[str, tuple[str, Change, Open]]:
    return {
        f"markup: {name}": ("run", nested(name.split("'")[0], path, ESCAPE + MARKUP), page)
        for name, path in changes.items()
    }


_HF, _TOKENS, _CODES = openers.foreign, openers.foreign_tokenizer, openers.artifact_unverified
_GRAPH, _HASHED, _ART, _GGUF = openers.onnx_unverified, openers.gguf_hashed, openers.artifact, openers.gguf
_INDEX = "model.safetensors.index.json"
_RECIPE = "name: x\nmodel: {checkpoint: model}\ndata: {text: text.txt, window: 16}\n"
_SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+(a+)+(a+)+$"}, "behavior": "Isolated", "invert": False}
_BOMB = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


def _read(name: str) -> Open:
    return lambda folder: openers.documents(folder / name)


CASES: dict[str, tuple[str, Change, Open]] = {
    # code
    "pickle as safetensors": ("hf", pickled("model.safetensors"), _HF),
    "archive of torch as safetensors": ("hf", pickled("model.safetensors", archive=True), _HF),
    "pickle alone": ("hf", both(without("model.safetensors"), pickled("pytorch_model.bin")), _HF),
    "pickle beside": ("hf", pickled("pytorch_model.bin", archive=True), _HF),
    "pickled settings beside": ("hf", both(pickled("training_args.bin"), pickled("optimizer.pt")), _HF),
    "pickle in an index": ("sharded", both(pickled("x.bin"), nested(_INDEX,
        "weight_map", {"a": "x.bin"})), _HF),
    "pickle as codes": ("int4", pickled("quantized.safetensors"), _CODES),
    "pickle as masks": ("codes masked", pickled("masks.safetensors"), _CODES),
    "pickle as GGUF": ("gguf F16", pickled("model.gguf"), _GGUF),
    "pickle as parquet": ("texts", pickled("rows.parquet"), _read("rows.parquet")),
    "pickle as state of a training": ("unfinished", pickled("training.safetensors"), openers.training),
    "auto_map": ("hf", remote, _HF),
    "auto_map, dry run": ("hf", remote, openers.planned),
    "auto_map, unknown type": ("hf", remote_type, _HF),
    "auto_map, generate": ("hf", remote, _GENERATE),
    "auto_map of a tokenizer": ("hf", remote_tokenizer, _TOKENS),
    "auto_map of a tokenizer, dry run": ("hf", remote_tokenizer, openers.planned),
    "auto_map in an artifact": ("int4", remote, _CODES),
    "custom_generate": ("hf", remote_generation, _GENERATE),
    "modules beside the model": ("hf", evil_modules, _CHAT),
    "modules beside a recipe": ("recipe", evil_modules, _DRY),
    "attention from the hub": ("hf", edited("config.json", _attn_implementation="evil/kernel"), _HF),
    "attention from the hub, 2": ("hf", edited("config.json", attn_implementation="evil/kernel"), _GENERATE),
    "quantizer from the hub": ("hf", edited("config.json",
        quantization_config={"quant_method": "evil/x"}), _HF),
    "adapter of the hub": ("hf", written("adapter_config.json",
        '{"base_model_name_or_path": "evil/x", "peft_type": "LORA"}'), _HF),
    "vocabulary elsewhere": ("hf", edited("tokenizer_config.json", vocab_file=OUTSIDE,
        tokenizer_file=OUTSIDE), _TOKENS),
    "class of anything": ("hf", edited("config.json", architectures=["os.system", "../x"]), _HF),
    "dtype of anything": ("hf", edited("config.json", dtype="load", torch_dtype="hub"), _HF),
    "YAML that calls": ("recipe", written("recipe.yaml",
        f"name: !!python/object/apply:os.system ['touch {CANARY}']\n"), _DRY),
    "--set that calls": ("recipe", lambda folder: None, command("run", "recipe.yaml", "--dry-run", "--set",
        f"name=!!python/object/apply:os.system ['touch {CANARY}']")),
    "custom operators": ("onnx without hashes", graph(custom_operator), _GRAPH),
    "library of custom operators": ("onnx without hashes", edited("genai_config.json",
        model={"decoder": {"session_options": {"custom_ops_library": "/tmp/x.so"}}}), _GRAPH),
    **{f"template: {name}": ("hf", written("chat_template.jinja", source), _CHAT)
       for name, source in TEMPLATES.items()},
    "template in settings": ("hf", both(without("chat_template.jinja"), edited("tokenizer_config.json",
        chat_template=[{"name": "default", "template": TEMPLATES["globals"]}])), _CHAT),
    # paths
    "manifest: ..": ("float", nested("manifest.json", "files", {"../x": {"bytes": 1, "sha256": "0"}}),
        _ART),
    "manifest: absolute": ("float", nested("manifest.json", "files", {OUTSIDE: {"bytes": 1, "sha256": "0"}}),
        _ART),
    "manifest: exports": ("float", nested("manifest.json", "exports", ["../..", OUTSIDE]), _ART),
    "hashes: ..": ("gguf with hashes", written("SHA256SUMS", "0" * 64 + "  ../../x\n"), _HASHED),
    **{f"index: {place!r}": ("sharded", nested(_INDEX, "weight_map", {"a": place}), _HF)
       for place in ("../x.safetensors", OUTSIDE, "/dev/zero", "\0", "a" * 5000, "")},
    **{f"pipe: {name}": (source, pipe(name), call) for source, name, call in (
        ("hf", "config.json", _HF), ("hf", "tokenizer.json", _GENERATE), ("hf", "model.safetensors", _HF),
        ("int4", "manifest.json", _ART), ("int4", "quantized.safetensors", _ART),
        ("recipe", "recipe.yaml", _DRY), ("recipe", "text.txt", _DRY),
        ("run", "results.jsonl", openers.results),
        ("run", "recipe.yaml", _COMPARE), ("onnx", "model.onnx", openers.onnx), ("onnx", "model.onnx_data",
        openers.onnx), ("gguf F16", "model.gguf", _GGUF), ("hf", "chat_template.jinja", _CHAT),
        ("gguf with hashes", "SHA256SUMS", _HASHED),
        ("unfinished", "started", openers.unfinished),
        ("unfinished", "training.safetensors", openers.training))},
    **{f"device: {name}": (source, linked(name, "/dev/zero"), call) for source, name, call in (
        ("hf", "config.json", _HF), ("hf", "model.safetensors", _HF), ("hf", "tokenizer.json", _GENERATE),
        ("texts", "text.txt", _read("text.txt")),
        ("texts", "rows.jsonl", _read("rows.jsonl")),
        ("gguf F16", "model.gguf", _GGUF), ("int4", "manifest.json", _ART))},
    "folder of texts: pipe and loop": ("texts", both(pipe("pipe.txt"), linked("loop", ".")),
        openers.documents),
    "weights elsewhere": ("onnx without hashes", external("../../x"), _GRAPH),
    "weights in a system's file": ("onnx without hashes", external("/etc/passwd"), _GRAPH),
    "recipe named ..": ("recipe", written("recipe.yaml", _RECIPE.replace("name: x", "name: ../../x")), _DRY),
    "variant named ..": ("recipe", written("recipe.yaml", _RECIPE + "variants: {../../x: []}\n"), _DRY),
    "variant named /": ("recipe", written("recipe.yaml", _RECIPE + "variants: {/tmp/x: []}\n"), _DRY),
    "steps elsewhere": ("run", lambda f: (f / ".steps" / "0").symlink_to("/tmp"), steps),
    "run: paths": ("run", nested("run.json", "variants.0.artifact", "../../../etc"), page),
    # sizes
    "header of 2^63": ("hf", written("model.safetensors", safetensors({}, length=2**63)), _HF),
    "shape of 2^62": ("hf", written("model.safetensors", safetensors(
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}})), _HF),
    "header of nothing": ("hf", written("model.safetensors", safetensors(b" " * 90_000_000)), _HF),
    "header nested": ("hf", written("model.safetensors", safetensors(b"[" * 10**6)), _HF),
    "JSON nested": ("hf", written("config.json", "[" * 10**6), _HF),
    "JSON of digits": ("hf", written("config.json", '{"a": ' + "9" * 10**6 + "}"), _HF),
    **{f"config: {field}": ("hf", edited("config.json", **{field: value}), call) for field, value, call in (
        ("num_hidden_layers", 10**9, _HF), ("vocab_size", 10**12, openers.planned),
        ("max_position_embeddings", 10**15, _GENERATE), ("head_dim", 2**40, _HF),
        ("layer_types", ["x"] * 10**6, _HF),
        ("num_labels", 10**8, _HF), ("id2label", {str(i): "x" for i in range(10**6)}, _HF),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": [1] * 10**6}, _HF))},
    "YAML bomb": ("recipe", written("recipe.yaml", "a0: &a0 [x, x]\n" + _BOMB), _DRY),
    "YAML nested": ("recipe", written("recipe.yaml", "[" * 400_000), _DRY),
    "GGUF: tensors": ("gguf F16", written("model.gguf", gguf(2**60, 0)), _GGUF),
    "GGUF: settings": ("gguf F16", written("model.gguf", gguf(0, 2**60)), _GGUF),
    "GGUF: a text": ("gguf F16", written("model.gguf", gguf(0, 1, 2**63, b"a")), _GGUF),
    "GGUF: lists in lists": ("gguf F16", written("model.gguf", gguf(0, 1, 1, b"a" + b"\t\0\0\0" * 400)),
        _GGUF),
    "8 GB as tokenizer": ("hf", hollow("tokenizer.json", 8), _GENERATE),
    "8 GB as weights": ("hf", hollow("model.safetensors", 8, safetensors({})), _HF),
    "8 GB as configuration": ("hf", hollow("config.json", 8), _GENERATE),
    "8 GB as text": ("texts", hollow("text.txt", 8), _read("text.txt")),
    "an endless line": ("texts", hollow("rows.jsonl", 8, b'{"text": "'), _read("rows.jsonl")),
    "a line of brackets": ("texts", written("rows.jsonl", '{"text": ' + "[" * 10**6),
        _read("rows.jsonl")),
    "parquet bomb": ("texts", parquet_bomb, _read("rows.parquet")),
    "8 GB of results": ("run", hollow("results.jsonl", 8), openers.results),
    "8 GB as manifest": ("float", hollow("manifest.json", 8), _ART),
    "8 GB as hashes": ("gguf with hashes", hollow("SHA256SUMS", 8), _HASHED),
    "a group of 2^40": ("int4", nested("manifest.json", "layers", {"model.layers.0.mlp.up_proj": {
        "format": {"kind": "int4", "group": 2**40}, "shape": [2**40, 2**20]}}), _CODES),
    "sparse of 2^60": ("sparse", nested("manifest.json", "sparse", {"model.layers.0.mlp.up_proj.weight": {
        "shape": [2**30, 2**30], "stored": 2**60}}), _CODES),
    "expression that backtracks": ("hf", tokenizer_with(pre_tokenizer=_SPLIT), command(
        "generate", ".", "-p", "a" * 4000 + "b", "--tokens", "2")),
    "padding of 2^40": ("hf", tokenizer_with(padding={"strategy": {"Fixed": 2**40}, "direction": "Right",
        "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
        _TOKENS),
    "text made longer": ("hf", tokenizer_with(normalizer={"type": "Replace", "pattern": {"String": "a"},
        "content": "a" * 10**6}), command("generate", ".", "-p", "a" * 1000, "--tokens", "2")),
    "a million tokens added": ("hf", tokenizer_with(added_tokens=[{"id": 300 + i, "content": f"<{i}>",
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i in range(100_000)]), _TOKENS),
    # escapes and markup
    "escapes: recipe's name": ("recipe", written("recipe.yaml",
        _RECIPE.replace("name: x", 'name: "\\e[31mx"')), _DRY),
    "escapes: variant": ("recipe", written("recipe.yaml", _RECIPE + 'variants: {"a\\e[2J": []}\n'), _DRY),
    "escapes: field": ("recipe", written("recipe.yaml", _RECIPE + '"\\e[2J[bold]": 1\n'), _DRY),
    "escapes: value": ("recipe", written("recipe.yaml", _RECIPE.replace("text.txt", '"\\e]0;x\\a"')), _DRY),
    "escapes: model type": ("hf", edited("config.json", model_type=ESCAPE), _GENERATE),
    "escapes: token": ("hf", edited("tokenizer_config.json", eos_token=ESCAPE, bos_token=ESCAPE), _GENERATE),
    "escapes: prompt": ("hf", lambda folder: None, command("generate", ".", "-p", ESCAPE, "--tokens", "2")),
    "escapes: tensor": ("hf", written("model.safetensors", safetensors(
        {ESCAPE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4)), _GENERATE),
    "escapes: file of text": ("recipe", written(f"{ESCAPE.replace('/', '')}.txt", "x"), command(
        "run", "recipe.yaml", "--dry-run", "--text", f"{ESCAPE}.txt")),
    "escapes: table": ("run", nested("results.jsonl", "variant", ESCAPE), openers.results),
    "markup: recipe of a run": ("run", written("recipe.yaml", f"# {MARKUP}\nname: '{MARKUP}'\n"), page),
    **_records(**{
        "run.json's name": "recipe_name", "run.json's variant": "variants.1.name", "run.json's sample":
        "samples.0.text", "run.json's prompt": "samples.0.prompt", "run.json's machine": "machine.cpu",
        "run.json's versions": "versions.torch", "run.json's source": "data.source", "run.json's pass":
        "variants.1.steps.1.name", "results.jsonl's variant": "variant", "results.jsonl's runtime": "runtime",
        "results.jsonl's device": "device",
    }),
}  # fmt: skip


def run(settings: Settings) -> Iterator[Outcome]:
    """All cases, or the first `settings.count` of them drawn by the seed."""
    import random

    campaign = Campaign(settings.work)
    names = list(CASES)
    if settings.count < len(names):
        names = random.Random(settings.seed).sample(names, settings.count)
    for name in names:
        verdict, line = outcome(campaign, name)
        yield Outcome(name.partition(":")[0], verdict, f"{name}: {line}", f"hostile.CASES[{name!r}]")


def outcome(campaign: Campaign, name: str) -> tuple[str, str]:
    """How a case ended, and why."""
    source, change, call = CASES[name]
    CANARY.unlink(missing_ok=True)
    folder = campaign.copy(source)
    change(folder)
    return _verdict(forked(call, folder, campaign.work / "scratch"))


def _verdict(ended: Ended) -> tuple[str, str]:
    if CANARY.exists():
        return "code run", ended.line
    if ended.events:
        return "touched", ended.events[0]
    if ended.how == "wrong" or _CONTROLS.search(ended.printed):
        return "escape printed", ended.line or repr(ended.printed[-200:])
    if ended.how == "refused":
        return ("refused", ended.line) if ended.line.isprintable() else ("escape printed", repr(ended.line))
    return ("right", "") if ended.how == "value" else (ended.how, ended.line)
