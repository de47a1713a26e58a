"""Encoders that label texts: ours and what others make of the same model, on the same texts, in one run.

    python benchmarks/labelled_encoders.py RUN [--batch 8] [--tokens 128]

RUN is a finished run of a recipe whose base is fine-tuned on labelled texts and exported to ONNX (such as
labelled_encoders.yaml beside this); its exported variants are ours. The base's float model is handed to the
others as they want it: torch's tracer and ONNX Runtime's optimizer for transformers, then `quantize_dynamic`
and `quantize_static`; torch's dynamic quantization of its linear layers; OpenVINO with NNCF where they are
installed. What calibrates among them is given some of the evaluation texts, which can only help it. Each
reads every evaluation text alone for its decisions, and batches of equal length for its speed: a process of
its own per tool and round, in turns; of a round the median counts. A line per point goes to
results/labelled-encoders.jsonl. Nothing else should run on the machine.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from transformers import AutoConfig, AutoTokenizer

from compress import (
    Examples,
    RunRecord,
    encode,
    load_labelled,
    load_recipe,
    machine,
    open_runtime,
    peak_rss_bytes,
    versions,
)

RESULTS = Path(__file__).parent / "results" / "labelled-encoders.jsonl"
WARM_UP, CALLS = 5, 30
CALIBRATION = 100  # texts that static quantization sees

Answer = Callable[[Any, Any], Any]  # ids and mask (batch, length) -> logits


def main(
    run: Path,
    batch: int = 8,
    tokens: int = 128,
    rounds: int = 5,
    threads: int = 2,
    output: Path = RESULTS,
    point: Annotated[str | None, typer.Option(hidden=True)] = None,
    what: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Make the others' files, score and time; with --point, be the process that does one thing."""
    work = run / "peers"
    if point is not None:
        print(json.dumps(one(run, work, point, what, batch, tokens, threads)))
        return
    work.mkdir(exist_ok=True)
    examples(run).save(work / "evaluation.npz")
    points = {**ours(run), **make_peers(run, work)}
    found = {name: ask(run, name, "score", batch, tokens, threads) for name in points}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in points}
    for number in range(rounds):
        for name in list(points)[:: 1 if number % 2 else -1]:
            told = ask(run, name, "time", batch, tokens, threads)
            seconds[name].append((told["b1"], told["b8"]))
            found[name]["peak_rss_bytes"] = told["peak_rss_bytes"]
    base = found["ours base"]
    record = RunRecord.read(run / "run.json")
    for name, facts in found.items():
        right, before = (np.array(each["right"], dtype=float) for each in (facts, base))
        same = np.array(facts["decisions"]) == np.array(base["decisions"])
        one_, many = (median(each) for each in zip(*seconds[name], strict=True))
        float_many = median(b for _, b in seconds["ours base"])
        line = {
            "tool": name, "setting": points[name][1], "model": record.recipe_name, "data": record.data.source,
            "seed": load_recipe(str(run / "recipe.yaml")).seed, "file_bytes": points[name][0],
            "accuracy": float(right.mean()), "macro_f1": facts["macro_f1"],
            "delta": float(right.mean() - before.mean()),
            "ci95": interval(right - before),
            "flips": float(1 - same.mean()), "texts_per_second_b1": 1 / one_,
            "texts_per_second_b8": batch / many, "ratio_b8": float_many / many,
            "peak_rss_bytes": facts["peak_rss_bytes"], "batch": batch, "tokens": tokens, "threads": threads,
        }  # fmt: skip
        print(
            f"{name:24s} {line['file_bytes'] / 1e6:6.1f} MB  accuracy {line['accuracy']:.4f} "
            f"({line['delta']:+.4f}, {line['ci95']})  flips {line['flips']:.4f}  "
            f"{line['texts_per_second_b1']:.0f} texts/s alone, {line['texts_per_second_b8']:.0f} by {batch} "
            f"({line['ratio_b8']:.2f} x)"
        )
        with output.open("a") as file:
            file.write(json.dumps(line | {"machine": machine(), "versions": versions()}) + "\n")


