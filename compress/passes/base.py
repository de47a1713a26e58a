"""What a pass is.

A pass is a frozen value that can be called: its fields are its whole configuration, and calling it turns
one bundle into another, leaving its input as it was. Name, seconds, memory, parent and seed are added by
the pipeline. A pass says what data it needs, which kinds of pass may not come before it, and which
layers it will touch, so that a recipe that cannot work fails before any work starts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from compress.context import Context as Context
from compress.models.layers import is_linear as is_linear
from compress.models.layers import linear_layers as linear_layers
from compress.tasks.base import Task
from compress.tasks.registry import ONE_STACK

if TYPE_CHECKING:  # importing a pass to print its fields must not load a model library
    from compress.artifact.bundle import Bundle
    from compress.export.layout import Layout
    from compress.formats import Format

Kind = Literal["train", "distill", "prune", "fold", "quantize", "activations", "tune", "store", "export"]
Need = Literal["train", "calibration", "heldout", "teacher", "labelled"]


class Pass(BaseModel):
    """Base of all passes: a frozen, typed configuration with `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Need]] = frozenset()
    uses_labels: ClassVar[bool] = False  # reads labelled texts where there are any
    not_after: ClassVar[frozenset[Kind]] = frozenset()
    only_after: ClassVar[frozenset[Kind]] = frozenset()  # one of each must have come before
    together: ClassVar[bool] = False  # all processes take part; else the main one alone
    in_base: ClassVar[bool] = True  # may be part of the base, which all variants are compared with
    resizes: ClassVar[bool] = False  # the model's matrices come out in other sizes
    streams: ClassVar[bool] = False  # takes one block at a time: the weights may stay on disk
    tasks: ClassVar[frozenset[Task]] = ONE_STACK  # of the models that it takes

    def layers(self, model: nn.Module) -> list[str]:
        """Names of the modules this pass will change, from a model that may hold no data (meta device).

        An empty list means that its selector matched nothing, which the preflight refuses.
        """
        raise NotImplementedError

    def __call__(self, bundle: "Bundle", context: Context) -> "Bundle":
        """Return the changed bundle; the one given stays bit-identical."""
        raise NotImplementedError

    def deciding_fields(self) -> dict[str, Any]:
        """The fields that decide what comes out: all but those that a class it is made of calls `incidental`.

        A class attribute, a set of names: when checkpoints are written, where curves go, and the like. A step
        is not done again when only these change.
        """
        bases = type(self).__mro__
        incidental = set().union(*(vars(base).get("incidental", ()) for base in bases))
        return self.model_dump(mode="json", exclude=incidental)

    def cannot_follow(self, earlier: "Pass") -> bool:
        """Whether it may not come after this pass."""
        return earlier.kind in self.not_after

    def requires(self) -> frozenset[Need]:
        """What it needs with its settings: `needs`, or less."""
        return self.needs

    def wants_labels(self, task: Task) -> bool:
        """Whether it cannot take a model of this task without labelled texts."""
        return False

    def refuses_labels(self, kind: str) -> str | None:
        """Why its settings do not go with labelled rows of a kind, and what to do; None if they do."""
        return None

    def reads(self) -> tuple[str, ...]:
        """Models it reads besides the bundle and the base: what they are decides the result, too."""
        return ()

    def texts(self) -> tuple[str, ...]:
        """Text it reads besides the recipe's, as `load_documents` takes it: what it says decides, too."""
        return ()

    def writes(self) -> tuple["Format", ...]:
        """The formats of the codes this pass may write."""
        return ()

    def holds(self, model: nn.Module) -> dict[str, "Format"]:
        """The format of the codes it gives each layer of a model, where its settings alone say so."""
        formats = {"format": getattr(self, "format", None), "embeddings": getattr(self, "embeddings", None)}
        if formats["format"] not in self.writes():
            return {}
        from compress.formats.swap import embedding_names

        tables = set(embedding_names(model))
        held = {name: formats["embeddings" if name in tables else "format"] for name in self.layers(model)}
        return {name: format for name, format in held.items() if format is not None}

    def refuses_layer(self, columns: int, format: "Format") -> str | None:
        """Why it cannot take a layer so many columns wide with codes of a format; None if it can."""
        return None

    def refuses(self, formats: tuple["Format", ...]) -> str | None:
        """Why this pass cannot take a model with codes of these formats, and what to do; None if it can."""
        return None

    def layout(self) -> "Layout | None":
        """How the file that it writes holds codes, of an export whose bytes can be told before."""
        return None

    def followed_by(self, later: Sequence["Pass"]) -> "Pass":
        """Itself, in a recipe that goes on with these passes: what was left open to them is decided.

        Raises:
            ValueError: what was not left open does not go with them.
        """
        return self

    def plan(self) -> str | None:
        """What a plan says of it beside the layers it takes."""
        return None

    @classmethod
    def takes(cls, task: Task) -> bool:
        """Whether it works on models of a task; `tasks` may also hold names."""
        return str(task) in map(str, cls.tasks)

    @classmethod
    def name(cls) -> str:
        """The name used in recipes: that of the module the pass is written in."""
        return cls.__module__.rpartition(".")[2]

    def share_left(self, model: nn.Module) -> float:
        """The share of a model's parameters that it leaves, where its settings tell; 1 of all others."""
        return 1.0

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """A rough count of floating-point operations, for the time that `--dry-run` states."""
        return 0.0
