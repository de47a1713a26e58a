"""Made-up records with the shape of a real run, for the tests of the report."""

import hashlib
import math
import random
from typing import Any

from compress.records.records import (
    DataRecord,
    PassRecord,
    Reference,
    Result,
    RunRecord,
    Sample,
    StepResult,
    VariantRecord,
)

MACHINE = {
    "cpu": "AMD EPYC 9R45",
    "cores": 2,
    "instructions": ["avx2", "avx512_vnni", "amx"],
    "memory_bytes": 25_769_803_776,
}
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "onnxruntime": "1.31.0", "compress": "0.1.0"}
PROTOCOL = {
    "batch": 1,
    "threads": 2,
    "prompt_tokens": 256,
    "decode_tokens": 64,
    "warmup": 3,
    "repetitions": 40,
    "window": 256,
    "windows": 64,
    "bootstrap_samples": 2000,
}
RECIPE = """\
name: demo
base: {preset: 3m, passes: [train: {minutes: 5}]}
variants:
  int8: {from: base, passes: [quantize_rtn: {format: {kind: int8}}, export_onnx: {}]}
"""
PROMPT = "def read_json(path):\n    "

# variant, parent, passes, parameters (M), disk (MB), Δ NLL, KL, torch decode, ONNX decode
SHAPES: list[tuple[str, str | None, list[str], float, float, float, float, float, float | None]] = [
    ("base", None, ["train", "export_onnx"], 3.41, 13.7, 0.0, 0.0, 310.0, 905.0),
    ("pruned", "base", ["prune_magnitude"], 3.41, 13.7, 0.412, 0.335, 309.0, None),
    ("healed", "pruned", ["distill"], 3.41, 13.7, 0.081, 0.072, 312.0, None),
    ("student", "base", ["prune_layers", "distill"], 2.08, 8.4, 0.142, 0.131, 590.0, None),
    ("int8", "base", ["quantize_rtn", "export_onnx"], 3.41, 3.78, 0.0004, 0.0009, 268.0, 1502.0),
    ("int4", "base", ["quantize_gptq", "export_onnx"], 3.41, 2.31, 0.0291, 0.0313, 240.0, 1894.0),
    ("student-int4", "student", ["quantize_gptq", "export_onnx"], 2.08, 1.43, 0.171, 0.166, 430.0, 2710.0),
]


def fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _curve(rng: random.Random, start: float, end: float, tokens: float) -> list[list[float | None]]:
    points: list[list[float | None]] = []
    for i in range(60):
        loss = end + (start - end) * math.exp(-i / 11) + rng.gauss(0, 0.03)
        held = end + 0.04 + (start - end) * math.exp(-i / 11) if i % 6 == 5 else None
        points.append([i * 50.0, tokens * (i + 1) / 60, loss, held])
    return points


def _pass(rng: random.Random, variant: str, name: str, parent: str | None) -> PassRecord:
    notes: dict[str, Any] = {
        "train": {"tokens_per_second": 13211.0, "loss_curve": _curve(rng, 8.3, 3.1, 4.1e6)},
        "distill": {"loss_curve": _curve(rng, 0.9, 0.12, 1.2e6), "temperature": 1.0},
        "prune_magnitude": {"sparsity": 0.5},
        "prune_layers": {"kept": [0, 2, 4, 5]},
        "quantize_gptq": {"failed_cholesky": []},
        "export_onnx": {"onnx_check": {"largest_difference": 2.1e-5, "tolerance": 1e-3}},
    }.get(name, {})
    config: dict[str, Any] = {
        "train": {"learning_rate": 0.003, "batch": 16, "minutes": 4.0},
        "distill": {"learning_rate": 0.001, "objective": "kl"},
        "quantize_gptq": {"format": {"kind": "int4", "group": 64, "symmetric": False}, "damping": 0.01},
        "quantize_rtn": {"format": {"kind": "int8", "group": None}},
        "prune_magnitude": {"sparsity": 0.5, "layers": "linear"},
        "prune_layers": {"keep": 4},
    }.get(name, {})
    seconds = {"train": 241.0, "distill": 68.0, "quantize_gptq": 12.4}.get(name, 0.84)
    return PassRecord(
        name=name,
        config=config,
        seconds=seconds,
        peak_rss_bytes=int(9.1e8 + rng.random() * 1e8),
        parent=parent,
        fingerprint=fingerprint(variant, name, parent),
        seed=0,
        notes=notes,
    )


def _around(value: float, width: float, rng: random.Random) -> tuple[float, float]:
    return (value - width * (0.9 + 0.2 * rng.random()), value + width * (0.9 + 0.2 * rng.random()))


