"""The records that one wing writes and the other reads.

The making wing (pipeline, passes, bundle) writes a `Manifest` into every artifact and a `RunRecord`
into every run; the telling wing (measure, report) writes one `Result` per variant and runtime. Both
import these types and nothing else of each other. Units: seconds, bytes, nats; what was not measured
is None, never 0. Every `*_ci95` is [low, high].
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.errors import UserError

SCHEMA_VERSION = 1
Interval = tuple[float, float]
# matrices with many zeros: as all others; smaller on disk; smaller in memory, too, where they are only run
Storage = Literal["dense", "sparse", "packed"]
_Record = TypeVar("_Record", bound="Record")


class Record(BaseModel):
    """A frozen value that goes to JSON and back unchanged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def write(self, path: Path) -> None:
        """Write as indented JSON, whole or not at all."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls: type[_Record], path: Path) -> _Record:
        """Read one back; raises UserError for a file that is missing or of another shape."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except ValueError as error:
            raise UserError(
                f"{path}: not a {cls.__name__} of this version ({_first(error)}); write it anew"
            ) from None


# what the steps were that records from before `PassRecord.kind` tell of; all others changed weights
_EXPORTS_BEFORE_KINDS = {
    "export_onnx": "onnx",
    "export_gguf": "gguf",
    "export_compressed_tensors": "compressed-tensors",
}


class PassRecord(Record):
    """One step of a chain. The pipeline fills everything but `notes`, which are the pass's own words.

    Attributes:
        kind: that of the pass ("train", "export", ...), "source" for what a chain starts from; None in
            records written before there were kinds, unless it is known.
        config: all fields of the pass.
        changed: those of them that differ from the pass's defaults; None where nobody wrote that down.
        exports: folders beside the weights that this step wrote.
    """

    name: str
    kind: str | None = None
    config: dict[str, Any]
    changed: dict[str, Any] | None = None
    exports: tuple[str, ...] = ()
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


def changed_settings(value: Any) -> dict[str, Any]:
    """Fields of a pass (a pydantic value) unlike their defaults, or without; of a format its kind, too."""
    stated: dict[str, Any] = {}
    whole = value.model_dump(mode="json")
    for name, field in type(value).model_fields.items():
        inner = getattr(value, name)
        if name == "kind" or field.is_required() or inner != field.get_default(call_default_factory=True):
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


class Result(Record):
    """One line of `results.jsonl`: one variant in one runtime."""

    variant: str
    runtime: str
    device: str
    artifact: str
    disk_bytes: int | None = None
    weight_bytes: int | None = None
    parameters: int | None = None
    nonzero_parameters: int | None = None
    peak_rss_bytes: int | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    nll: float | None = None
    nll_ci95: Interval | None = None
    delta_nll: float | None = None
    delta_nll_ci95: Interval | None = None
    kl_to_base: float | None = None
    kl_ci95: Interval | None = None
    top1_agreement: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_seconds_p50: float | None = None
    prefill_seconds_p95: float | None = None
    decode_seconds_p50: float | None = None
    decode_seconds_p95: float | None = None
    decode_seconds_p99: float | None = None
    load_seconds: float | None = None
    protocol: dict[str, Any] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    fingerprint: str = ""
    # of models that embed text; all others leave them null
    cosine_distance: float | None = None
    cosine_ci95: Interval | None = None
    # of timing: medians of each turn (those of one `timing_session` alternate, and compare pairwise), and the
    # share of the cores that other programs had meanwhile
    prefill_round_seconds: tuple[float, ...] = ()
    decode_round_seconds: tuple[float, ...] = ()
    timing_session: str = ""
    busy_share: float | None = None


class StepResult(Record):
    """Quality and size after one step of a chain, measured in torch on the saved step."""

    variant: str
    step_index: int
    pass_name: str
    nll: float | None = None
    delta_nll: float | None = None
    delta_nll_ci95: Interval | None = None
    kl_to_base: float | None = None
    kl_ci95: Interval | None = None
    weight_bytes: int | None = None
    file_bytes: int | None = None


class Reference(Record):
    """A simple model scored on the same tokens, to keep the numbers honest."""

    name: str
    nll: float
    perplexity: float
    bits_per_byte: float


class Sample(Record):
    """What a variant writes after a prompt."""

    variant: str
    runtime: str
    prompt: str
    text: str


class SampleBook(Record):
    """Samples drawn so far by a measurement that is still running."""

    samples: list[Sample]


class VariantRecord(Record):
    """A variant of a run; paths are relative to the run's folder."""

    name: str
    parent: str | None
    artifact: str
    exports: tuple[str, ...] = ()  # folders in the artifact
    fingerprint: str
    steps: list[PassRecord]

    @model_validator(mode="before")
    @classmethod
    def _from_before_exports(cls, values: Any) -> Any:
        """Records of earlier versions name the ONNX folder alone."""
        if isinstance(values, dict) and "onnx_artifact" in values:
            known = {name: value for name, value in values.items() if name != "onnx_artifact"}
            return {**known, "exports": ("onnx",) if values["onnx_artifact"] else ()}
        return values


class DataRecord(Record):
    """What text a run used: token counts and hashes of the disjoint parts."""

    source: str
    window: int
    train_tokens: int
    train_sha256: str
    calibration_tokens: int
    calibration_sha256: str
    evaluation_tokens: int
    evaluation_sha256: str
    evaluation_bytes: int


class RunRecord(Record):
    """`run.json`: everything of a run but the measured lines."""

    schema_version: int = SCHEMA_VERSION
    recipe_name: str
    base: str
    variants: list[VariantRecord]
    data: DataRecord
    machine: dict[str, Any]
    versions: dict[str, str]
    references: list[Reference] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    step_results: list[StepResult] = Field(default_factory=list)


def read_results(path: Path) -> list[Result]:
    """All lines of a `results.jsonl`; an absent file has none. Raises UserError for a broken line."""
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(Result.model_validate_json(line))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: no result line of this version ({_first(error)}); delete the file and "
                "measure again"
            ) from None
    return results


def _first(error: ValueError) -> str:
    """What is wrong first, in a line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return (str(error) or type(error).__name__).splitlines()[0]


def write_results(path: Path, results: list[Result]) -> None:
    """Write a whole `results.jsonl`."""
    write_whole(path, "".join(result.model_dump_json() + "\n" for result in results))


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
