"""llama.cpp's own quantizer through llama-cpp-python: GGUF to GGUF, no calibration text.

`BASE` is the folder beside which the GGUF that it was read from lies, as `base.gguf`.
"""

import ctypes

from common import Job

job = Job()
import llama_cpp  # noqa: E402

job.start()
target = job.artifact / "model.gguf"
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.settings['type']}")
parameters.allow_requantize = True
parameters.nthread = 2
source = job.base.parent / "base.gguf"
failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
assert failed == 0, f"llama_model_quantize: {failed}"
job.finish(0)  # the scorer, which reads GGUF, counts the linear layers' bytes
