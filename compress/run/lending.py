"""What a pass is handed when it is called. Apart from the pipeline, since this code decides what comes out of
a pass as the pass itself does, and counts in every step's fingerprint.
"""

from pathlib import Path

import torch

from compress.artifact.bundle import Bundle
from compress.passes.base import Pass


def parent_of(step: Pass, folder: Path, device: torch.device) -> Bundle:
    """The bundle in a folder as a pass takes it: its weights left on disk where the pass streams."""
    return Bundle.load(folder, stream=step.streams and device.type == "cpu")
