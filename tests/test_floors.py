"""The house of compress: a module imports from lower floors and its own folder, and never in a circle."""

import ast
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parent
FLOORS = """0 errors version · 1 host solvers · 2 tasks · 3 models text records · 4 formats context report
· 5 artifact calibration · 6 layerwise structured training runtimes · 7 export generation
· 8 passes measure · 9 run search · 10 api · 11 cli · 12 __init__ __main__"""
FLOOR = {name: int(floor.split()[0]) for floor in FLOORS.split("·") for name in floor.split()[1:]}
FILES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in ROOT.rglob("*.py")}


def imports(module: str) -> set[str]:
    """Modules of compress that one imports anywhere: in functions, and for type checkers, too."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    paths = [name.split(".")[1:] for name in names if name.partition(".")[0] == "compress"]
    ways = [[[*p[:i], *e] for i in range(len(p), -1, -1) for e in ([], ["__init__"])] for p in paths]
    return {next(name for name in map(".".join, way) if name in FILES) for way in ways} - {module}


def test_every_arrow_points_down():
    arrows = [(module, target) for module in FILES for target in imports(module)]
    places = [(a.split(".")[0], b.split(".")[0]) for a, b in arrows]
    assert [x for x, (a, b) in zip(arrows, places, strict=True) if a != b and FLOOR[a] <= FLOOR[b]] == []


def test_there_is_no_circle():
    left = {module: imports(module) for module in FILES}
    while free := {module for module, targets in left.items() if not targets & set(left)}:
        left = {module: targets for module, targets in left.items() if module not in free}
    assert not left
