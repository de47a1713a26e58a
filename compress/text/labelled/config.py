"""The `labelled` section of a recipe."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.text.labelled.base import Kind
from compress.text.prompts import Prompt, checked

_VALUE = ConfigDict(frozen=True, extra="forbid")


class Mixed(BaseModel):
    """One of several sources that are mixed."""

    model_config = _VALUE

    source: str = Field(min_length=1, description="as `labelled.source` of one")
    share: float = Field(1.0, gt=0, le=1e6, description="of the training rows, in proportion to the others'")
    proxy: bool = Field(
        False, description="its rows train only: held-out and evaluation rows are cut off the other sources"
    )


class LabelledConfig(BaseModel):
    """The `labelled` section; `labelled: rows.csv` is short for `labelled: {source: rows.csv}`."""

    model_config = _VALUE

    source: str | list[str | Mixed] = Field(
        description="a file (.csv, .tsv, .jsonl, .json, .parquet, .conll), several, a folder with a file per "
        "part or laid out as GLUE ships it, 'datasets:NAME[/CONFIG][:SPLIT]', 'stdlib:package', "
        "'stdlib:kinds', 'stdlib:docstring', 'stdlib:passages', or a list of {source, share, proxy}"
    )
    evaluation: str | None = Field(
        None, description="a file of its own for evaluation; null: the folder's, or cut off the training rows"
    )
    heldout: str | None = Field(None, description="a file of its own for early stopping; null: as above")
    kind: Kind | None = Field(None, description="what the labels are; null: recognised")
    text: str | None = Field(
        None, min_length=1, description="the field (column) of the text; null: recognised"
    )
    pair: str | None = Field(
        None, min_length=1, description="of the second text; null: recognised, or there is none"
    )
    label: str | None = Field(None, min_length=1, description="of the label; null: recognised")
    words: str | None = Field(
        None, min_length=1, description="of the words that have a tag each; null: recognised"
    )
    template: str | None = Field(
        None, description="how a decoder without a head is asked for one label of a text: a prompt with "
        "{text}, {pair} and, at its end, {label}; the likeliest label is decided"
    )  # fmt: skip
    per_token: bool = Field(
        True,
        description="of the template: a label's log-likelihood is the mean over its tokens; false: their sum",
    )
    evaluation_share: float = Field(0.2, gt=0, lt=1, description="of the rows, where it is cut off")
    heldout_share: float = Field(0.1, ge=0, lt=1, description="of the rows, where it is cut off; 0: none")
    train_rows: int | None = Field(None, ge=2, description="at most so many, of every label; null: all")
    evaluation_rows: int | None = Field(None, ge=1, description="at most so many, of every label; null: all")
    heldout_rows: int | None = Field(None, ge=1, description="at most so many, of every label; null: all")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, (str, list)) else given

    @field_validator("template")
    @classmethod
    def _can_be_asked(cls, template: str | None) -> str | None:
        return None if template is None else checked(template)

    @property
    def prompt(self) -> Prompt | None:
        """How a decoder is asked."""
        return None if self.template is None else Prompt(self.template, self.per_token)

    @model_validator(mode="after")
    def _something_is_left(self) -> "LabelledConfig":
        if self.evaluation_share + self.heldout_share >= 1:
            raise ValueError(
                f"labelled.evaluation_share and heldout_share come to {self.evaluation_share:g} + "
                f"{self.heldout_share:g}, which leaves no rows to train on; take less than 1 together"
            )
        if isinstance(self.source, list) and not self.source:
            raise ValueError("labelled.source: an empty list; name at least one file")
        return self

    @property
    def sources(self) -> tuple[Mixed, ...]:
        """All sources, each with its share."""
        given = [self.source] if isinstance(self.source, str) else self.source
        return tuple(s if isinstance(s, Mixed) else Mixed(source=s) for s in given)

    @property
    def mixed(self) -> bool:
        """Whether shares are asked for."""
        return isinstance(self.source, list) and any(isinstance(s, Mixed) for s in self.source)

    @property
    def named(self) -> str:
        """The sources in words."""
        return ", ".join(s.source for s in self.sources)