def demo_run(name: str = "demo", seed: int = 0) -> tuple[RunRecord, list[Result], str]:
    """A run like the shipped recipe's: (run, results, recipe)."""
    rng = random.Random(seed)
    variants: dict[str, VariantRecord] = {}
    results: list[Result] = []
    step_results: list[StepResult] = []
    samples: list[Sample] = []
    base_nll = 3.012
    for variant, parent, passes, parameters, disk, delta, kl, torch_rate, onnx_rate in SHAPES:
        above = variants[parent].steps if parent else []
        inherited = [step for step in above if not step.name.startswith("export")]
        steps = list(inherited)
        for pass_name in passes:
            steps.append(_pass(rng, variant, pass_name, steps[-1].fingerprint if steps else None))
        variants[variant] = VariantRecord(
            name=variant,
            parent=parent,
            artifact=variant,
            onnx_artifact=f"{variant}/onnx" if onnx_rate else None,
            fingerprint=steps[-1].fingerprint,
            steps=steps,
        )
        width = 0.0009 + delta * 0.09
        delta_ci = (0.0, 0.0) if variant == "base" else _around(delta, width, rng)
        kl_ci = (0.0, 0.0) if variant == "base" else _around(kl, kl * 0.08, rng)
        own = [
            i for i, step in enumerate(steps) if step not in inherited and not step.name.startswith("export")
        ]
        for rank, i in enumerate(own):
            last = rank == len(own) - 1
            more = 0.0 if last else 0.9
            step_results.append(
                StepResult(
                    variant=variant,
                    step_index=i,
                    pass_name=steps[i].name,
                    nll=base_nll + delta + more,
                    delta_nll=delta + more,
                    kl_to_base=kl + more,
                    delta_nll_ci95=delta_ci if last else _around(delta + more, 0.04, rng),
                    kl_ci95=kl_ci if last else _around(kl + more, 0.04, rng),
                    weight_bytes=int(disk * 9.6e5),
                    file_bytes=int(disk * 1e6),
                )
            )
        sparse = variant in ("pruned", "healed")
        for runtime, rate in (("torch", torch_rate), ("onnxruntime", onnx_rate)):
            if rate is None:
                continue
            rate *= 1 + 0.02 * rng.random()
            results.append(
                Result(
                    variant=variant,
                    runtime=runtime,
                    device="cpu",
                    artifact=f"runs/{name}/{variant}",
                    disk_bytes=int(disk * 1e6 * (1.004 if runtime != "torch" else 1)),
                    weight_bytes=int(disk * 9.6e5),
                    parameters=int(parameters * 1e6),
                    nonzero_parameters=int(parameters * (0.55e6 if sparse else 1e6)),
                    peak_rss_bytes=int((610 if runtime == "torch" else 92) * 1e6 + disk * 2.2e6),
                    perplexity=math.exp(base_nll + delta),
                    bits_per_byte=(base_nll + delta) / math.log(2) / 3.1,
                    nll=base_nll + delta,
                    nll_ci95=_around(base_nll + delta, 0.06, rng),
                    delta_nll=delta,
                    delta_nll_ci95=delta_ci,
                    kl_to_base=kl,
                    kl_ci95=kl_ci,
                    top1_agreement=1.0 if variant == "base" else 0.997 - kl * 0.9,
                    prefill_tokens_per_second=rate * (9 if runtime == "torch" else 6),
                    decode_tokens_per_second=rate,
                    prefill_seconds_p50=256 / rate / 6,
                    prefill_seconds_p95=256 / rate / 5.4,
                    decode_seconds_p50=1 / rate,
                    decode_seconds_p95=1.12 / rate,
                    decode_seconds_p99=1.3 / rate,
                    load_seconds=0.31 if runtime == "torch" else 0.06,
                    protocol=PROTOCOL,
                    machine=MACHINE,
                    versions=VERSIONS,
                    fingerprint=steps[-1].fingerprint,
                )
            )
            samples.append(
                Sample(
                    variant=variant,
                    runtime=runtime,
                    prompt=PROMPT,
                    text=PROMPT
                    + 'with open(path, "rb") as file:\n        return json.loads(file.read())\n\n\n'
                    "def write_json(path, value):\n    if value is None:\n        raise ValueError(value)\n"
                    * 2,
                )
            )
    run = RunRecord(
        recipe_name=name,
        base="base",
        variants=list(variants.values()),
        data=DataRecord(
            source="Python standard library 3.11.9 (test folders left out)",
            window=256,
            train_tokens=2_764_111,
            train_sha256=fingerprint("train") * 4,
            calibration_tokens=32_768,
            calibration_sha256=fingerprint("cal") * 4,
            evaluation_tokens=16_384,
            evaluation_sha256=fingerprint("eval") * 4,
            evaluation_bytes=50_790,
        ),
        machine=MACHINE,
        versions=VERSIONS,
        references=[
            Reference(name="unigram", nll=6.41, perplexity=math.exp(6.41), bits_per_byte=2.98),
            Reference(name="Kneser-Ney trigram", nll=3.96, perplexity=math.exp(3.96), bits_per_byte=1.84),
        ],
        samples=samples,
        step_results=step_results,
    )
    return run, results, RECIPE


def bare(results: list[Result]) -> list[Result]:
    """The same lines with nothing measured but their names."""
    return [
        Result(variant=r.variant, runtime=r.runtime, device=r.device, artifact=r.artifact) for r in results
    ]
