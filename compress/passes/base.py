"""What a pass is.

A pass is a frozen value that can be called: its fields are its whole configuration, and calling it turns
one bundle into another, leaving its input as it was. Name, seconds, memory, parent and seed are added by
the pipeline. A pass says what data it needs, which kinds of pass may not come before it, and which
layers it will touch, so that a recipe that cannot work fails before any work starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from compress.names import matches
from compress.stacks import block_lists
from compress.tasks import TASKS, Task

if TYPE_CHECKING:  # importing a pass to print its fields must not load a model library
    from compress.bundle import Bundle
    from compress.data import TextData
    from compress.formats import IntegerFormat

Kind = Literal["train", "distill", "prune", "fold", "quantize", "activations", "tune", "store", "export"]
Need = Literal["train", "calibration", "heldout", "teacher"]


@dataclass
class Context:
    """What the pipeline lends to a pass while it runs.

    Attributes:
        data: the disjoint token windows.
        teacher: loads the recipe's base model.
        seed: the only source of randomness a pass may use.
        workdir: a folder that survives a kill; gone once the step is done. Checkpoints and exports go here.
        device: where to compute.
        threads: CPU threads in use.
        precision: `bfloat16` where the machine computes it natively, else `float32`.
        logs: where trackers of a training write; stays with the run.
    """

    data: "TextData"
    teacher: Callable[[], "Bundle"]
    seed: int
    workdir: Path
    device: torch.device
    threads: int
    precision: Literal["float32", "bfloat16"]
    logs: Path | None = None


class Pass(BaseModel):
    """Base of all passes: a frozen, typed configuration with `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Need]] = frozenset()
    not_after: ClassVar[frozenset[Kind]] = frozenset()
    only_after: ClassVar[frozenset[Kind]] = frozenset()  # one of each must have come before
    together: ClassVar[bool] = False  # all processes take part; else the main one alone
    in_base: ClassVar[bool] = True  # may be part of the base, which all variants are compared with
    streams: ClassVar[bool] = False  # takes one block at a time: the weights may stay on disk
    tasks: ClassVar[frozenset[Task]] = TASKS - {"seq2seq"}  # of the models that it takes

    def layers(self, model: nn.Module) -> list[str]:
        """Names of the modules this pass will change, from a model that may hold no data (meta device).

        An empty list means that its selector matched nothing, which the preflight refuses.
        """
        raise NotImplementedError

    def __call__(self, bundle: "Bundle", context: Context) -> "Bundle":
        """Return the changed bundle; the one given stays bit-identical."""
        raise NotImplementedError

    def cannot_follow(self, earlier: "Pass") -> bool:
        """Whether it may not come after this pass."""
        return earlier.kind in self.not_after

    def requires(self) -> frozenset[Need]:
        """What it needs with its settings: `needs`, or less."""
        return self.needs

    def reads(self) -> tuple[str, ...]:
        """Models it reads besides the bundle and the base: what they are decides the result, too."""
        return ()

    def texts(self) -> tuple[str, ...]:
        """Text it reads besides the recipe's, as `load_documents` takes it: what it says decides, too."""
        return ()

    def writes(self) -> tuple["IntegerFormat", ...]:
        """The formats of the codes this pass may write."""
        return ()

    def refuses(self, formats: tuple["IntegerFormat", ...]) -> str | None:
        """Why this pass cannot take a model with codes of these formats, and what to do; None if it can."""
        return None

    @classmethod
    def name(cls) -> str:
        """The name used in recipes: that of the module the pass is written in."""
        return cls.__module__.rpartition(".")[2]

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """A rough count of floating-point operations, for the time that `--dry-run` states."""
        return 0.0


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a stored matrix: torch's Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_layers(
    model: nn.Module, select: tuple[str, ...] = ("*",), skip: tuple[str, ...] = ()
) -> list[str]:
    """Names of the linear layers inside the decoder or encoder blocks that the patterns select.

    Patterns are shell wildcards over full module names (`*.mlp.*`), or `re:` and a regular expression.
    The head is no block layer: quantizers treat it together with the embedding it may be tied to. An
    encoder's pooler lies outside the blocks, too, and stays as it is.
    """
    blocks = block_lists(model)
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and name.startswith(blocks)
        and any(matches(name, p) for p in select)
        and not any(matches(name, p) for p in skip)
    ]
