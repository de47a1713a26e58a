"""What a plan says a run will take, beside what it took."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import DATA, invoke, write_recipe, write_text

import compress
from compress import DataConfig, PruneStructured, Student
from compress.models.checkpoints import meta_model
from compress.models.create import Architecture, create
from compress.run import estimate as module
from compress.run.estimate import estimate
from compress.run.preflight import preflight
from compress.run.recipe import load_recipe
from compress.text.documents import load_documents

CHAINS: dict[str, dict[str, Any]] = {
    "codes": {"a": [{"quantize_round": {"format": "int8"}}]},
    "codes and an export": {
        "a": [
            {"quantize_gptq": {"format": {"kind": "int4", "group": 32}}},
            {"export_onnx": {"check_tokens": 64}},
        ]
    },
    "a shared step": {
        "a": [{"prune_wanda": {"sparsity": 0.5}}],
        "b": {"from": "a", "passes": [{"quantize_round": {"format": {"kind": "int4", "group": 32}}}]},
        "c": {"from": "a", "passes": [{"export_gguf": {"check_tokens": 64}}]},
    },
    "training": {"a": [{"distill": {"tokens": 256, "batch": 4, "checkpoint_seconds": 0}}]},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of 3.4 M parameters, large enough that weights are what fills a disk, and a text."""
    folder = tmp_path_factory.mktemp("estimate")
    text = write_text(folder / "text")
    shape = Architecture(preset="3m", vocab_size=400, hidden=256, heads=4, kv_heads=2, intermediate=704)
    model, tokenizer = create(shape, load_documents(str(text)), seed=0)
    model.save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    return folder


def recipe(place: Path, variants: dict[str, Any]) -> Path:
    return write_recipe(
        place / "r.yaml",
        place / "text",
        model={"checkpoint": str(place / "m")},
        data={"text": str(place / "text"), **DATA},
        base=[],
        variants=variants,
    )


def bytes_in(folder: Path) -> int:
    """Of all files, hard links once."""
    sizes: dict[int, int] = {}
    for file in folder.rglob("*"):
        try:
            state = file.lstat()
        except OSError:  # gone meanwhile
            continue
        if file.is_file():
            sizes[state.st_ino] = state.st_size
    return sum(sizes.values())


@pytest.mark.parametrize("name", CHAINS)
def test_disk_is_predicted(name, place, tmp_path):
    file, folder = recipe(place, CHAINS[name]), tmp_path / "run"
    predicted = preflight(load_recipe(str(file)), folder).estimate.disk_bytes
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            with suppress(FileNotFoundError):  # a folder that went while it was looked at
                most[0] = max(most[0], bytes_in(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        outcome = invoke("run", file, "-o", folder, "--no-measure")
    finally:
        done.set()
        watcher.join()
    assert outcome.code == 0, outcome.err
    assert most[0] / 2 < predicted < most[0] * 2


def test_passes_that_stream_ask_for_a_block(place, monkeypatch):
    monkeypatch.setattr(module, "_PROCESS_BYTES", 0)
    model = meta_model(str(place / "m"))
    size = 4 * sum(p.numel() for p in model.parameters())
    streaming = load_recipe(str(recipe(place, {"a": ["quantize_gptq"]})))
    assert estimate(streaming, model, measured=False).memory_bytes < size
    assert size < estimate(streaming, model).memory_bytes < 1.2 * size  # measuring holds the base
    training = load_recipe(str(recipe(place, {"a": [{"train": {"tokens": 256, "batch": 4}}]})))
    assert estimate(training, model, measured=False).memory_bytes > 4 * size


@pytest.mark.parametrize(
    "step",
    [
        PruneStructured(target={"parameters": 0.5, "shapes": 1}),
        PruneStructured(target={"bytes": 8e6, "shapes": 1}),
        PruneStructured(heads=0.5, neurons=0.25),
        Student(blocks=2),
        Student(hidden=128, intermediate=352, heads=2, kv_heads=1),
    ],
)
def test_what_is_left_of_a_model_is_foreseen(step, place):
    whole = compress.load(place / "m")
    data = DataConfig(text=str(place / "text"), window=16, calibration_windows=4, evaluation_windows=2)
    left = whole.apply(step, text=data)
    counts = [sum(p.numel() for p in bundle.model.parameters()) for bundle in (left, whole)]
    assert step.share_left(meta_model(str(place / "m"))) == pytest.approx(counts[0] / counts[1], rel=0.15)


def test_epochs_of_labelled_texts_are_part_of_the_time(place, monkeypatch):
    monkeypatch.setattr(module, "_flops_per_second", lambda: 1e6)
    model = meta_model(str(place / "m"))
    parameters = sum(p.numel() for p in model.parameters())
    for name, more, operations in (("finetune", {}, 6), ("finetune", {"lora": {}}, 4), ("distill", {}, 8)):
        plan = load_recipe(str(recipe(place, {"a": [{name: {"epochs": 2, **more}}]})))
        few, many = (estimate(plan, model, epoch_tokens=tokens).pass_seconds for tokens in (1000, 3000))
        assert many - few == pytest.approx(operations * parameters * 2 * 2000 / 1e6)


def test_measuring_is_part_of_disk_and_time(place, monkeypatch):
    model = meta_model(str(place / "m"))
    plan = load_recipe(str(recipe(place, {"a": [{"export_gguf": {"check_tokens": 64}}]})))
    alone, whole = estimate(plan, model, measured=False), estimate(plan, model)
    assert alone.measure_seconds == 0 < whole.measure_seconds
    logits = 4 * DATA["evaluation_windows"] * DATA["window"] * 400  # tokens by vocabulary
    assert whole.disk_bytes - alone.disk_bytes == logits
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 4 * DATA["window"] * 400)
    assert estimate(plan, model).disk_bytes - alone.disk_bytes == 2 * 4 * DATA["window"] * 400
    long = plan.model_copy(update={"measure": plan.measure.model_copy(update={"timing_seconds": 1e9})})
    short = plan.model_copy(update={"measure": plan.measure.model_copy(update={"timing_seconds": 0.01})})
    assert estimate(short, model).measure_seconds < estimate(long, model).measure_seconds
