"""compress: a chain of passes, with the model's blocks in memory one at a time where every pass can."""

import json
import os
import tempfile
from pathlib import Path

from common import Job, linear_bytes, peak_rss_bytes, weight_file_bytes

job = Job()
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every tool computes on the CPU
import numpy as np  # noqa: E402

from compress import TextData, load, pass_class  # noqa: E402

job.start()
chain = [
    pass_class(name).model_validate(fields)
    for step in job.settings["passes"]
    for name, fields in step.items()
]
beside = job.calibration.parent
text = TextData.of_tokens(
    job.windows().shape[1],
    train=np.load(beside / "train.npy"),  # the calibration windows are part of it
    heldout=np.load(beside / "heldout.npy"),
    calibration=job.windows(),
    source="benchmark",
)
tempfile.tempdir = str(job.out)  # what passes put aside, up to a whole model
bundle = load(job.base, stream=all(step.streams for step in chain))
notes, peaks = {}, []
for step in chain:
    peaks.append(peak_rss_bytes())  # a pass begins a new peak
    bundle = bundle.apply(step, text=text, seed=job.settings.get("seed", 0))
    notes[step.name()] = dict(bundle.notes)
bundle.save(job.artifact)
job.finish(linear_bytes(job.artifact), peak=max(peaks))
facts_file = Path(job.out / "facts.json")
facts = json.loads(facts_file.read_text())
whole = sum(p.stat().st_size for p in job.artifact.rglob("*") if p.is_file())
assert weight_file_bytes(job.artifact) <= whole
facts_file.write_text(json.dumps(facts | {"folder_bytes": whole, "notes": notes}, default=str))