def interval(differences: Any) -> tuple[float, float]:
    """95 % of the mean of paired differences, by resampling the texts."""
    rng = np.random.default_rng(0)
    draws = [float(rng.choice(differences, len(differences)).mean()) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def examples(run: Path) -> Examples:
    """The run's evaluation texts, as its base reads them."""
    recipe, base = load_recipe(str(run / "recipe.yaml")), run / "base"
    assert recipe.data.labelled is not None, "the recipe has no labels"
    rows, config = load_labelled(recipe.data.labelled, recipe.seed), AutoConfig.from_pretrained(base)
    names = [config.id2label[number] for number in sorted(config.id2label)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return encode(rows.evaluation, rows.kind, names, tokenizer, config.max_position_embeddings)


def ours(run: Path) -> dict[str, tuple[int, str]]:
    """Exported variants: bytes and passes of each."""
    record = RunRecord.read(run / "run.json")
    return {
        f"ours {variant.name}": (
            sum(file.stat().st_size for file in (run / variant.artifact / "onnx").iterdir()),
            " + ".join(s.name for s in variant.steps),
        )
        for variant in record.variants
        if "onnx" in variant.exports
    }


def make_peers(run: Path, work: Path) -> dict[str, tuple[int, str]]:
    """What others make of the base: bytes and settings of each."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = Examples.load(work / "evaluation.npz").kind
    loader = AutoModelForTokenClassification if kind == "tags" else AutoModelForSequenceClassification
    model = loader.from_pretrained(run / "base", dtype=torch.float32, attn_implementation="eager").eval()
    names = ["input_ids", "attention_mask"]
    plain, fused = work / "plain.onnx", work / "fused.onnx"
    given = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in names)
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    torch.onnx.export(
        model, given, plain, input_names=names, output_names=["logits"], dynamic_axes=axes, dynamo=False,
        opset_version=17,
    )  # fmt: skip
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    optimizer.optimize_model(str(plain), "bert", num_heads=heads, hidden_size=hidden).save_model_to_file(
        str(fused)
    )
    dynamic = work / "dynamic.onnx"
    plainly = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of what its shape inference does not know
    quantize_dynamic(fused, dynamic, weight_type=QuantType.QInt8, per_channel=True, extra_options=plainly)
    static = work / "static.onnx"
    quantize_statically(plain, static, work)
    found = {
        "onnxruntime float": (fused.stat().st_size, "traced, optimized for transformers"),
        "onnxruntime dynamic": (dynamic.stat().st_size, "quantize_dynamic, int8 per channel"),
        "onnxruntime static": (static.stat().st_size, "quantize_static, QDQ, int8 per channel, entropy"),
        "torch dynamic": (0, "torch.ao.quantization.quantize_dynamic of linear layers"),
    }
    if find_spec("openvino") and find_spec("nncf"):
        found["openvino nncf"] = (with_nncf(plain, work), "nncf.quantize, model_type transformer")
    return found


def quantize_statically(source: Path, target: Path, work: Path) -> None:
    """ONNX Runtime's own way, calibrated on training texts of equal length."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    items = Examples.load(work / "evaluation.npz").items[
        :: max(1, len(Examples.load(work / "evaluation.npz")) // CALIBRATION)
    ]

    class Texts(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(items)

        def get_next(self) -> dict[str, Any] | None:
            item = next(self.left, None)
            if item is None:
                return None
            ids = item.ids[None].astype(np.int64)
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    prepared = work / "prepared.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, target, Texts(), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
    )  # fmt: skip


def with_nncf(source: Path, work: Path) -> int:
    """OpenVINO's own way; bytes of what it writes."""
    import nncf
    import openvino

    items = Examples.load(work / "evaluation.npz").items
    given = nncf.Dataset(
        items[:: max(1, len(items) // CALIBRATION)],
        lambda item: {n: item.ids[None].astype(np.int64) * (1 if n == "input_ids" else 0) + (n != "input_ids")
                      for n in ("input_ids", "attention_mask")},
    )  # fmt: skip
    model = nncf.quantize(openvino.Core().read_model(source), given, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, work / "nncf.xml", compress_to_fp16=False)
    return sum((work / f"nncf.{suffix}").stat().st_size for suffix in ("xml", "bin"))


def ask(run: Path, point: str, what: str, batch: int, tokens: int, threads: int) -> dict[str, Any]:
    """What a process of its own tells of a point."""
    command = [sys.executable, __file__, run, "--point", point, "--what", what, "--batch", batch]
    command += ["--tokens", tokens, "--threads", threads]
    told = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def one(
    run: Path, work: Path, point: str, what: str, batch: int, tokens: int, threads: int
) -> dict[str, Any]:
    """Decisions on all texts, or seconds per call."""
    answer = opened(run, work, point, threads)
    found = Examples.load(work / "evaluation.npz")
    if what == "score":
        return scored(answer, found, run)
    rng = np.random.default_rng(0)
    text = rng.choice(np.concatenate([item.ids[1:-1] for item in found.items]), (batch, tokens)).astype(
        np.int64
    )
    seconds = {}
    for name, ids in (("b1", text[:1]), ("b8", text)):
        mask, taken = np.ones_like(ids), []
        for call in range(WARM_UP + CALLS):
            began = time.perf_counter()
            answer(ids, mask)
            if call >= WARM_UP:
                taken.append(time.perf_counter() - began)
        seconds[name] = median(taken)
    return seconds | {"peak_rss_bytes": peak_rss_bytes()}


def scored(answer: Answer, found: Examples, run: Path) -> dict[str, Any]:
    """The decisions of every text alone, by the task's own rule."""
    from sklearn.metrics import f1_score

    task = open_runtime(run / "base" / "onnx", "onnxruntime", 1).task
    decisions: list[float] = []
    targets: list[float] = []
    right: list[bool] = []
    for item in found.items:
        ids = item.ids[None].astype(np.int64)
        logits = np.asarray(answer(ids, np.ones_like(ids)), dtype=np.float32)
        question = task.asked(item)
        rows = (logits[:, None] if task.pooled else logits)[0]
        decided = task.scoring.decided(rows[question.rows], question.targets)
        assert decided is not None
        decisions += decided.decisions
        targets += decided.targets
        right += [d == t for d, t in zip(decided.decisions, decided.targets, strict=True)]
    macro = float(f1_score(targets, decisions, average="macro", zero_division=0))
    return {"decisions": decisions, "right": right, "macro_f1": macro}


def opened(run: Path, work: Path, point: str, threads: int) -> Answer:
    """A point, ready to answer."""
    tool, _, name = point.partition(" ")
    if tool == "ours":
        graph = open_runtime(run / name / "onnx", "onnxruntime", threads)
        pooled = graph.task.pooled
        return lambda ids, mask: graph.logits(ids)[:, 0] if pooled else graph.logits(ids)
    if tool == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = {"float": "fused", "dynamic": "dynamic", "static": "static"}[name]
        session = onnxruntime.InferenceSession(work / f"{file}.onnx", options, ["CPUExecutionProvider"])
        return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    if tool == "openvino":
        import openvino

        model = openvino.Core().compile_model(work / "nncf.xml", "CPU", {"INFERENCE_NUM_THREADS": threads})
        return lambda ids, mask: model({"input_ids": ids, "attention_mask": mask})[0]
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    torch.set_num_threads(threads)
    kind = Examples.load(work / "evaluation.npz").kind
    loader = AutoModelForTokenClassification if kind == "tags" else AutoModelForSequenceClassification
    float_model = loader.from_pretrained(run / "base", dtype=torch.float32).eval()
    coded = torch.ao.quantization.quantize_dynamic(float_model, {torch.nn.Linear}, dtype=torch.qint8)

    @torch.inference_mode()
    def answer(ids: Any, mask: Any) -> Any:
        return coded(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()

    return answer


if __name__ == "__main__":
    typer.run(main)
