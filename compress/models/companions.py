"""What lies beside an encoder that embeds: how its states become a vector, and which prompts it wants.

The layout is sentence-transformers': `modules.json` lists the steps, each in a folder with a configuration.
The files travel with the model through every pass, as they were, so that what is written loads there again.
Pooling is put into the model's configuration too (`pooling`), where whoever runs the model finds it: `mean`
over the states of a text, the state of its first token (`cls`), or of its last (`lasttoken`).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.host.files import leaves, parse_json, read_bytes, read_json

POOLINGS = ("mean", "cls", "lasttoken")
_MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
_BY_FLAG = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
_KNOWN = ("Transformer", "Pooling", "Normalize")


def companions(folder: Path) -> dict[str, bytes]:
    """The files by their paths in a model's folder; none of a folder that is no sentence-transformer's.

    Raises:
        UserError: a list of steps that is none, or that has one which nothing here applies.
    """
    return {str(file.relative_to(folder)): read_bytes(file) for file in companion_files(folder)}


def companion_files(folder: Path) -> list[Path]:
    """Those of `companions`, unread."""
    if not (folder / _MODULES).exists():
        return []
    found = [folder / _MODULES, *(file for pattern in _SETTINGS for file in sorted(folder.glob(pattern)))]
    return [
        *found,
        *(place / "config.json" for _, place in _steps(folder) if (place / "config.json").exists()),
    ]


def with_pooling(config: Any, folder: Path) -> Any:
    """A configuration that says how states are pooled, where the files beside it do.

    Raises:
        UserError: a way of pooling that is not one of `POOLINGS`.
    """
    for kind, place in _steps(folder) if (folder / _MODULES).exists() else ():
        if kind == "Pooling":
            config.pooling = _pooling(read_json(place / "config.json"), place / "config.json")
    return config


def write_companions(files: dict[str, bytes], folder: Path) -> None:
    """Put them beside a model."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if _MODULES in files:
        for _, place in _steps(folder):
            place.mkdir(exist_ok=True)  # a step without settings is an empty folder


def pooled_by(files: Mapping[str, bytes], pooling: str, config: Any, longest: int) -> dict[str, bytes]:
    """The files beside a model whose states are pooled in a stated way: those given, changed only where they
    say otherwise; new ones where there are none.

    Args:
        files: as `companions` gave them.
        pooling: one of `POOLINGS`.
        config: of the model.
        longest: the most tokens that it takes.
    """
    found = dict(files)
    if _MODULES not in found:
        steps = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
        found[_MODULES] = _json(
            [
                {"idx": number, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
                for number, (name, path, kind) in enumerate(steps)
            ]
        )
        found["sentence_bert_config.json"] = _json({"max_seq_length": longest, "do_lower_case": False})
    for step in json.loads(found[_MODULES]):
        name = f"{step['path']}/config.json"
        if str(step["type"]).rpartition(".")[2] != "Pooling":
            continue
        settings = json.loads(found.get(name, b"{}"))
        if not settings or _pooling(settings, Path(name)) != pooling:
            flags = {flag: kind == pooling for flag, kind in _BY_FLAG.items()}
            found[name] = _json({"word_embedding_dimension": config.hidden_size, **flags})
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _steps(folder: Path) -> Iterator[tuple[str, Path]]:
    """(kind, folder) of each step after the model."""
    file = folder / _MODULES
    content = parse_json(read_bytes(file), file)
    if not isinstance(content, list) or not all(isinstance(step, dict) for step in content):
        raise UserError(f"{file}: a list of steps was expected; copy it again")
    for step in content:
        kind, place = str(step.get("type", "")).rpartition(".")[2], str(step.get("path", ""))
        if kind not in _KNOWN:
            raise UserError(
                f"{file}: '{kind}' is a step that nothing here applies (known: {', '.join(_KNOWN)}); take "
                "the plain model, or delete the file if its vectors are wanted without that step"
            )
        if place:
            if leaves(place):
                raise UserError(f"{file}: refers to '{place:.200}', which lies outside it")
            yield kind, folder / place


def _pooling(settings: dict[str, Any], file: Path) -> str:
    """One of `POOLINGS`, of settings old and new: flags, or a name."""
    named = settings.get("pooling_mode")
    flags = {key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True}
    found = {_BY_FLAG.get(flag, flag.removeprefix("pooling_mode_")) for flag in flags} | (
        {str(named)} if named else set()
    )
    if len(found) != 1 or not found <= set(POOLINGS):
        raise UserError(
            f"{file}: pools by {', '.join(sorted(found)) or 'nothing'}; what is applied here is one of "
            f"{', '.join(POOLINGS)}"
        )
    return found.pop()
