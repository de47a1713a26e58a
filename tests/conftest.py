"""What every test may ask for: a tiny model with its tokenizer, the data a pass gets, a recipe that runs."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# before torch is imported: in models this small, a second thread only waits for the first
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import training_set
import warm_workers
from hypothesis import Phase, settings

from compress.artifact.bundle import Bundle
from compress.context import Context

# the same examples every time, so that a change is judged and not the day's luck;
# `pytest --hypothesis-profile=explore` looks for new ones
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=3000, deadline=None)
# for mutants.py: a failure is all that is asked for, not the smallest one, and soon
settings.register_profile(
    "mutants",
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    database=None,
    max_examples=30,
)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _warm_workers() -> Iterator[None]:
    """Workers that are forked; see `cold_workers` for others."""
    if sys.platform != "linux":
        yield
        return
    warm = warm_workers.WarmWorkers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.measure.process.own_worker", warm.command)
        yield
    warm.close()


@pytest.fixture
def cold_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as users have them: fresh processes that import what they need."""
    fresh = (sys.executable, "-m", "compress.measure.worker")
    monkeypatch.setattr("compress.measure.process.own_worker", lambda: fresh)


@pytest.fixture(scope="session")
def _tiny() -> Bundle:
    return training_set.tiny_bundle()


@pytest.fixture
def bundle(_tiny: Bundle) -> Bundle:
    """A tied Llama of four blocks, random weights, a byte-level BPE; the test may change it."""
    return _tiny.clone()


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """`make_context(bundle, seed=1, workdir="w")`: what the pipeline would lend to a pass."""

    def make(bundle: Bundle, seed: int = 1, workdir: str = "work") -> Context:
        folder = tmp_path / workdir
        folder.mkdir(exist_ok=True)
        return training_set.tiny_context(bundle, folder, seed=seed)

    return make


@pytest.fixture
def recipe_dict(tmp_path: Path) -> dict[str, Any]:
    """The smallest recipe with a base, a child and a grandchild."""
    text = tmp_path / "text.txt"
    text.write_text("".join(d.text for d in training_set.documents()), encoding="utf-8")
    return {
        "name": "tiny",
        "model": {"create": training_set.TINY.model_dump()},
        "data": {"text": str(text), "window": 32, "evaluation_windows": 8, "calibration_windows": 8,
                 "heldout_windows": 4},
        "base": [{"train": {"tokens": 256, "batch": 4}}],
        "variants": {
            "pruned": [{"prune_magnitude": {"sparsity": 0.5}}],
            "pruned-int4": {"from": "pruned", "passes": [{"quantize_gptq": {"format": "int4"}}]},
        },
    }  # fmt: skip


@pytest.fixture
def page_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder, as README and docs suppose it: a model, also under `path/to/`, and a text."""
    import doc_pages

    whole = doc_pages.prepared(tmp_path_factory)
    (tmp_path / "path/to").mkdir(parents=True)
    for link in ("model", "path/to/model"):
        (tmp_path / link).symlink_to(whole / "model")
    (tmp_path / "my.txt").symlink_to(whole / "my.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The records of a real tiny run, made once; see `report_records.Records`."""
    import cli_helpers  # here, since they are only for those who ask
    import report_records

    return report_records.load(cli_helpers.built_once(tmp_path_factory, "report", report_records.make))


@pytest.fixture(scope="session")
def labelled_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real tiny runs that are judged by labels, made once; see `label_records`."""
    import cli_helpers
    import label_records

    return cli_helpers.built_once(tmp_path_factory, "labels", label_records.make)
