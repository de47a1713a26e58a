"""Files that are mapped, or read again, long after they were opened: they must stay what they were.

Method. Their length and the time of their last change are looked at before each use. Of a mapped file that is
asked of what was opened, not of the name: what another file has taken the place of lives on, what was written
over in place or cut short is refused. A file that is read `by_name` must be the same one, too.
Cost: a microsecond per file and use. Limits: what happens to a file within a call is not seen.
"""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path

from compress.errors import UserError
from compress.host.files import require_regular


class Steady:
    """Files that must not change while this lives.

    Args:
        files: what is watched.
        by_name: they are opened by their names again and again; else they are mapped.

    Raises:
        UserError: one cannot be read.
    """

    def __init__(self, files: Iterable[Path], *, by_name: bool = False) -> None:
        self._places: dict[Path, Path | int] = {}
        try:
            for file in files:
                self._places[file] = file if by_name else self._opened(file)
            self._looks = {file: _look(place) for file, place in self._places.items()}
        except OSError as error:
            raise UserError(f"{error.filename or 'weights'}: cannot be read ({error.strerror})") from None

    def require(self) -> None:
        """Raise UserError if one of them has been changed."""
        for file, place in self._places.items():
            try:
                same = _look(place) == self._looks[file]
            except OSError:
                same = False
            if not same:
                raise UserError(f"{file}: was changed while the model in it was in use; load it again")

    def _opened(self, file: Path) -> int:
        require_regular(file)  # a pipe would be waited for
        how = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(file, os.O_RDONLY | how)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def _look(place: Path | int) -> tuple[int, int, int]:
    state = os.stat(place)
    return state.st_ino, state.st_size, state.st_mtime_ns
