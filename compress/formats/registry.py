"""All formats, and the way from what a manifest or a recipe says to one of them."""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from compress.errors import UserError
from compress.formats.base import Format
from compress.formats.coded.coded import Coded
from compress.formats.integer import Int2, Int3, Int4, Int5, Int6, Int8
from compress.formats.nf4 import Nf4


def _from_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


FORMATS: tuple[type[Format], ...] = (Int8, Int6, Int5, Int4, Int3, Int2, Nf4, Coded)

# The type of a pass's field. In a recipe a format is `int4`, or `{kind: int4, group: 32}`.
if TYPE_CHECKING:
    AnyFormat = Format
else:
    AnyFormat = Annotated[reduce(or_, FORMATS), Field(discriminator="kind"), BeforeValidator(_from_name)]

_ADAPTER: TypeAdapter[Format] = TypeAdapter(AnyFormat)


def format_from(description: dict[str, Any] | str) -> Format:
    """Build a format from `{"kind": "int4", "group": 64, ...}` or `"int4"`.

    >>> format_from("int8").bits
    8
    """
    try:
        return _ADAPTER.validate_python(description)
    except ValidationError as error:
        raise UserError(f"format: {description!r} is no known format ({error.errors()[0]['msg']})") from None


_FEW_BITS = 3.0
TABLES = "of embedding and head: int8, beside 3 bits and fewer int4; null leaves them float"  # for people


def beside(fields: Mapping[str, Any]) -> Format:
    """The default of a pass's field `embeddings`: int8, or int4 where its `format` has three bits or fewer.

    Beside so few bits a table of 8 is most of the file, and costs more bytes than it saves loss.

    Args:
        fields: those of the pass that were given or filled in before this one.
    """
    weights = fields.get("format")
    return Int4() if isinstance(weights, Format) and weights.nominal_bits <= _FEW_BITS else Int8()
