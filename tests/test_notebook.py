"""The notebook runs from top to bottom, and is committed without outputs."""

import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "demo.ipynb"

nbformat = pytest.importorskip("nbformat", reason="the extra 'notebook' is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra 'notebook' is not installed")
pytest.importorskip("ipykernel", reason="the extra 'notebook' is not installed")


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_is_thin_and_clean(notebook: Any) -> None:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert not any(line.startswith(("def ", "class ")) for cell in code for line in cell.source.splitlines())


# the kernel's own event loop, sockets and history warn at exit on some versions; not ours to mend
@pytest.mark.filterwarnings("default")
def test_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = {cell.id: cell for cell in notebook.cells}
    figure = cells["plot"].outputs[-1]["data"]["application/vnd.plotly.v1+json"]
    assert set(figure["data"][0]["text"]) >= {"pruned", "int4"}
    assert "quantize_gptq" in cells["lineage"].outputs[0]["text"]
