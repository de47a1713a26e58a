"""What opens each kind of input, and what of it must be right; run in a child of the campaign.

What has a proof beside it (hashes, checksums) must give what the whole input gives: `facts` are compared by
the caller. What has none means what it says, so it is read a second time from the definition of its format,
and `Wrong` is raised where the two differ, where a stored tensor is not used, or where the model answers
with numbers that are none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import api, report
from compress.artifact.bundle import Bundle
from compress.cli.tables import print_plan, print_results
from compress.errors import UserError
from compress.generation.chat import render
from compress.generation.generator import TextGenerator
from compress.host.files import read_json
from compress.measure.artifacts import _vocabulary, evaluation_windows
from compress.measure.unfinished import Unfinished
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.records.results import read_results
from compress.records.run import SampleBook
from compress.run.identity import FileHashes, identity
from compress.run.preflight import preflight
from compress.run.recipe import load_recipe
from compress.run.store import StepStore, earlier_seconds
from compress.runtimes import detect_runtime, open_runtime
from compress.runtimes.null_pass import null_pass
from compress.tasks.base import rows_of
from compress.text.documents import load_documents
from compress.text.framing import require_known
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.duplicates import normal_form
from compress.text.labelled.load import load_labelled
from compress.text.translation import translation
from compress.text.windows import DataConfig
from compress.training import checkpoint

from .forked import Wrong
from .inputs import MESSAGES, trained
from .readings import no_twins, require_said, require_same_values, require_stored

TEXT = "def alpha(x): return x + 3"
Facts = dict[str, Any]


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, kinds, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        held = tensor.detach().contiguous()
        found.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
        found.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def model_facts(bundle: Bundle) -> Facts:
    """Weights, masks, tokens of a text and what the model answers to it."""
    model, ids = bundle.model.eval(), bundle.tokenizer(TEXT, verbose=False)["input_ids"]
    if bundle.shards is not None:
        return {"weights": digest(sorted(bundle.shards.read(list(bundle.shards)).items())), "tokens": ids}
    if not ids:  # of words that another tokenizer knows none of
        return {"weights": digest(sorted(model.state_dict().items())), "tokens": ids}
    if (rows := rows_of(model.config)) is not None:
        require_known(ids, rows, "text", bundle.tokenizer.convert_ids_to_tokens)
    given = {"decoder_input_ids": torch.tensor([[1, 5]])} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), **given)
    answer = output.logits if hasattr(output, "logits") else output.last_hidden_state
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise Wrong(
            "the model holds numbers that are none"
        )  # finite ones so large overflow, and measuring says so
    return {
        "weights": digest(sorted(model.state_dict().items())),
        "masks": digest((name, bundle.masks[name]) for name in sorted(bundle.masks)),
        "tokens": ids,
        "answer": digest([("answer", answer)]),
        "end": repr(getattr(model, "generation_config", None) and model.generation_config.eos_token_id),
    }


def artifact(folder: Path) -> Facts:
    """One of ours, hashes compared."""
    return model_facts(Bundle.load(folder))


def artifact_streamed(folder: Path) -> Facts:
    """The same, a block at a time."""
    return model_facts(Bundle.load(folder, stream=True))


def artifact_unverified(folder: Path) -> Facts:
    """One of ours whose hashes are not compared: nothing but its own structure speaks."""
    model_facts(Bundle.load(folder, verify=False))
    return {}


def step(folder: Path) -> Facts:
    """A finished step: it is what was written, or is done again."""
    store = StepStore(folder)
    names = sorted(p.name for p in (folder / ".steps").iterdir()) if (folder / ".steps").is_dir() else []
    found = {}
    for name in names:
        manifest = folder / ".steps" / name / "manifest.json"
        with contextlib.suppress(UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            if not manifest.is_file():
                continue
            whole = read_json(manifest)["fingerprint"]
            if isinstance(whole, str) and store.has(whole):
                found[name] = model_facts(Bundle.load(folder / ".steps" / name))["answer"]
    return found


def foreign(folder: Path) -> Facts:
    """A Hugging Face folder: compared with the stock loader's model and with the bytes of the files."""
    null_pass(folder)
    bundle = Bundle.load(folder)
    model_facts(bundle)
    require_stored(bundle.model.state_dict(), folder)
    return {}


