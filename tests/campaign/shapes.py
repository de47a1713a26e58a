"""Shapes of published models: whatever is made of each answers as stock `transformers` does, or is refused.

Method. A small random model of each shape (`shape_models.py`; vocabulary and inner width drawn from the seed)
is saved by stock `transformers`, its config.json in the words of the published one. Three chains are tried,
each in a dry run first: the base in ONNX; codes of 8 bits, in ONNX; codes of 4 bits by GPTQ in groups of 32,
in ONNX. One that is refused is tried again without the graph. Then all that passed are run, and of what lies
on disk is compared with stock:

    torch     logits; in chunks and token by token; with codes: stock with the weights that the codes stand
              for, and those weights with the original ones
    reload    stock `from_pretrained` of what `save` wrote
    ONNX      the same, its products in float32; a batch padded left, right, on both sides: each text alone
    generate  greedily the text that stock `generate` writes

    python -m tests.campaign.shapes NAME... [--seed S]

does single shapes. `right`: all of it; `refused`: the dry run named a reason for some of it, and the rest is
right. Cost: 2 s for a decoder, 5 to 20 s where torch traces a graph.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress import api
from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.formats import QuantizedEmbedding, QuantizedLinear
from compress.models.checkpoints import quiet_transformers
from compress.run.preflight import preflight
from compress.run.recipe import Recipe
from compress.runtimes.torch_runtime import TorchRuntime
from compress.tasks.registry import task_of

from . import shape_checks as checks
from .core import Outcome, Settings
from .shape_models import SHAPES, Shape

CHECKED = {"check_tokens": 64}
EXPORT = {"export_onnx": {"int8_form": "blocks", "accuracy_level": 0, **CHECKED}}  # no rounding of its own
CHAINS: dict[str, list[Any]] = {
    "base": [],
    "int8": [{"quantize_round": {"format": "int8"}}],
    "int4": [{"quantize_gptq": {"format": {"kind": "int4", "group": 32}}}],
}
HANG = 600  # seconds; it takes a tenth of that on a busy machine
TEXT = 30  # tokens of a window, and of what is compared
# of the weights' norm: what rounding to a grid takes, that of GPTQ on groups of 32 included
ROUNDED = {"int8": 0.02, "int4": 0.6}
_WORDS = "a the of to and in is for with model weight layer token text byte error field file large".split()


def run(settings: Settings) -> Iterator[Outcome]:
    """As many shapes as are asked for, none twice before all were there."""
    names, source = list(SHAPES), random.Random(settings.seed)
    drawn: list[tuple[str, int]] = []
    while len(drawn) < settings.count:
        source.shuffle(names)
        drawn += [(name, settings.seed + len(drawn) // len(names)) for name in names]
    with ThreadPoolExecutor(settings.jobs) as jobs:
        yield from jobs.map(lambda case: apart(*case, settings.work), drawn[: settings.count])


def apart(name: str, seed: int, work: Path) -> Outcome:
    """One shape in a process of its own, which has what was imported here: what it takes of memory is given
    back, and if it dies the others go on."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        process = context.Process(
            target=lambda: writing.send(outcome(name, seed, Path(folder))), name=name, daemon=True
        )
        process.start()
        writing.close()
        try:
            return reading.recv() if reading.poll(HANG) else Outcome(SHAPES[name].kind, "hang", name)
        except EOFError:
            process.join()
            return Outcome(SHAPES[name].kind, "died", f"{name}: exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()


def outcome(name: str, seed: int, folder: Path) -> Outcome:
    """One shape, in an empty folder."""
    shape = SHAPES[name]
    again = f"python -m tests.campaign.shapes {name} --seed {seed}"
    case = _Case(name, shape, seed, folder)
    try:
        verdict, detail = case.verdict()
    except Exception:
        verdict, detail = "traceback", f"{name}: {traceback.format_exc(limit=-8)}"
    finally:
        gc.collect()
    return Outcome(shape.kind, verdict, detail, again)


@dataclass(frozen=True)
class _Case:
    """A shape in a folder."""

    name: str
    shape: Shape
    seed: int
    folder: Path

    def verdict(self) -> tuple[str, str]:
        """How it ended, and lines that say more."""
        save(self.shape, self.seed, self.folder / "model")
        stock = checks.stock(self.folder / "model")
        chains, refusals = self._tried()
        if not chains:
            return "refused", f"{self.name}: {refusals[0]}"
        try:
            api.make_artifacts(self._recipe(chains), self.folder / "run", lambda line: None)
        except UserError as error:
            return "refused late", f"{self.name}: {error}"
        differences = []
        for variant, passes in chains.items():
            place = self.folder / "run" / variant
            differences += [
                f"{variant}: {found}" for found in self._differences(stock, variant, place, passes)
            ]
        if differences:
            return "wrong", f"{self.name}: " + "; ".join(differences)
        return ("refused", f"{self.name}: {'; '.join(refusals)}") if refusals else ("right", self.name)

    def _tried(self) -> tuple[dict[str, list[Any]], list[str]]:
        """The chains that the dry run lets through, with the graph or without, and what it said of others."""
        chains: dict[str, list[Any]] = {}
        refusals: list[str] = []
        for variant, passes in CHAINS.items():
            for tried in ([*passes, EXPORT], passes):
                try:
                    preflight(self._recipe({variant: tried}), self.folder / "run", measured=True)
                except UserError as error:
                    line = str(error)
                    if "\n" in line:
                        raise AssertionError(f"a refusal of several lines: {line}") from error
                    refusals.append(line)
                else:
                    chains[variant] = tried
                    break
        return chains, list(dict.fromkeys(refusals))

    def _recipe(self, chains: dict[str, list[Any]]) -> Recipe:
        return Recipe.parse(
            {
                "name": "shape",
                "threads": 1,
                "model": {"checkpoint": str(self.folder / "model")},
                "data": {
                    "text": str(corpus(self.folder)), "window": TEXT, "evaluation_windows": 2,
                    "calibration_windows": 8, "heldout_windows": 4,
                },
                "base": chains.get("base", []),
                "variants": {name: chain for name, chain in chains.items() if name != "base"},
            }
        )  # fmt: skip

    def _differences(self, stock: Any, variant: str, place: Path, passes: list[Any]) -> Iterator[str]:
        """What is wrong with an artifact on disk and its graph."""
        reference = stock
        if variant == "base":
            reloaded = checks.answers(checks.stock(place), self.ids)
            yield from checks.same("stock reload", reloaded, checks.answers(stock, self.ids))
        else:
            reference, apart = with_codes(self.folder / "model", place)
            if not apart <= ROUNDED[variant]:
                yield f"codes are {apart:.3g} from the weights"
        task = task_of(stock.config)
        yield from checks.runtime("torch", TorchRuntime(place, 1, prefill_chunk=7), reference, self.ids)
        if task.writes:
            yield from checks.generated("torch generate", place, reference, self.prompt)
        if EXPORT not in passes:
            return
        graph = place / "onnx"
        yield from checks.runtime("onnx", checks.opened(graph, task), reference, self.ids)
        yield from checks.padded(graph, reference, self.ids)
        if task.writes:
            yield from checks.generated("onnx generate", graph, reference, self.prompt)

    @property
    def ids(self) -> Any:
        """Tokens from all over the vocabulary that are not special, (2, TEXT)."""
        rows = int(json.loads((self.folder / "model" / "config.json").read_text())["vocab_size"])
        return np.random.default_rng(self.seed).integers(5, rows, (2, TEXT)).astype(np.int32)

    @property
    def prompt(self) -> str:
        """Some words."""
        return " ".join(random.Random(self.seed).choices(_WORDS, k=8))


def save(shape: Shape, seed: int, folder: Path) -> None:
    """A checkpoint as others publish it, with weights far enough from nothing for a mix-up to be seen."""
    source = random.Random(f"{seed} {shape.model_type}")
    raw = _drawn(shape, source)
    config = CONFIG_MAPPING[shape.model_type].from_dict({**raw, "architectures": [shape.architecture]})
    torch.manual_seed(seed)
    model = getattr(transformers, shape.architecture)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # sines
                continue
            if parameter.ndim > 1 and not name.endswith(("A_log", "time_decay", "time_first")):
                parameter.copy_(torch.randn_like(parameter) * 1.3 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with quiet_transformers():
        model.to(getattr(torch, shape.dtype)).save_pretrained(
            folder, max_shard_size="60KB" if shape.sharded else "1GB"
        )
    published = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "torch_dtype": shape.dtype,
    }
    (folder / "config.json").write_text(json.dumps({**raw, **published}, indent=2))
    _tokenizer(shape.tokens).save_pretrained(folder)


def _drawn(shape: Shape, source: random.Random) -> dict[str, Any]:
    """The configuration with a vocabulary and an inner width that nothing divides, and the special tokens."""
    known = CONFIG_MAPPING[shape.model_type]().to_dict()
    # torch multiplies by all experts at once where rows are whole 16 bytes
    experts = any("expert" in field for field in shape.raw)
    inner = source.choice((72, 88, 104, 120) if experts else (77, 93, 101, 119))
    widths = ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
    ends = {f"{name}_token_id": shape.tokens.index(token) for name, token in (
        ("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))}  # fmt: skip
    return {
        "vocab_size": source.randrange(301, 499, 2),
        **{name: inner for name in widths if name in known},
        **ends,
        **shape.raw,
    }


@cache
def _pieces(tokens: tuple[str, ...]) -> ByteLevelBPETokenizer:
    pieces = ByteLevelBPETokenizer()
    text = [" ".join(random.Random(i).choices(_WORDS, k=50)) for i in range(20)]
    pieces.train_from_iterator(text, vocab_size=300, special_tokens=list(tokens), show_progress=False)
    return pieces


def _tokenizer(tokens: tuple[str, ...]) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_pieces(tokens)._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


def corpus(folder: Path) -> Path:
    """Documents to calibrate on, written once."""
    place, source = folder / "text", random.Random(0)
    if not place.is_dir():
        place.mkdir()
        for number in range(70):
            words = source.choices([*_WORDS, *map(str, range(100))], k=150)
            (place / f"{number:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return place


def with_codes(source: Path, artifact: Path) -> tuple[Any, float]:
    """The stock model of `source` with the weights that the codes of `artifact` stand for; the largest
    distance of one of them from the original, of its norm."""
    model, held = checks.stock(source), Bundle.load(artifact, masks=False).model
    apart = 0.0
    for name, module in held.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            place = model.get_submodule(name)
            values = module.quantized.dequantize()
            if type(place).__name__ == "Conv1D":
                values = values.T
            with torch.no_grad():
                largest = float((place.weight - values).norm() / place.weight.norm())
                place.weight.copy_(values)
            if largest > 1e-6:  # one that is tied was done before
                apart = max(apart, largest)
    return model, apart


def main(arguments: Sequence[str]) -> int:
    """Single shapes, one line each."""
    seed = int(arguments[arguments.index("--seed") + 1]) if "--seed" in arguments else 0
    bad = False
    for name in [a for a in arguments if a in SHAPES] or SHAPES:
        with tempfile.TemporaryDirectory() as folder, suppress(BrokenPipeError):
            found = outcome(name, seed, Path(folder))
            bad |= found.bad
            print(f"{found.verdict}: {found.detail}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
