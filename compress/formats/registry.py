"""From what a manifest or a recipe says to a format."""

from typing import Any

from pydantic import TypeAdapter, ValidationError

from compress.errors import UserError
from compress.formats.integer import Format, IntegerFormat

_ADAPTER: TypeAdapter[IntegerFormat] = TypeAdapter(Format)


def format_from(description: dict[str, Any] | str) -> IntegerFormat:
    """Build a format from `{"kind": "int4", "group": 64, ...}` or `"int4"`.

    >>> format_from("int8").bits
    8
    """
    try:
        return _ADAPTER.validate_python(description)
    except ValidationError as error:
        raise UserError(f"format: {description!r} is no known format ({error.errors()[0]['msg']})") from None
