"""What a pass is handed when it is called. Apart from the pipeline, since this code decides what comes out of
a pass as the pass itself does, and counts in every step's fingerprint.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.artifact.bundle import Bundle
from compress.context import Context, Original, lend
from compress.models.running import Precision
from compress.passes.base import Pass

if TYPE_CHECKING:
    from compress.text.windows import TextData


def load_and_lend(
    step: Pass,
    parent: Path,
    data: "TextData",
    teacher: Callable[[], Original],
    *,
    seed: int,
    workdir: Path,
    device: torch.device,
    precision: Precision,
    logs: Path,
) -> tuple[Bundle, Context]:
    """The bundle in the folder `parent` and the context, as a pass is called with them."""
    bundle = Bundle.load(parent, stream=step.streams and device.type == "cpu")
    return lend(
        step.kind, bundle, data, teacher,
        seed=seed, workdir=workdir, device=device, precision=precision, logs=logs,
    )  # fmt: skip
