"""What every record is: a frozen value that goes to JSON and back, written whole or not at all.

Units in all records: seconds, bytes, nats; what was not measured is None, never 0. Every `*_ci95` is
[low, high]. No field is a number that is not finite: measuring refuses a model that answers with such, so in
a file it can only be damage. In free notes (`config`, `notes`, `machine`) it is written as Python's `json`
writes it (`NaN`, `Infinity`), never as null, which would say that nobody had looked.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from compress.errors import UserError, reason
from compress.host.files import RECORDS_BYTES, json_value, read_text

SCHEMA_VERSION = 1
Interval = tuple[float, float]  # [low, high]
_Record = TypeVar("_Record", bound="Record")


class Record(BaseModel):
    """A frozen value that goes to JSON and back unchanged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")

    def write(self, path: Path) -> None:
        """Write as indented JSON, whole or not at all; raises UserError as `as_json`."""
        write_whole(path, self.as_json(path, indent=2) + "\n")

    def as_json(self, path: Path, indent: int | None = None) -> str:
        """The record in JSON, for a file.

        Raises:
            UserError: a name or text in it has half a character, as names of files may that are not UTF-8.
        """
        try:
            return self.model_dump_json(indent=indent)
        except PydanticSerializationError as error:
            raise UserError(
                f"{path}: cannot be written as UTF-8 ({reason(error)}); rename the file or folder whose name "
                "is no Unicode text"
            ) from None

    @classmethod
    def read(cls: type[_Record], path: Path) -> _Record:
        """Read one back; raises UserError for a file that is missing or of another shape."""
        text = read_text(path, RECORDS_BYTES)
        try:
            return cls.of_json(text)
        except ValueError as error:
            raise UserError(
                f"{path}: not a {cls.__name__} of this version ({first_fault(error)}); write it anew"
            ) from None

    @classmethod
    def of_json(cls: type[_Record], text: str) -> _Record:
        """What JSON says; raises ValueError where it is none, or of another shape, or names a field twice."""
        json_value(text.encode(), unique=True)
        return cls.model_validate_json(text)


def first_fault(error: ValueError) -> str:
    """What is wrong first, in a line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return reason(error)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
