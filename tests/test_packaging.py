"""The package says the same everywhere, carries its data, and imports lightly."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import compress

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = {
    canonicalize_name(name): pinned
    for name, pinned in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}


def direct() -> list[Requirement]:
    """Everything that `pip install -e .[dev]` names: dependencies, and the extras that dev pulls in."""
    extras = PROJECT["optional-dependencies"]
    found = [Requirement(line) for line in [*PROJECT["dependencies"], *extras["dev"]]]
    own = [r for r in found if r.name == PROJECT["name"]]
    pulled = [Requirement(line) for r in own for extra in r.extras for line in extras[extra]]
    return [r for r in found if r.name != PROJECT["name"]] + pulled


def test_versions_agree() -> None:
    assert compress.__version__ == version("compress-lm")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == compress.__version__


@pytest.mark.parametrize("requirement", sorted(direct(), key=str), ids=lambda r: r.name)
def test_constraints_pin_every_direct_dependency(requirement: Requirement) -> None:
    pinned = CONSTRAINTS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


def test_every_dependency_has_a_lower_bound() -> None:
    loose = [r.name for r in direct() if not any(s.operator == ">=" for s in r.specifier)]
    assert [name for name in loose if not name.startswith("types-")] == []


def test_importing_compress_is_light() -> None:
    code = (
        "import sys, compress; dir(compress); "
        "print(*sorted({'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", compress.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(compress, name)
    assert name.startswith("__") or value.__doc__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="squeeze"):
        compress.squeeze  # noqa: B018


def test_the_wheel_carries_recipes_and_templates(tmp_path: Path) -> None:
    # built from a copy: setuptools writes into the folder it builds
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "compress", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the package")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", *build, str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("compress_lm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert {name for name in files if name.startswith("compress/")} <= packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert not any(name.startswith(("tests", "benchmarks")) for name in packed)
