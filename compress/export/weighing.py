"""What an export will weigh, from writing it: the model with other codes goes through the real writer.

A file's length depends on the formats of its matrices and not on what the codes are, so graph, names, header,
padding and tokenizer come out as they will be; nothing of them is guessed. What a manifest will say of checks
is filled in at its longest.
Cost: as the export without its check, in time, memory and disk; a planner asks a few times.
"""

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from compress.artifact.bundle import Bundle
from compress.artifact.folder import disk_bytes
from compress.artifact.sizes import Matrices
from compress.formats import Format, QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.swap import embedding_names, embedding_scale
from compress.models.layers import replace_module
from compress.tasks.registry import task_of

LONGEST = -1.2345678901234567e-100  # a number as no record has a longer one

Writer = Callable[[Bundle, Path], Path]  # writes into an empty folder; returns the folder or file to count
Stored = Callable[[Format, tuple[int, int], bool], int]


class Written(Matrices):
    """Weighs plans by writing them.

    Args:
        bundle: the model in float, and its tokenizer.
        modules: of a matrix, all that will hold codes.
        write: the export.
        stored: bytes of the codes of a matrix: format, (out, in), whether it is a token table or the head.
        added: bytes that are not written here.
        scratch: a folder to write into.
        padded: bytes of a matrix -> with what fills its place up.
    """

    def __init__(
        self,
        bundle: Bundle,
        modules: Iterable[str],
        write: Writer,
        stored: Stored,
        *,
        added: int,
        scratch: Path,
        padded: Callable[[int], int] = lambda size: size,
    ) -> None:
        super().__init__(bundle.model, modules)
        self.bundle, self.write, self.added, self.scratch = bundle, write, added, scratch
        self._stored, self._padded = stored, padded
        self._known: dict[tuple[tuple[str, str], ...], int] = {}
        self._ends = set(embedding_names(bundle.model))

    def stored(self, name: str, format: Format) -> int:
        """Bytes of its codes, scales and zero-points; none for a module that shares another's."""
        if self.owners[name] != name:
            return 0
        return self._stored(format, self.shapes[name], name in self._ends)

    def share(self, name: str, format: Format) -> int:
        """What a module adds to the file, as far as that can be told of it alone."""
        return self._padded(self.stored(name, format))

    def total(self, formats: Mapping[str, Format]) -> int:
        """Bytes of all that is counted when the modules hold codes of these formats."""
        key = tuple(sorted((name, format.model_dump_json()) for name, format in formats.items()))
        if key in self._known:
            return self._known[key]
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        counted = self.write(with_any_codes(self.bundle, formats, self.owners), self.scratch / "written")
        self._known[key] = disk_bytes(counted) + self.added
        shutil.rmtree(self.scratch)
        return self._known[key]


def with_any_codes(bundle: Bundle, formats: Mapping[str, Format], owners: Mapping[str, str]) -> Bundle:
    """A bundle of the same tensors, but with any codes in the modules named; `owners` as of `Matrices`.

    Codes of nothing, but where the model is traced: how its graph takes padding is decided by its answers.
    """
    whole = bundle.model
    plain = task_of(whole.config).continues
    kept = {id(tensor): tensor for tensor in (*whole.parameters(), *whole.buffers())}
    model = copy.deepcopy(whole, kept)
    held: dict[str, QuantizedTensor] = {}
    for name, format in formats.items():
        module, owner = model.get_submodule(name), owners[name]
        if owner not in held:
            held[owner] = (
                _no_codes(format, module.weight.shape)
                if plain
                else QuantizedTensor.round(format, module.weight.detach())
            )
        table = isinstance(module, torch.nn.Embedding)
        new = (
            QuantizedEmbedding(held[owner], embedding_scale(module))
            if table
            else QuantizedLinear(held[owner], getattr(module, "bias", None))
        )
        replace_module(model, name, new)
    return bundle.evolve(model=model, exports={}, masks={})


def _no_codes(format: Format, shape: torch.Size) -> QuantizedTensor:
    found = QuantizedTensor(format, (shape[0], shape[1]))
    for buffer in found.buffers():
        buffer.zero_()
    return found