def foreign_streamed(folder: Path) -> Facts:
    """The same, a block at a time."""
    bundle = Bundle.load(folder, stream=True)
    if bundle.shards is None:
        require_stored(bundle.model.state_dict(), folder)
    else:
        require_stored(bundle.shards.read(list(bundle.shards)), folder)
    return {}


def foreign_tokenizer(folder: Path) -> Facts:
    """Tokens of a text are rows of the model, in transformers and in the runtimes' own reader."""
    bundle = Bundle.load(folder)
    rows = bundle.model.get_input_embeddings().weight.shape[0]
    generator = TextGenerator(folder, threads=1)
    for ids in (bundle.tokenizer(TEXT)["input_ids"], generator.encode(TEXT)):
        if not all(0 <= i < rows for i in ids):
            raise Wrong(f"tokens {ids} of {rows} rows")
    list(generator.stream("def", 4))
    return {}


def chat(folder: Path) -> Facts:
    """The text that a template makes of messages."""
    render(folder, MESSAGES)
    return {}


def planned(folder: Path) -> Facts:
    """What a dry run reads of a checkpoint."""
    meta_model(str(folder), for_passes=True)
    identity(str(folder), FileHashes(folder / "hashes.json", keeps=False))
    load_tokenizer(folder)
    return {}


def benched(folder: Path) -> Facts:
    """What `bench` asks before it measures."""
    Path("text.txt").write_text(TEXT * 100, encoding="utf-8")
    evaluation_windows(folder, DataConfig(text="text.txt", window=8, evaluation_windows=2))
    _vocabulary(folder)
    detect_runtime(folder)
    null_pass(folder)
    return {}


def gguf(folder: Path) -> Facts:
    """A GGUF file: its values, whatever their order, are those of the model."""
    file = folder / "model.gguf"
    meta_model(str(file))
    bundle = Bundle.load(file)
    model_facts(bundle)
    require_same_values(file, bundle.model)
    return {}


def gguf_hashed(folder: Path) -> Facts:
    """The same with hashes beside it."""
    return model_facts(Bundle.load(folder / "model.gguf"))


def onnx(folder: Path) -> Facts:
    """A graph of ours, hashes compared; answers to a few tokens."""
    return _graph(folder, True)


def onnx_unverified(folder: Path) -> Facts:
    """A graph whose folder states no hashes: it answers, or is refused."""
    _graph(folder, False)
    return {}


def _graph(folder: Path, verified: bool) -> Facts:
    runtime = open_runtime(folder, "onnxruntime", 1, verify=verified)
    tokens = np.array([[1, 5, 9, 2]], dtype=np.int32)
    answer = runtime.logits(tokens)
    if verified and not np.isfinite(answer).all():
        raise Wrong("the graph answers with numbers that are none")
    return {"answer": hashlib.sha256(answer.tobytes()).hexdigest(), "shape": list(answer.shape)}


def compressed(folder: Path) -> Facts:
    """A folder of compressed-tensors in stock transformers."""
    runtime = open_runtime(folder, "transformers", 1)
    answer = runtime.logits(np.array([[1, 5, 9, 2]], dtype=np.int32))
    return {"answer": hashlib.sha256(answer.tobytes()).hexdigest()}


