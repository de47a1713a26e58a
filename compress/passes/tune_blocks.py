"""tune_blocks: codes and scales of one block at a time learn to give the original block's output.

For every block, with X~ its inputs through the blocks tuned before it and Y what the original model's block
gives on its own inputs, mean (block(X~) - Y)^2 is lowered by signed gradient descent on rounding offsets and
scales (solvers/block_tuning.py has equations and papers), from the codes that a quantizer left. A code moves
by one step at most; zero-points stay, and so do pruned weights. Of entropy-coded weights the codes stay,
too: they follow their trellis together, and the file is as long as they are likely; their scales, one per
row, are written out as they differ, which takes up to 16 / columns bits per weight more. The last
calibration windows are held out: a block keeps the point with the lowest error on them, its start included,
so that no block gets worse.

It matters most at 2 and 3 bits, where many codes can change. Cost: per block `steps` forward and backward
passes over `batch` windows; memory: one block in float, three times, and the activations of both streams.
Finished blocks are kept in the work folder, so that a killed run goes on with the block it was in.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.formats import QuantizedLinear
from compress.host.progress import track
from compress.host.tensor_files import opened
from compress.models.attention import panel_attention
from compress.models.blocks import Arguments, call, replaced_forward
from compress.models.layers import is_linear, linear_layers, matrix
from compress.models.stacks import decoder_blocks, only_stack
from compress.passes.base import Kind, Need, Pass
from compress.solvers.block_tuning import descend
from compress.training.codes.rounding import TunableRounding
from compress.training.codes.scales import digest_of_state


class TuneBlocks(Pass):
    """Tune codes and scales block by block against the original blocks' outputs."""

    kind: ClassVar[Kind] = "tune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration", "teacher"})
    only_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    steps: int = Field(60, ge=1, le=100_000, description="per block")
    batch: int = Field(1, ge=1, le=1024, description="windows per step")
    heldout_windows: int = Field(4, ge=1, description="of the calibration windows, to judge on")
    rate: float | None = Field(
        None, gt=0, le=0.5, description="of the first step, in steps of a code; null: 1 / steps"
    )
    scale_rate: float = Field(
        0.1, ge=0, le=1, description="a scale's relative rate, as a share of `rate`; 0: codes only"
    )
    checks: int = Field(3, ge=1, le=100, description="how often a block is judged on the way")

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks."""
        return linear_layers(model)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward on the windows of every step, as if a window had 1024 tokens."""
        return 6.0 * parameters * self.steps * self.batch * 1024

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Tune a copy; notes tell the mean relative fall of the held-out error and the codes that moved.

        Raises:
            UserError: the original has other blocks, or there are too few calibration windows.
        """
        windows = torch.from_numpy(context.data.calibration.tokens).long()
        if len(windows) < self.heldout_windows + self.batch:
            raise UserError(
                f"{self.name()}.heldout_windows: {self.heldout_windows} and a batch of {self.batch} need "
                f"more than the {len(windows)} calibration windows there are; raise data.calibration_windows"
            )
        teacher = context.teacher().model.eval()
        result = bundle.clone()
        _same_blocks(result.model, teacher, self.name())
        run = _Run(self, result, teacher, windows, context)
        with panel_attention(result.model), panel_attention(teacher):
            notes = run.all_blocks()
        result.model.cpu()
        return result.evolve(exports={}, notes=notes)


class _Run:
    """The walk over the blocks."""

    def __init__(self, settings: TuneBlocks, bundle: Bundle, teacher: Any, windows: Tensor, context: Context):
        self.settings, self.bundle, self.context = settings, bundle, context
        self.model, self.teacher = bundle.model.to(context.device), teacher.to(context.device)
        fitting = len(windows) - settings.heldout_windows
        self.batches = [*windows[:fitting].split(settings.batch), *windows[fitting:].split(settings.batch)]
        self.first_heldout = -(-fitting // settings.batch)
        facts = [settings.model_dump_json(), context.precision, digest_of_state(teacher)]
        facts += [digest_of_state(self.model), context.data.calibration.sha256, str(context.seed)]
        facts += [f"{name} {int(mask.sum())}" for name, mask in sorted(bundle.masks.items())]
        self.identity = hashlib.sha256("\0".join(facts).encode()).hexdigest()

    def all_blocks(self) -> dict[str, Any]:
        tuned, teaching = only_stack(self.model), only_stack(self.teacher)
        prefix, blocks, originals = tuned.prefix, tuned.blocks, teaching.blocks
        precision, total, moved, falls = self.context.precision, 0, 0, []
        with torch.no_grad():
            hidden, arguments = tuned.inputs(self.batches)
            wanted, original_arguments = teaching.inputs(self.batches)
        with track(len(blocks), self.settings.name(), "blocks") as bar:
            for index, block in enumerate(blocks):
                with torch.no_grad():
                    pairs = zip(wanted, original_arguments[index], strict=True)
                    wanted = [call(originals[index], x, given, precision) for x, given in pairs]
                held = _held(block)
                path = self.context.workdir / f"block-{index}.safetensors"
                before = {name: module.quantized.unpacked() for name, module in held.items()}
                if held and not _restore(path, held, self.identity):
                    tunable = self._tunable(held, originals[index], f"{prefix}.{index}")
                    fall = self._descend(block, tunable, hidden, arguments[index], wanted)
                    for name, module in held.items():
                        module.quantized = tunable[name].tuned()
                    _save(path, held, self.identity, fall)
                falls.append(_fall(path) if held else 0.0)
                total += sum(codes.numel() for codes in before.values())
                moved += sum(int((m.quantized.unpacked() != before[n]).sum()) for n, m in held.items())
                with torch.no_grad():
                    pairs = zip(hidden, arguments[index], strict=True)
                    hidden = [call(block, x, given, precision) for x, given in pairs]
                bar.advance(error_falls_by=sum(falls) / len(falls))
        return {
            "heldout_error_fall": sum(falls) / len(falls),
            "heldout_error_fall_per_block": [round(fall, 4) for fall in falls],
            "codes_moved": moved / max(total, 1),
            "gain": "held-out errors of the blocks fell" if any(falls) else "no gain",
        }

    def _tunable(
        self, held: dict[str, QuantizedLinear], original: nn.Module, where: str
    ) -> dict[str, TunableRounding]:
        masks = self.bundle.masks
        return {
            name: TunableRounding(module, _original(original, name), masks.get(f"{where}.{name}"))
            for name, module in held.items()
        }

    def _descend(
        self,
        block: nn.Module,
        tunable: dict[str, TunableRounding],
        hidden: list[Tensor],
        arguments: Arguments,
        wanted: list[Tensor],
    ) -> float:
        """Tune the layers of one block; the relative fall of the held-out error."""
        settings, precision = self.settings, self.context.precision
        order = torch.Generator().manual_seed(self.context.seed)
        picks = torch.randint(self.first_heldout, (settings.steps,), generator=order).tolist()

        def error(index: int) -> Tensor:
            return F.mse_loss(call(block, hidden[index], arguments[index], precision), wanted[index])

        @torch.no_grad()
        def judge() -> float:
            _ship(tunable, True)
            errors = [float(error(index)) for index in range(self.first_heldout, len(hidden))]
            _ship(tunable, False)
            return sum(errors) / len(errors)

        rate = settings.rate or 1 / settings.steps
        layers = list(tunable.values())
        with ExitStack() as stack:
            for name, layer in tunable.items():
                stack.enter_context(replaced_forward(block.get_submodule(name), layer.forward))
            outcome = descend(
                [p for layer in layers for p in (layer.offset, layer.shift)],
                [bound for layer in layers for bound in layer.bounds()],
                [rate, rate * settings.scale_rate] * len(layers),
                loss=lambda step: error(picks[step]),
                judge=judge,
                steps=settings.steps,
                checks=settings.checks,
            )
        return 1 - outcome.after / outcome.before if outcome.before else 0.0


def _ship(tunable: dict[str, TunableRounding], shipping: bool) -> None:
    for layer in tunable.values():
        layer.shipping = shipping


def _held(block: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, QuantizedLinear)}


def _original(block: nn.Module, name: str) -> Tensor:
    """The weight (out, in) that the codes of a layer stand for; the original may hold codes itself."""
    return matrix(block.get_submodule(name))


def _same_blocks(model: Any, teacher: Any, who: str) -> None:
    """Refuse an original whose blocks are not those of the model."""
    shapes = []
    for each in (model, teacher):
        _, blocks = decoder_blocks(each)
        shapes.append((len(blocks), [[_shape(m) for m in block.modules() if _shape(m)] for block in blocks]))
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{who}: the base model's {shapes[1][0]} blocks are not of the same shape as this model's "
            f"{shapes[0][0]}, so there is nothing to tune them towards; take tune_scales instead"
        )


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer that multiplies by a matrix, without building that of codes."""
    if isinstance(module, QuantizedLinear):
        return module.quantized.shape
    if not is_linear(module):
        return None
    out, columns = matrix(module).shape
    return out, columns


def _save(path: Path, held: dict[str, QuantizedLinear], identity: str, fall: float) -> None:
    """The codes and scales of a finished block; in place at once or not at all."""
    tensors = {}
    for name, module in held.items():
        tensors[f"{name}.codes"] = module.quantized.codes.contiguous()
        tensors[f"{name}.scales"] = module.quantized.scales.contiguous()
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"identity": identity, "fall": repr(fall)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); free some space and run again") from None


def _restore(path: Path, held: dict[str, QuantizedLinear], identity: str) -> bool:
    """Put back what `_save` wrote; False, with nothing changed, if there is nothing of this identity."""
    if not path.is_file():
        return False
    try:
        with opened(path) as file:
            if (file.metadata() or {}).get("identity") != identity:
                return False
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except UserError:
        return False  # torn: tune the block again
    for name, module in held.items():
        module.quantized.codes = tensors[f"{name}.codes"].to(module.quantized.codes.device)
        module.quantized.scales = tensors[f"{name}.scales"].to(module.quantized.scales.device)
    return True


def _fall(path: Path) -> float:
    with opened(path) as file:
        return float(file.metadata()["fall"])
