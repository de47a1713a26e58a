"""Files that mean harm: what is done to a whole input, by the name of the case.

Each takes the copy of an input and changes it; `CANARY` is there only if code of the input ran.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

Change = Callable[[Path], object]
CANARY = Path("/tmp/campaign-canary")
OUTSIDE = "/etc/hostname"
ESCAPE = "\x1b]0;owned\x07\x1b[31mred\x9b2J"
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>[link=http://x]y[/link]"
_MODULE = f"open({str(CANARY)!r}, 'w').close()\n"


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def edited(name: str, **changes: Any) -> Change:
    """A JSON object with other fields."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")

    return change


def nested(name: str, path: str, value: Any) -> Change:
    """A JSON file with another value at `a.b.0.c`."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8").splitlines()[0]) if name.endswith(
            ".jsonl"
        ) else json.loads((folder / name).read_text(encoding="utf-8"))  # fmt: skip
        held = content
        *parents, leaf = [int(part) if part.isdecimal() else part for part in path.split(".")]
        for part in parents:
            held = held[part]
        held[leaf] = value
        (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")

    return change


def written(name: str, content: str | bytes) -> Change:
    """Another file in its place, or a new one."""

    def change(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return change


def linked(name: str, to: str) -> Change:
    """A link in its place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


def pipe(name: str) -> Change:
    """A pipe in its place, that nobody writes to."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def hollow(name: str, gigabytes: int, head: bytes = b"") -> Change:
    """Gigabytes of zeros that take no disk."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(head)
        os.truncate(folder / name, gigabytes << 30)

    return change


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def pickled(name: str, *, archive: bool = False) -> Change:
    """A pickle, plain or as torch's archive."""

    def change(folder: Path) -> None:
        if archive:
            torch.save({"weight": Evil()}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Evil()))

    return change


def without(name: str) -> Change:
    """One file less."""
    return lambda folder: (folder / name).unlink()


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of that header, or that says another length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def gguf(*parts: Any) -> bytes:
    """A header: integers as 64 bits, the rest as it is."""
    body = b"".join(part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts)
    return b"GGUF" + struct.pack("<I", 3) + body


def graph(change: Callable[[Any], object]) -> Change:
    """An ONNX graph that was changed as a message."""

    def changed(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return changed


def external(place: str) -> Change:
    """A graph whose weights lie elsewhere."""

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place

    return graph(change)


def custom_operator(model: Any) -> None:
    """A node of a domain that a library would have to bring."""
    model.graph.node[0].domain, model.graph.node[0].op_type = "evil", "System"
    model.opset_import.add(domain="evil", version=1)


def endless_loop(model: Any) -> None:
    """A node that takes its own output."""
    node = model.graph.node[0]
    node.input[0] = node.output[0]


def parquet_bomb(folder: Path) -> None:
    """A small file whose one column is, read, 40 GB."""
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array(["a" * 1_000_000])
    indices = pyarrow.array([0] * 40_000, type=pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, column)})
    parquet.write_table(table, folder / "rows.parquet")


def tokenizer_with(**parts: Any) -> Change:
    """A tokenizer of which parts are others."""
    return edited("tokenizer.json", **parts)


def evil_modules(folder: Path) -> None:
    """Modules with the names that a program would import, beside the model."""
    for name in ("json", "sitecustomize", "jinja2", "torch", "usercustomize", "conftest"):
        (folder / f"{name}.py").write_text(_MODULE, encoding="utf-8")


def remote(folder: Path) -> None:
    """A class of the folder's own, named by its configuration."""
    (folder / "modeling_evil.py").write_text(_MODULE, encoding="utf-8")
    edited(
        "config.json", auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    )(folder)


def remote_type(folder: Path) -> None:
    """The same for a model type that nobody knows."""
    remote(folder)
    edited("config.json", model_type="evil", trust_remote_code=True)(folder)


def remote_tokenizer(folder: Path) -> None:
    """A tokenizer's class of the folder's own."""
    (folder / "tokenization_evil.py").write_text(_MODULE, encoding="utf-8")
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]},
           tokenizer_class="T")(folder)  # fmt: skip


def remote_generation(folder: Path) -> None:
    """Code that generates."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(_MODULE, encoding="utf-8")
    edited("generation_config.json", custom_generate=str(folder), trust_remote_code=True)(folder)


TEMPLATES = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubles a text": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}{{ n.s }}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "a long text": "{{ 'a' * 10 ** 11 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch " + str(CANARY) + "') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch " + str(CANARY) + "') }}",
    "attr": "{{ ''|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "file": "{% include '" + OUTSIDE + "' %}",
    "wide format": "{{ '%099999999999d' % 1 }}",
    "escapes": "{{ raise_exception('" + ESCAPE + "') }}",
    "time": "{{ strftime_now('%Y' * 10 ** 9) }}",
    "a million filters": "{{ 'a'" + "|upper" * 100_000 + " }}",
}
