"""compress: a chain of passes, with the model's blocks in memory one at a time where every pass can."""

import json
from pathlib import Path

from common import Job, linear_bytes, weight_file_bytes

job = Job()
import numpy as np  # noqa: E402
import torch  # noqa: E402

from compress.artifact.bundle import Bundle  # noqa: E402
from compress.context import Context  # noqa: E402
from compress.models.running import native_precision  # noqa: E402
from compress.passes.base import Pass  # noqa: E402
from compress.run.registry import pass_class  # noqa: E402
from compress.text.windows import TextData, Windows, digest  # noqa: E402


def text() -> TextData:
    """The calibration windows, which are part of the text to tune on, and held-out windows beside them."""
    calibration, beside = job.windows().astype(np.int32), job.calibration.parent

    def windows(tokens: np.ndarray) -> Windows:
        return Windows(tokens, tokens.size, digest(tokens))

    train, heldout = np.load(beside / "train.npy"), windows(np.load(beside / "heldout.npy"))
    found = windows(calibration)
    return TextData("benchmark", calibration.shape[1], train, digest(train), heldout, found, heldout)


job.start()
chain: list[Pass] = [
    pass_class(name).model_validate(fields)
    for step in job.settings["passes"]
    for name, fields in step.items()
]
bundle = Bundle.load(job.base, stream=all(step.streams for step in chain))
context = Context(
    data=text(),
    teacher=lambda: Bundle.load(job.base),
    seed=job.settings.get("seed", 0),
    workdir=job.out / "work",
    device=torch.device("cpu"),
    threads=torch.get_num_threads(),
    precision=native_precision(),
)
notes = {}
for step in chain:
    context.workdir.mkdir(exist_ok=True)
    bundle = step(bundle, context)
    notes[step.name()] = dict(bundle.notes)
bundle.save(job.artifact)
job.finish(linear_bytes(job.artifact))
facts_file = Path(job.out / "facts.json")
facts = json.loads(facts_file.read_text())
whole = sum(p.stat().st_size for p in job.artifact.rglob("*") if p.is_file())
assert weight_file_bytes(job.artifact) <= whole
facts_file.write_text(json.dumps(facts | {"folder_bytes": whole, "notes": notes}, default=str))
