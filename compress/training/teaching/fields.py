"""The fields of passes that learn from a teacher, whatever their model is for."""

from pydantic import BaseModel, ConfigDict, Field

from compress.tasks.masked import HIDDEN
from compress.training.objectives.labelled import StopBy
from compress.training.teaching.distillation import Distillation


class TaskFields(BaseModel):
    """The fields that are of some tasks only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unlabelled: float = Field(
        0.0, ge=0, le=1, description="share of the steps that read plain text, `data.text`, and not labelled "
        "texts (models with labels, encoders that embed)"
    )  # fmt: skip
    stop_by: StopBy = Field(
        "score", description="of the held-out texts, what decides which weights to keep (models with labels)"
    )
    masked: float = Field(HIDDEN, gt=0, lt=1, description="share of tokens that are hidden (masked-LMs)")
    whole_words: bool = Field(False, description="hide all pieces of a word together (masked-LMs)")
    spans: float = Field(
        0.5, ge=0, le=1, description="share of steps that take spans out; the others go on with a text "
        "(encoder-decoders)"
    )  # fmt: skip
    cosine: float = Field(
        1.0, ge=0, le=1e4, description="weight of 1 - cosine to the teacher's embedding (encoders that embed)"
    )
    similarity: float = Field(
        1.0, ge=0, le=1e4, description="weight of the squared difference of the batch's cosines (likewise)"
    )


class Teaching(Distillation, TaskFields):
    """All fields of a pass that learns from a teacher, whatever its model is for."""
