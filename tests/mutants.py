"""Take out one factor or guard at a time and see whether the nearest tests notice.

    python tests/mutants.py              # all of them: a second or two each, more for tests that run models
    python tests/mutants.py gptq rates   # those in whose file, tests or text one of these words occurs

`mutants.txt` has the changes; `test_mutants.py` sees to it that the list fits the code. Each is made in a
copy of the package, against which the tests named with it are run until the first failure. A change that
makes them loop for ever counts as noticed; one that breaks the import or the collection stops the script,
since nothing was tested. Exit code: 0 if at least 95 % are noticed, else 1.

Not in the list are sizes of blocks and slices and all else that only saves time or memory, and what was tried
but leaves every result as it is:

- masks: `max(target, removed)` in `best` (what is carried is taken off behind it), twice the sizes in
  `best_per_row` (equal shares stay equal), `minimum(limits)` in `largest_remainder` (asked for by its text);
- sparsegpt: a removed weight left in the work copy (the mask is multiplied in at the end);
- hqq: the guards against a scale of 0 and against 0 / 0 (each does what the other is for);
- sampling: weights divided by their sum, bounds stretched to k (which they are but for rounding);
- output_feedback: the guard against an F of zeros (`factorise` has one of its own).
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; and threads do not survive a fork
ROOT = Path(__file__).parent.parent
WANTED = 0.95
_SECONDS = 300  # that a change may take


@dataclass(frozen=True)
class Mutant:
    """`new` in the place of `old` in a file.

    Attributes:
        where: folder of the package and name of the file; it may move to anywhere inside that folder.
        test: the nearest file of tests.
        old: occurs in the file exactly once.
        new: what stands there instead.
    """

    where: str
    test: str
    old: str
    new: str

    def path(self, package: Path) -> Path:
        """The file below `package`.

        Raises:
            LookupError: there is none, or more than one, of that name.
        """
        folder, name = self.where.split("/")
        found = sorted((package / folder).rglob(name))
        if len(found) != 1:
            raise LookupError(f"{self.where}: {len(found)} files of that name")
        return found[0]

    def applied(self, package: Path) -> str:
        """The changed text of the file.

        Raises:
            LookupError: what is to be changed does not occur exactly once.
        """
        text = self.path(package).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise LookupError(f"{self.where}: {self.old!r} occurs {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.where}: {self.old!r} -> {self.new!r}"


def read(file: Path) -> list[Mutant]:
    """The changes in a file: `@ folder/name test`, then blocks of lines with `-` and with `+`."""
    found = []
    for block in file.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines and lines[0].startswith("@ "):
            where, test = lines[0][2:].split()
        elif lines:
            old, new = ("\n".join(line[1:] for line in lines if line[:1] == sign) for sign in "-+")
            assert all(line[0] in "-+" for line in lines), block
            found.append(Mutant(where, test, old, new))
    return found


MUTANTS = read(Path(__file__).with_suffix(".txt"))


class _EquationsFirst:
    """They stand at the end of most files, and notice most: so the last tests run first."""

    def pytest_collection_modifyitems(self, items: list[object]) -> None:
        items.reverse()


def _child(copy: Path, test: str) -> None:
    """Run a file of tests against a copy of the project; the exit code is pytest's."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("compress", "training_set"):
            del sys.modules[name]
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    import pytest

    # plain assertions, since what was loaded before the fork could not be rewritten
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain"]
    options.append("--hypothesis-profile=mutants")
    os._exit(int(pytest.main([*options, f"tests/{test}"], plugins=[_EquationsFirst()])))


def run(mutants: list[Mutant]) -> list[Mutant]:
    """Try each; those that were not noticed.

    Raises:
        RuntimeError: a change that breaks the collection, or tests that fail without any.
    """
    # what takes seconds to import is imported once, and shared by all that are forked from here
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    importlib.import_module("training_set").tiny_bundle()
    processes = multiprocessing.get_context("fork")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("compress", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)

        def tried(test: str) -> int | None:
            process = processes.Process(target=_child, args=(copy, test))
            process.start()
            process.join(_SECONDS)
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
            return code

        for test in sorted({mutant.test for mutant in mutants}):
            if tried(test) != 0:
                raise RuntimeError(f"{test} fails without any change")
        for mutant in mutants:
            path = mutant.path(copy / "compress")
            before = path.read_text(encoding="utf-8")
            path.write_text(mutant.applied(copy / "compress"), encoding="utf-8")
            code = tried(mutant.test)
            path.write_text(before, encoding="utf-8")
            if code not in (None, 0, 1):
                raise RuntimeError(f"{mutant} broke the run of {mutant.test} (exit code {code})")
            print("MISSED " if code == 0 else "noticed", mutant, flush=True)
            if code == 0:
                missed.append(mutant)
    return missed


def main(words: list[str]) -> int:
    """Try the changes in whose file, tests or text one of the words occurs, or all."""
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.test} {m}" for word in words)]
    missed = run(chosen)
    noticed = len(chosen) - len(missed)
    print(f"{noticed} of {len(chosen)} noticed ({100 * noticed / len(chosen):.1f} %)")
    for mutant in missed:
        print(f"  not by {mutant.test}: {mutant}")
    return 0 if noticed >= WANTED * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
