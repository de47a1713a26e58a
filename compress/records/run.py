"""What a run leaves besides artifacts and measured lines: `run.json`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from compress.records.base import SCHEMA_VERSION, Record
from compress.records.flips import FlipsRecord, LabelReference
from compress.records.manifest import PassRecord
from compress.records.results import StepResult

ReferenceName = Literal["unigram", "trigram", "lstm"]


class Reference(Record):
    """A simple model scored on the same tokens, to keep the numbers honest.

    Attributes:
        parameters: that were trained; None of one that counts.
        tokens: that it was fitted or trained on; None in records written before they were kept.
        fingerprint: of what decides the numbers.
    """

    name: str
    nll: float
    perplexity: float
    bits_per_byte: float
    parameters: int | None = None
    tokens: int | None = None
    fingerprint: str = ""

    @property
    def label(self) -> str:
        """What it is called in tables: its size belongs to its name."""
        if self.parameters is None:
            return self.name
        unit, letter = (1e6, "M") if self.parameters >= 1e5 else (1e3, "k")
        return f"{self.name} of {self.parameters / unit:.1f} {letter} parameters"


class ReferenceBook(Record):
    """References fitted so far by a call that is still running."""

    references: list[Reference]


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
    labelled: dict[str, Any] | None = None  # of labelled rows: how many, how they were divided, what was cut


class RunRecord(Record):
    """`run.json`: everything of a run but the measured lines.

    Attributes:
        flips: of tasks with labels, what each variant decides otherwise than the base in torch, by runtime.
        label_references: simple models of the training texts, of labels with names.
        not_measured: export folder -> why nothing was measured of it, "not measured in llama.cpp: ...".
    """

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
    not_measured: dict[str, str] = Field(default_factory=dict)
    flips: list[FlipsRecord] = Field(default_factory=list)
    label_references: list[LabelReference] = Field(default_factory=list)
