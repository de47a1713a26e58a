"""What a runtime's file takes of codes, and what a model weighs there: the facts of each runtime, once.

A `Layout` says which grids a runtime has kernels for; how many bytes a matrix has in its file (`stored`, of
what the writer beside it writes); and what a whole file weighs, by letting that very writer write it with
any codes (export/weighing.py). Passes that choose widths ask it, and so does who makes recipes. Each
export has its own beside its writer, `export/*/sizes.py`.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from compress.artifact.sizes import ArtifactBytes
from compress.formats import Format
from compress.formats.registry import format_from

if TYPE_CHECKING:
    from compress.artifact.bundle import Bundle

WIDTHS = (2, 3, 4, 5, 6, 8)


class Weigher(Protocol):
    """Weighs plans: which matrix gets which format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every module."""
        ...

    def share(self, name: str, format: Format) -> int:
        """What a module adds to the file, as far as that can be told of it alone."""

    def stored(self, name: str, format: Format) -> int:
        """Bytes of its codes, scales and zero-points; none for a module that shares another's."""

    def weights(self, name: str) -> int:
        """How many weights it holds; none if it shares another's."""

    def total(self, formats: Mapping[str, Format]) -> int:
        """Bytes of all that is counted, at most, when the modules hold codes of these formats."""


class Layout(BaseModel):
    """What one runtime takes.

    Attributes:
        bits: widths that it has kernels for.
        groups: columns that may share a scale below eight bits; the first is the usual.
        symmetric: whether zero-points are left out of what is usual.
        eight: the usual grid of eight bits.
        tables: whether it reads token tables, and a head tied to one, as codes.
        noted: whether records of the passes are among the files that are counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: ClassVar[tuple[int, ...]] = WIDTHS
    groups: ClassVar[tuple[int, ...]] = (64,)
    symmetric: ClassVar[bool] = False
    eight: ClassVar[dict[str, Any]] = {"kind": "int8"}
    tables: ClassVar[bool] = True
    noted: ClassVar[bool] = True

    kind: str

    def widths(self) -> tuple[int, ...]:
        """All widths that it may be asked for; `bits`, or more where settings allow them."""
        return self.bits

    def formats(self, bits: int, group: int | None = None) -> tuple[Format, ...]:
        """The grids of a width to choose from; `group`: with this one only."""
        if bits == 8:
            return (format_from(self.eight),)
        groups = self.groups if group is None else (group,)
        return tuple(
            format_from({"kind": f"int{bits}", "group": columns, "symmetric": symmetric})
            for columns in groups
            for symmetric in self.signs(bits)
        )

    def signs(self, bits: int) -> tuple[bool, ...]:
        """Whether grids of a width are symmetric; both may be."""
        return (self.symmetric,)

    def objection(self, format: Format, columns: int) -> str | None:
        """Why it cannot hold codes of a format in rows of so many columns, and what to do; None if it can."""
        return None

    def together(self, names: Sequence[str]) -> list[list[str]]:
        """The modules, in sets of those that must have one format."""
        return [[name] for name in names]

    @abstractmethod
    def weigher(self, bundle: "Bundle", modules: Iterable[str], noted: int, scratch: Path) -> Weigher:
        """Weighs a model in float whose `modules` will hold codes.

        `noted`: bytes that records will have of the pass that chooses; `scratch`: a folder to write into.
        """


class TorchLayout(Layout):
    """The artifact itself: every file of its folder, but not exports inside it."""

    kind: Literal["torch"] = "torch"

    def weigher(self, bundle: "Bundle", modules: Iterable[str], noted: int, scratch: Path) -> Weigher:
        """From the lengths of its parts."""
        return ArtifactBytes(bundle, modules, noted, scratch)