def recipe(folder: Path) -> Facts:
    """A recipe and its dry run; what is printed of it is read."""
    os.chdir(folder)
    plan = load_recipe("recipe.yaml")
    plan_of = preflight(plan, folder / "out")
    print_plan(plan, plan_of, folder / "out")
    (folder / "again.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    if load_recipe("again.yaml").model_dump() != plan.model_dump():
        raise Wrong("the recipe does not come back as it was written")
    return {}


def overrides(folder: Path) -> Facts:
    """`--set`, a word per line."""
    os.chdir(folder)
    lines = (folder / "set.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    plan = load_recipe("recipe.yaml", lines)
    (folder / "again.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    if load_recipe("again.yaml").model_dump() != plan.model_dump():
        raise Wrong("the recipe does not come back as it was written")
    return {}


def labelled(file: Path) -> Facts:
    """Labelled rows: whatever is read, no text is in two parts, and every label trains."""
    data = load_labelled(LabelledConfig(source=str(file)))
    parts = [{normal_form(row.text, row.pair) for row in part}
             for part in (data.train, data.heldout, data.evaluation)]  # fmt: skip
    if len(set.union(*parts)) != sum(map(len, parts)):
        raise Wrong("a text is in two parts")
    return {}


def documents(file: Path) -> Facts:
    """A file of text, read a second time from what its kind means."""
    found = load_documents(str(file))
    texts = [document.text for document in found]
    if file.suffix == ".txt":
        wanted = [
            file.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        ]
    elif file.suffix == ".jsonl":
        lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
        rows = [json.loads(line.decode("utf-8-sig"), object_pairs_hook=no_twins) for line in lines]
        wanted = [row["text"] for row in rows if (row["text"] or "").strip()]
    else:
        return {}
    if texts != wanted:
        raise Wrong(f"{len(texts)} texts that are not the {len(wanted)} of the file")
    return {}


def messages(folder: Path) -> Facts:
    """Chat rows through a template."""
    try:
        rows = json.loads((folder / "messages.json").read_bytes())
    except (ValueError, OSError, RecursionError):
        return {}  # whoever calls has read them
    if isinstance(rows, list):
        render(folder, rows)
    return {}


def vocabularies(folder: Path) -> Facts:
    """A trimmed vocabulary beside the whole one; each token it has is the same in both."""
    found = translation(folder / "larger" / "tokenizer.json", folder / "smaller" / "tokenizer.json")
    if found is None:
        return {}
    ids = load_tokenizer(folder / "larger")(TEXT)["input_ids"]
    windows = np.array([(ids * 8)[:32]], dtype=np.int32)
    found.whole(windows)
    if found.stream(windows[0]).max() >= len(load_tokenizer(folder / "smaller")):
        raise Wrong("a token that the smaller vocabulary does not have")
    return {}


def results(folder: Path) -> Facts:
    """Measured lines: the values that JSON says; and what is printed of them."""
    found = read_results(folder / "results.jsonl")
    if (folder / "results.jsonl").exists():
        lines = [line for line in (folder / "results.jsonl").read_bytes().split(b"\n") if line.strip()]
        if len(found) != len(lines):
            raise Wrong(f"{len(found)} results of {len(lines)} lines")
        for result, line in zip(found, lines, strict=True):
            require_said(result.model_dump(mode="json"), json.loads(line, object_pairs_hook=no_twins))
    print_results(found)
    return {}


def run(folder: Path) -> Facts:
    """The records of a run, and the pages that are made of them."""
    record, found, source = api.load_run(folder)
    require_said(
        record.model_dump(mode="json"),
        json.loads((folder / "run.json").read_bytes(), object_pairs_hook=no_twins),
    )
    html, _ = report.render(record, found, source)
    report.compare([(record, found, source)])
    if "<script>alert" in html or "\x1b" in html:
        raise Wrong("markup of a record stands in the page")
    return {}


def unfinished(folder: Path) -> Facts:
    """What an interrupted run left: gone on with, or begun again."""
    earlier_seconds(folder)
    with contextlib.suppress(UserError):
        SampleBook.read(folder / "samples.json")
    left = Unfinished(folder / "measured.json", {"machine": 1})
    left.timings(["a"])
    return {}


def training(folder: Path) -> Facts:
    """A checkpoint of a training: the same state, or none."""
    model, optimizer = trained()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = checkpoint.restore(folder / "training.safetensors", model, [optimizer], "one")
    if found is None:
        if any(bool(parameter.any()) for parameter in model.parameters()):
            raise Wrong("a checkpoint that is not taken has changed the model")
        return {"state": None}
    state = [(f"{key} {name}", v) for name, s in enumerate(optimizer.state.values()) for key, v in s.items()]
    return {"state": digest([*model.state_dict().items(), *state]), "step": found.get("step")}
