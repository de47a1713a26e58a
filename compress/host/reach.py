"""Which code and which libraries can have a say in what a module computes: all that its imports reach.

Method. Source files are read, not imported. From the roots on, every `import` is followed, in functions, too,
since heavy modules are imported where they are needed; those under `if TYPE_CHECKING` run never and are
passed over. Of our own package and of the package that a plugin is in, each file counts by its syntax tree
without docstrings: comments, layout and docstrings change no number. Of any other package its version counts.
A package's `__init__` runs when something inside it is imported: then what it imports at once is followed,
and what its functions import only where something is imported from it by name. A package with a stub beside
its `__init__` loads its names when they are asked for; the stub says from where.

Cost: milliseconds per file; each is read once, and again when it is imported anew. Limits: a module named by
a computed string is not seen (ours are the passes, which are roots), nor are files that are no code. Python's
own version counts as far as it writes syntax trees differently.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# They name, show, complain, spell records, send curves elsewhere, or serve callers outside a run: no weight
# and no number of a run is theirs.
ASIDE = frozenset(
    {
        "compress",  # loads public names from elsewhere
        "compress.artifact.adapted",  # a run that merges an adapter counts models/adapters.py by itself
        "compress.artifact.applied",
        "compress.version",
        "compress.errors",
        "compress.host.progress",
        "compress.host.reach",
        "compress.records.base",
        "compress.records.manifest",
        "compress.records.results",
        "compress.records.run",
        "compress.training.trackers",
    }
)
# Libraries that check fields, print, lock, count memory, or bring files and text, known by what they hold.
BESIDE = frozenset(
    {"pydantic", "rich", "filelock", "psutil", "yaml", "datasets", "pyarrow", "huggingface_hub"}
)
# Modules that only ask a library what a file says and whether it is whole (what reads a GGUF's weights is
# transformers, with its help).
_ASKS = frozenset(
    (f"compress.models.{module}", "gguf") for module in ("gguf_files", "gguf", "gguf_tokenizer")
)
_OURS = __name__.partition(".")[0]
_READ: dict[str, tuple[ModuleSpec | None, "Source"]] = {}  # name -> what it was loaded by, what its file said


class Source(NamedTuple):
    """What one file says.

    Attributes:
        digest: SHA-256 of its syntax tree without docstrings.
        at_once: dotted names that it imports when it is imported itself.
        later: those that its functions import.
    """

    digest: str
    at_once: frozenset[str] = frozenset()
    later: frozenset[str] = frozenset()


class Reach(NamedTuple):
    """What the imports of some roots come to.

    Attributes:
        modules: name -> digest of its source.
        libraries: name -> version; empty for one that is not installed.
    """

    modules: dict[str, str]
    libraries: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over all of it."""
        facts = [*sorted(self.modules.items()), *sorted(self.libraries.items())]
        return hashlib.sha256("\n".join(map(" ".join, facts)).encode()).hexdigest()


def reach(*roots: str) -> Reach:
    """The modules and libraries that modules, named as they are imported, can reach; themselves included."""
    tops = frozenset(root.partition(".")[0] for root in roots)
    known: dict[str, bool] = {}  # a module of ours -> whether what its functions import counts, too
    libraries: dict[str, str] = {}
    waiting = [(root, True) for root in roots] + [
        (parent, False) for root in roots for parent in _parents(root)
    ]
    while waiting:
        name, functions = waiting.pop()
        if name in ASIDE or known.get(name) in (True, functions):
            continue
        known[name] = functions
        source = _source(name)
        for wanted in source.at_once | (source.later if functions else frozenset()):
            top = wanted.partition(".")[0]
            if top in sys.stdlib_module_names or top in BESIDE or (name, top) in _ASKS:
                continue
            if not _is_source(top, tops):
                libraries[top] = version_of(top)
                continue
            for module in _modules(wanted):
                waiting.append((module, True))
                waiting += [(parent, False) for parent in _parents(module)]
    return Reach({name: _source(name).digest for name in known}, libraries)


@cache
def version_of(library: str) -> str:
    """The version of a library by the name it is imported by; empty where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        owners = _owners().get(library, []) if _spec(library) is not None else []
        return ", ".join(f"{owner} {version(owner)}" for owner in sorted(set(owners)))


def _source(name: str) -> Source:
    """What the file of a module says: read again once the module was imported, or imported anew."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if name not in _READ or _READ[name][0] is not spec:
        _READ[name] = spec, _read(name)
    return _READ[name][1]


