"""The records of a real tiny run, for the tests of what is made of records: the page, and tables.

The run is made once, through the public API. Qualities, sizes, chains and notes are as it left them; speeds
in so small a model are the machine's mood, so a test that speaks of speed sets those, and nothing else.
"""

from pathlib import Path
from typing import NamedTuple

from cli_helpers import DATA, SHAPE, write_text

from compress import api
from compress.records.results import Result
from compress.records.run import RunRecord, VariantRecord
from compress.run.recipe import Recipe

INT4 = {"quantize_gptq": {"format": {"kind": "int4", "group": 32}}}
# tokens/s of decoding; prefills five times that. So int4 in ONNX Runtime decodes twice as fast as the base
RATES = {
    ("base", "torch"): 300.0,
    ("base", "onnxruntime"): 900.0,
    ("healed", "torch"): 301.0,
    ("int4", "torch"): 240.0,
    ("int4", "onnxruntime"): 1890.0,
}


class Records(NamedTuple):
    """What the report is made of."""

    run: RunRecord
    results: list[Result]
    recipe: str

    def variant(self, name: str) -> VariantRecord:
        return next(variant for variant in self.run.variants if variant.name == name)

    def result(self, name: str, runtime: str = "torch") -> Result:
        return next(r for r in self.results if (r.variant, r.runtime) == (name, runtime))

    def named(self, name: str) -> "Records":
        """The same run of a recipe with another name."""
        return self._replace(run=self.run.model_copy(update={"recipe_name": name}))

    def many(self, copies: int) -> "Records":
        """As many further variants, each with a name, samples and steps of its own."""
        run, results = self.run, self.results
        variants, samples, lines, inner = [], [], [], []
        for number in range(copies):
            names = {v.name: f"{v.name}-{number}" for v in run.variants if v.name != "base"}
            for v in run.variants:
                if v.name in names:
                    steps = [
                        s.model_copy(update={"fingerprint": f"{s.fingerprint}{number}"}) for s in v.steps
                    ]
                    parent = names.get(v.parent or "", v.parent)
                    variants.append(
                        v.model_copy(update={"name": names[v.name], "parent": parent, "steps": steps})
                    )
            for old, new in ((run.samples, samples), (results, lines), (run.step_results, inner)):
                new += [r.model_copy(update={"variant": names[r.variant]}) for r in old if r.variant in names]
        more = {
            "variants": [*run.variants, *variants],
            "samples": [*run.samples, *samples],
            "step_results": [*run.step_results, *inner],
        }
        return self._replace(run=run.model_copy(update=more), results=[*results, *lines])


def make(folder: Path) -> None:
    """Run the recipe: a base, a variant pruned and healed, and a third that goes on from the second."""
    text = write_text(folder / "text", documents=40, words=300)
    api.run(
        Recipe.parse({
            "name": "tiny",
            "threads": 1,
            "model": {"create": SHAPE},
            "data": {"text": str(text), **DATA},
            "base": [{"train": {"tokens": 8000, "batch": 16}}, "export_onnx"],
            "variants": {
                "healed": [
                    {"prune_magnitude": {"sparsity": 0.5}},
                    {"distill": {"tokens": 4000, "temperature": 2.0}},
                ],
                "int4": {"from": "healed", "passes": [INT4, "export_onnx", "export_gguf"]},
            },
            "measure": {"prefill_tokens": 16, "rounds": 1},
            "report": {
                "prompt": "The model",
                "sample_tokens": 4,
                "references": ["unigram", "trigram", "lstm"],
            },
        }),
        folder / "run",
        lambda line: None,
    )  # fmt: skip


def load(folder: Path) -> Records:
    """What `make` left, with `RATES` for speeds; without llama.cpp's line, which is not there everywhere."""
    run, results, recipe = api.load_run(folder / "run")
    known = [(r, RATES.get((r.variant, r.runtime))) for r in results]
    return Records(run, [timed(r, rate) for r, rate in known if rate is not None], recipe)


ROUNDS = (1.0, 1.02, 0.98, 1.01, 0.99)


def timed(result: Result, decode: float) -> Result:
    """A measured line with other speeds: the slowest in twenty take 12 % longer than the median."""
    return result.model_copy(
        update={
            "decode_tokens_per_second": decode,
            "decode_seconds_p50": 1 / decode,
            "decode_seconds_p95": 1.12 / decode,
            "decode_seconds_p99": 1.3 / decode,
            "prefill_tokens_per_second": 5 * decode,
            "prefill_seconds_p50": 16 / (5 * decode),
            "prefill_seconds_p95": 1.12 * 16 / (5 * decode),
            "prefill_round_seconds": tuple(x * 16 / (5 * decode) for x in ROUNDS),
            "decode_round_seconds": tuple(x / decode for x in ROUNDS),
            "timing_session": "one",
            "busy_share": 0.0,
        }
    )


def bare(results: list[Result]) -> list[Result]:
    """The same lines with nothing measured but their names."""
    return [
        Result(variant=r.variant, runtime=r.runtime, device=r.device, artifact=r.artifact) for r in results
    ]
