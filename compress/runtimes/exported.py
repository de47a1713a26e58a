"""Which runtime each export is for, and whether it is installed; imports none of them."""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Exported:
    """Where an export is measured.

    Attributes:
        runtime: one of `compress.runtimes.RUNTIMES`.
        file: what it opens in the export's folder; empty: the folder.
        module: of Python, which must be there.
        package: that holds it.
    """

    runtime: str
    file: str = ""
    module: str = ""
    package: str = ""

    @property
    def installed(self) -> bool:
        """Whether the runtime is there."""
        return not self.module or find_spec(self.module) is not None


EXPORTED = {  # by the folder that an export leaves in an artifact
    "onnx": Exported("onnxruntime"),
    "gguf": Exported("llama.cpp", "model.gguf", "llama_cpp", "llama-cpp-python"),
    "compressed-tensors": Exported("transformers", "", "compressed_tensors", "compressed-tensors"),
}