def _read(name: str) -> Source:
    file = _file(name)
    if file is None:
        return Source("")
    content = file.read_bytes()
    try:
        tree = ast.parse(content) if file.suffix == ".py" else None
    except (SyntaxError, ValueError):
        tree = None
    if tree is None:  # a compiled module, or for another Python
        return Source(hashlib.sha256(content).hexdigest())
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    found: tuple[set[str], set[str]] = set(), set()
    for statement, inside in _statements(tree, inside=False):
        found[inside].update(_named(statement, package))
    if b"import_module(" in content or b"__import__(" in content:  # else no need to look into expressions
        found[0].update(filter(None, map(_asked_for, ast.walk(tree))))
    text = ast.dump(tree)  # without places in the file, and now without docstrings
    return Source(hashlib.sha256(text.encode()).hexdigest(), frozenset(found[0]), frozenset(found[1]))


def _statements(node: ast.AST, *, inside: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """All statements below a node, and whether a function holds them; strings that stand alone are taken out.

    Those under `if TYPE_CHECKING` are passed over.
    """
    inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    never = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        children = getattr(node, block, [])
        children[:] = [child for child in children if not _stands_alone(child)]
        for child in children if not (never and block == "body") else ():
            if isinstance(child, ast.stmt):
                yield child, inside
            yield from _statements(child, inside=inside)


def _stands_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _named(node: ast.stmt, package: str) -> Iterator[str]:
    """The dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
            if alias.asname is None:  # `import a.b` binds a: all on the way can be used
                yield from _parents(alias.name)
    elif isinstance(node, ast.ImportFrom):
        here = package.split(".")
        above = here[: len(here) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names)


def _asked_for(node: ast.AST) -> str:
    """The module that `import_module("...")` names; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
    first = node.args[0] if node.args else None
    if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
        return str(first.value)
    return ""


@cache
def _modules(wanted: str) -> tuple[str, ...]:
    """The modules behind a dotted name, which may end in something that a module holds."""
    offered = _stub(wanted)
    if offered is not None:  # imported as a whole, so that any of its names can be used
        return (wanted, *offered.values())
    package, _, name = wanted.rpartition(".")
    home = (_stub(package) or {}).get(name) if package else None
    found = [home] if home else []
    if _file(wanted) is not None or _locations(wanted):
        return (*found, wanted)
    if not package:
        return ()
    return (home,) if home else ((package,) if _stub(package) is not None else _modules(package))


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _stub(package: str) -> dict[str, str] | None:
    """What the stub beside a package's `__init__` says: public name -> the module it lives in."""
    file = _file(package)
    if file is None or file.stem != "__init__" or not (stub := file.with_suffix(".pyi")).is_file():
        return None
    return _homes(stub)


@cache
def _homes(stub: Path) -> dict[str, str]:
    nodes = ast.parse(stub.read_bytes()).body
    return {a.name: str(n.module) for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


@cache
def _file(name: str) -> Path | None:
    """The file a module is read from; None where there is none, or only a folder."""
    package, _, last = name.rpartition(".")
    if not package:
        spec = _spec(name)
        origin = spec.origin if spec is not None and spec.has_location else None
        origin = origin or getattr(sys.modules.get(name), "__file__", None)  # a script has no spec
        return Path(origin) if origin else None
    for folder in _locations(package):
        places = [folder / last / "__init__.py", folder / f"{last}.py"]
        places += [folder / f"{last}{suffix}" for suffix in EXTENSION_SUFFIXES]
        for place in places:
            if place.is_file():
                return place
    return None


@cache
def _locations(name: str) -> tuple[Path, ...]:
    """The folders that a package's modules lie in; none for a module."""
    package, _, last = name.rpartition(".")
    if not package:
        spec = _spec(name)
        return tuple(map(Path, (spec.submodule_search_locations or ()) if spec is not None else ()))
    return tuple(folder / last for folder in _locations(package) if (folder / last).is_dir())


@cache
def _spec(top: str) -> ModuleSpec | None:
    try:
        return find_spec(top)
    except (ImportError, ValueError):
        return None


@cache
def _owners() -> Mapping[str, list[str]]:
    """Name that is imported -> the installed distributions that have it; reads what all of them hold."""
    return packages_distributions()


@cache
def _is_source(top: str, roots: frozenset[str]) -> bool:
    """Whether a package counts by its files: ours, those of the roots, and what no distribution has."""
    if top == _OURS or top in roots:
        return True
    plugins = roots - {_OURS}
    mine = {owner for root in plugins for owner in _owners().get(root, ())}
    if mine and mine & set(_owners().get(top, ())):
        return True
    return not version_of(top) and _spec(top) is not None
