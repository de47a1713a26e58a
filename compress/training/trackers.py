"""Curves sent elsewhere while a run trains: TensorBoard, MLflow, Weights & Biases, through accelerate.

None is required. Everything is kept below the run's folder, which needs no server: TensorBoard's events,
MLflow's database (unless MLFLOW_TRACKING_URI names another), W&B's offline runs (unless WANDB_MODE or
WANDB_API_KEY is set; `wandb sync` uploads them later).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from compress.errors import MissingExtra

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


def check(trackers: tuple[TrackerName, ...]) -> None:
    """Refuse a tracker whose package is absent.

    Raises:
        MissingExtra: names the command that installs it.
    """
    for name in trackers:
        if find_spec(name) is None:
            raise MissingExtra(name, name, f"trackers: '{name}'")


@contextmanager
def tracking(
    accelerator: Any, folder: Path, trackers: tuple[TrackerName, ...], settings: dict[str, Any]
) -> Iterator[None]:
    """Log into `folder` while the block runs.

    Args:
        accelerator: made with `log_with=trackers` and `project_dir=folder`.
        folder: of this training; its name is the run's.
        trackers: which of them.
        settings: the fields to show beside the curves.
    """
    if not trackers:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    local = {} if {"WANDB_MODE", "WANDB_API_KEY"} & os.environ.keys() else {"mode": "offline"}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "mlflow": {"run_name": folder.name, "logging_dir": str(folder)},
        "wandb": {"name": folder.name, "dir": str(folder), **local},
    }
    with _database(folder / "mlflow.db"):
        shown = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        accelerator.init_trackers("compress", config=shown, init_kwargs={n: options[n] for n in trackers})
        try:
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


@contextmanager
def _database(path: Path) -> Iterator[None]:
    """MLflow knows where to write from the environment only."""
    if "MLFLOW_TRACKING_URI" in os.environ:
        yield
        return
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{path.absolute()}"
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
