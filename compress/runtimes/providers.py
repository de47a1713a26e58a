"""What runs the operators of an ONNX graph: ONNX Runtime's execution providers, by short names.

One build of ONNX Runtime has a few of them; another package brings others, in place of the first. Operators
that a provider lacks run on the CPU. The graphs written here are float32, with attention as one operator, for
which CUDA has kernels in 16 bits only: there the matrix products move, and attention stays on the CPU, as
does the key-value cache with every provider. Where copies between the two cost more than that gains, the CPU
alone is faster: measure.
"""

from typing import Literal

from compress.errors import UserError, nearest

Provider = Literal["cpu", "cuda", "openvino", "coreml"]

# short name -> (ONNX Runtime's, how to get it)
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "pip install onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "pip uninstall onnxruntime, then pip install onnxruntime-gpu"),
    "openvino": (
        "OpenVINOExecutionProvider",
        "pip uninstall onnxruntime, then pip install onnxruntime-openvino",
    ),
    "coreml": ("CoreMLExecutionProvider", "pip install onnxruntime, on macOS"),
}


def require_provider(name: str) -> str:
    """ONNX Runtime's name of a provider that is present.

    Raises:
        UserError: an unknown one, or one that this installation lacks; names the package and what is there.
    """
    import onnxruntime

    if name not in _PROVIDERS:
        raise UserError(f"provider: '{name}' is unknown; {nearest(name, _PROVIDERS)}")
    full, remedy = _PROVIDERS[name]
    if full not in onnxruntime.get_available_providers():
        present = ", ".join(present_providers())
        raise UserError(f"provider: '{name}' is not in this ONNX Runtime, which has {present}; {remedy}")
    return full


def present_providers() -> list[str]:
    """Short names of the providers that can be asked for here."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name, (full, _) in _PROVIDERS.items() if full in available]


def missing_providers() -> dict[str, str]:
    """Short name -> how to get it, of the others."""
    present = present_providers()
    return {name: remedy for name, (_, remedy) in _PROVIDERS.items() if name not in present}
