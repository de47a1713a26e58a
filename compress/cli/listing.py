"""What `compress-lm passes` prints: a line per pass, read from its source, so that nothing heavy is imported.

Plugins come from elsewhere and are imported; where one cannot be, its line says so and the others stand.
"""

import ast
from pathlib import Path

import compress.passes
from compress.errors import UserError
from compress.run.registry import own_names, pass_class, plugins


def print_passes() -> None:
    """Print it: our own passes, then those of other packages."""
    found = {name: _read(Path(compress.passes.__path__[0]) / f"{name}.py") for name in sorted(own_names())}
    width = max(map(len, found))
    for name, (kind, line) in found.items():
        print(f"{name:<{width}}  {kind:<11}  {line}")
    for name, entry in sorted(plugins().items()):
        package = entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
        try:
            cls = pass_class(name)
        except UserError as error:
            print(f"{name:<{width}}  plugin       cannot be used: {error}")
            continue
        line = (cls.__doc__ or "").strip().split("\n")[0]
        print(f"{name:<{width}}  {cls.kind:<11}  {line} (plugin of {package})")


def _read(file: Path) -> tuple[str, str]:
    """The kind of the pass in a file of ours, and the first line that its class says of itself."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "kind":
                    assert isinstance(line.value, ast.Constant)
                    said = (ast.get_docstring(node) or "").split("\n")[0]
                    return str(line.value.value), said
    raise ValueError(f"{file} holds no pass")
