"""What an artifact says of itself: `manifest.json`, with the steps that made it.

Written by the making wing (pipeline, passes, bundle), read by the telling wing (measure, report).
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

from compress.records.base import SCHEMA_VERSION, Record, write_whole
from compress.records.seal import SEAL, seal_of

# matrices with many zeros: as all others; smaller on disk; smaller in memory, too, where they are only run
Storage = Literal["dense", "sparse", "packed"]

# what the steps were that records from before `PassRecord.kind` tell of; all others changed weights
_EXPORTS_BEFORE_KINDS = {
    "export_onnx": "onnx",
    "export_gguf": "gguf",
    "export_compressed_tensors": "compressed-tensors",
}


_NEARLY_ALL = 0.95  # of the weights: what is left then are not worth a word
_ROUNDED = 0.1


class Coverage(Record):
    """Which share of the weights of a model a pass took, counted before it ran.

    Attributes:
        taken: weights in the layers that it chose.
        weights: all in matrices and larger parameters, what is tied once.
        left: how many are left as they were, in what, the first few; `*` is a block's number.
    """

    taken: int
    weights: int
    left: dict[str, int] = Field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the weights, those taken."""
        return self.taken / self.weights if self.weights else 1.0

    def words(self) -> str | None:
        """What is said of it: nothing where next to all weights were taken."""
        if self.share >= _NEARLY_ALL:
            return None
        named = ", ".join(f"{name} {_percent(count / self.weights)}" for name, count in self.left.items())
        rest = self.weights - self.taken - sum(self.left.values())
        more = f", others {_percent(rest / self.weights)}" if rest else ""
        return f"takes {_percent(self.share)} of the weights; left as they are: {named}{more}"


class PassRecord(Record):
    """One step of a chain. The pipeline fills everything but `notes`, which are the pass's own words.

    Attributes:
        kind: that of the pass ("train", "export", ...), "source" for what a chain starts from; None in
            records written before there were kinds, unless it is known.
        config: all fields of the pass.
        changed: those of them that differ from the pass's defaults; None where nobody wrote that down.
        exports: folders beside the weights that this step wrote.
        coverage: which share of the weights it took; None where that is not the question, or was not asked.
    """

    name: str
    kind: str | None = None
    config: dict[str, Any]
    changed: dict[str, Any] | None = None
    exports: tuple[str, ...] = ()
    coverage: Coverage | None = None
    seconds: float
    peak_rss_bytes: int | None
    parent: str | None
    fingerprint: str
    seed: int
    notes: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_before_kinds(cls, values: Any) -> Any:
        """Records of earlier versions have no kind: what was an export then is known by name."""
        if isinstance(values, dict) and "kind" not in values:
            folder = _EXPORTS_BEFORE_KINDS.get(str(values.get("name")))
            if folder is not None:
                return {**values, "kind": "export", "exports": (folder,)}
        return values

    @property
    def is_export(self) -> bool:
        """Whether the step left the weights as they were."""
        return self.kind == "export"

    def curve(self) -> list["CurvePoint"]:
        """The loss curve in the notes of a step that trained, in the order of the steps; else empty."""
        rows = self.notes.get("loss_curve")
        return [CurvePoint(*row) for row in rows] if isinstance(rows, list) else []


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= _ROUNDED else f"{share:.1%}"


def changed_settings(value: Any) -> dict[str, Any]:
    """Fields of a pass (a pydantic value) unlike their defaults, or without; of a format its kind, too."""
    stated: dict[str, Any] = {}
    whole = value.model_dump(mode="json")
    for name, field in type(value).model_fields.items():
        inner = getattr(value, name)
        default = field.get_default(call_default_factory=True, validated_data=vars(value))
        if name == "kind" or field.is_required() or inner != default:
            stated[name] = changed_settings(inner) if isinstance(inner, BaseModel) else whole[name]
    return stated


class CurvePoint(NamedTuple):
    """A point of `loss_curve` in a step's notes.

    Attributes:
        step: updates so far.
        tokens: trained on so far.
        objective: mean over the updates since the point before of what the pass minimises, in its unit.
        heldout: NLL on the held-out windows, nats per predicted token; None where it was not scored.
    """

    step: int
    tokens: float
    objective: float
    heldout: float | None = None


class Lineage(Record):
    """Where a model comes from: its source, then every pass in order."""

    source: str
    steps: tuple[PassRecord, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes, first to last."""
        return tuple(step.name for step in self.steps)


class LayerRecord(Record):
    """A layer whose weights are stored as codes."""

    format: dict[str, Any]
    shape: tuple[int, int]
    tied_to: str | None = None
    embedding: bool = False
    activations: dict[str, Any] | None = None


class SparseRecord(Record):
    """A tensor stored as bitmask and values: its shape, and how many values there are (bytes, of codes)."""

    shape: tuple[int, ...]
    stored: int


class FileRecord(Record):
    """A file of an artifact."""

    bytes: int
    sha256: str

    def fits(self, file: Path) -> bool:
        """Whether a file is there, of that length."""
        return file.is_file() and file.stat().st_size == self.bytes


class Manifest(Record):
    """`manifest.json` of an artifact."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["huggingface", "onnx"]
    compress_version: str
    fingerprint: str
    lineage: Lineage
    layers: dict[str, LayerRecord] = Field(default_factory=dict)
    masked: tuple[str, ...] = ()
    sparse: dict[str, SparseRecord] = Field(default_factory=dict)
    storage: Storage = "dense"
    files: dict[str, FileRecord] = Field(default_factory=dict)
    exports: tuple[str, ...] = ()  # folders beside the files
    onnx: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_seal(cls, values: Any) -> Any:
        """The seal is of the file; whoever compares hashes (artifact/integrity.py) compares it."""
        return {k: v for k, v in values.items() if k != SEAL} if isinstance(values, dict) else values

    def write(self, path: Path) -> None:
        """Write as indented JSON that states its own hash, whole or not at all."""
        content = json.loads(self.model_dump_json())
        sealed = {**content, SEAL: seal_of(content)}
        write_whole(path, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")
