"""llama.cpp's own quantizer through llama-cpp-python: GGUF to GGUF.

`BASE` is the folder beside which the GGUF that it was read from lies, as `base.gguf`. With the setting
`imatrix` the quantizer gets an importance matrix (`importance_matrix.py`) of the calibration windows,
computed here and now, so that its time and memory count.
"""

import ctypes

from common import Job

job = Job()
import llama_cpp  # noqa: E402

if job.settings.get("imatrix"):
    from importance_matrix import importance

job.start()
target = job.artifact / "model.gguf"
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.settings['type']}")
parameters.allow_requantize = True
parameters.nthread = 2
if job.settings.get("imatrix"):
    kept = importance(job.base, job.windows())  # held while pointers into it are in use
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # the last, all zero, ends the list
    for entry, (name, total) in zip(entries, kept.items(), strict=False):
        entry.name, entry.size = name.encode(), total.numel()
        entry.data = ctypes.cast(total.data_ptr(), ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = entries
source = job.base.parent / "base.gguf"
failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
assert failed == 0, f"llama_model_quantize: {failed}"
job.finish(0)  # the scorer, which reads GGUF, counts the linear layers' bytes
