"""Steps of a run: what identifies one, and where its result is kept.

A step's fingerprint covers its parent, the pass and those of its fields that decide, the data it reads, the
precision, the seed, the code that the pass reaches by imports and the versions of the libraries among them
(host/reach.py): a fix in an exporter trains nothing anew. The pipeline and this file are no part of it: what
they hand over is (lending.py), what they keep is linked and copied. A finished step lies whole under
`.steps/<fingerprint>/`; a step that was interrupted leaves a `.work/<fingerprint>/` with what it can resume
from. So a killed run goes on where it was, and a changed recipe computes only what changed. Variants are hard
links to steps and cost no space.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.artifact.bundle import Bundle
from compress.artifact.folder import MANIFEST
from compress.artifact.integrity import fault, stated, write_sums
from compress.errors import UserError
from compress.host.files import read_text
from compress.host.reach import reach
from compress.passes.base import Pass
from compress.records.manifest import Lineage, Manifest, PassRecord


def fingerprint(*parts: Any) -> str:
    """SHA-256 over JSON values, hexadecimal."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def code_of(*modules: str) -> str:
    """Hash of the code, and of the versions of libraries, that these modules and saving a bundle reach."""
    return reach(*modules, "compress.artifact.bundle").digest


def pass_version(step: Pass, *more: str) -> str:
    """Hash of the code that decides what a pass makes: its own, a plugin's too, and what hands it things."""
    return code_of(type(step).__module__, "compress.run.lending", *more)


STEPS = ".steps"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs.

    Raises:
        UserError: one is at work there.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: another run is using it; wait for that, or choose another folder with --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


class StepStore:
    """The steps of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.finished, self.working = folder / STEPS, folder / ".work"

    def path(self, fingerprint: str) -> Path:
        """Where a finished step lies."""
        return self.finished / fingerprint[:16]

    def has(self, fingerprint: str) -> bool:
        """Whether the step was finished, and still is what was written."""
        return self._finished(fingerprint) and self.damage(fingerprint) is None

    def damage(self, fingerprint: str) -> str | None:
        """What is wrong with a step that was finished: it is done again; None of one that was not, too."""
        if not self._finished(fingerprint):
            return None
        try:
            return _damage(self.path(fingerprint))
        except UserError as error:
            return str(error)

    def _finished(self, fingerprint: str) -> bool:
        return _is_of(self.path(fingerprint), fingerprint)

    def record(self, fingerprint: str) -> PassRecord:
        """The last pass of a finished step."""
        return Manifest.read(self.path(fingerprint) / MANIFEST).lineage.steps[-1]

    def workdir(self, fingerprint: str) -> Path:
        """The folder a step may keep checkpoints in."""
        folder = self.working / fingerprint[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save(self, bundle: Bundle, parent: Path | None = None) -> None:
        """Keep a finished step under the fingerprint its lineage ends with.

        `parent` is given when the step changed no weights (an export): its files are linked, not written.
        """
        found = bundle.lineage.steps[-1].fingerprint
        target = self.path(found)
        self.finished.mkdir(parents=True, exist_ok=True)
        if parent is None:
            bundle.save(target)
        else:
            _extend(parent, target, bundle)
        shutil.rmtree(self.working / found[:16], ignore_errors=True)

    def publish(self, fingerprint: str, name: str) -> Path:
        """Make a finished step visible as the folder of a variant."""
        source, target = self.path(fingerprint), self.root / name
        if _whole(target, fingerprint):
            return target
        if target.exists() and not (target / MANIFEST).is_file():
            raise UserError(f"{target}: is in the way, and was not written by a run; move it elsewhere")
        show(source, target)
        return target

    def forget_others(self, keep: set[str]) -> None:
        """Remove steps that the recipe no longer has, and what those left that were cut off.

        For a recipe all of whose steps are finished: a kill may have come between keeping one and this.
        """
        wanted = {found[:16] for found in keep}
        for entry in self.finished.iterdir() if self.finished.is_dir() else ():
            if entry.name not in wanted:
                shutil.rmtree(entry, ignore_errors=True)
        for entry in self.working.iterdir() if self.working.is_dir() else ():
            if entry.is_dir():  # files are what measuring goes on from
                shutil.rmtree(entry, ignore_errors=True)


def show(source: Path, target: Path) -> None:
    """Make a folder of a run visible in another place, whole or not at all; it costs no space."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def earlier_seconds(workdir: Path) -> float:
    """Seconds that runs before this one, cut off, worked on a step; begins to count for this one.

    From the start of each to the last file that it left: what came after that is done again.
    """
    file, now, spent = workdir / "started", time.time(), 0.0
    if file.is_file():
        try:
            before, started = map(float, read_text(file).split())
        except (UserError, ValueError):  # damaged: it counts from now
            before, started = 0.0, now
        left = (path.lstat().st_mtime for path in workdir.rglob("*") if path != file)
        spent = before + max(0.0, max(left, default=started) - started)
    partial = file.with_suffix(".partial")
    with suppress(OSError):  # what cannot be written is told of when the step is kept
        partial.write_text(f"{spent} {now}", encoding="utf-8")
        partial.replace(file)
    return spent


def link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system allows it: weights can be gigabytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _extend(parent: Path, target: Path, bundle: Bundle) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(parent, partial, copy_function=link_or_copy)
        for name, source in bundle.exports.items():
            shutil.rmtree(partial / name, ignore_errors=True)
            shutil.copytree(source, partial / name, copy_function=link_or_copy)
            if not stated(partial / name):
                write_sums(partial / name)
            _relabel(partial / name / MANIFEST, bundle.lineage)
        _relabel(partial / MANIFEST, bundle.lineage, exports=tuple(bundle.exports))
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error}); free some space and run again") from None


def _whole(folder: Path, fingerprint: str) -> bool:
    """Whether a folder is a step's, and holds what was written, exports too."""
    try:
        return _is_of(folder, fingerprint) and _damage(folder) is None
    except UserError:
        return False


def _is_of(folder: Path, fingerprint: str) -> bool:
    try:
        return Manifest.read(folder / MANIFEST).fingerprint == fingerprint
    except UserError:
        return False


def _damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as it was written, of a folder and the exports in it.

    Raises:
        UserError: what states the files cannot be read.
    """
    manifest = Manifest.read(folder / MANIFEST)
    for export in (folder / name for name in manifest.exports):
        if not export.is_dir():
            return f"{export}: missing"
        if (export / MANIFEST).is_file() and not _is_of(export, manifest.fingerprint):
            return f"{export / MANIFEST}: of another step"
        if (wrong := fault(export, stated(export))) is not None:
            return wrong
    return fault(folder, stated(folder))


def _relabel(path: Path, lineage: Lineage, **more: Any) -> None:
    """Write a manifest anew with another lineage; the file linked to stays as it was."""
    if path.is_file():
        manifest = Manifest.read(path)
        path.unlink()
        changed = {"lineage": lineage, "fingerprint": lineage.steps[-1].fingerprint}
        manifest.model_copy(update=changed | more).write(path)
