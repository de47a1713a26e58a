"""Which forms integer layers take in a graph; what each is, `linear.py`, `integers.py`, `static.py` tell."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress.export.onnx.architecture import Linear
from compress.formats import QuantizedTensor

Int8Form = Literal["token", "tensor", "blocks"]
ActivationBits = Literal[7, 8]
Processor = Literal["any", "vnni"]


@dataclass(frozen=True)
class Forms:
    """The choices for one graph.

    Attributes:
        int8: of matrices of 8-bit codes with one scale per row.
        activation_bits: of the forms token and tensor.
        accuracy_level: of the form blocks.
        processor: that the graph is for.
        many_rows: what goes through at once has many, as in an encoder.
    """

    int8: Int8Form = "blocks"
    activation_bits: ActivationBits = 7
    accuracy_level: int = 4
    processor: Processor = "any"
    many_rows: bool = False

    @property
    def signed(self) -> bool:
        """Whether the forms token and tensor store signed codes: where those are exact, they are fastest."""
        return self.activation_bits == 7 or self.processor == "vnni"


def per_row(weight: QuantizedTensor) -> bool:
    """Whether a matrix holds 8-bit codes with one scale per row, which integer products take."""
    return weight.format.bits == 8 and weight.scales.shape[1] == 1


def form_of(layer: Linear, forms: Forms) -> Literal["float", "blocks", "token", "tensor", "static"]:
    """The form this layer takes."""
    weight = layer.weight
    if isinstance(weight, Tensor):
        return "float"
    if layer.bounds is not None:
        return "static"
    return forms.int8 if per_row(weight) else "blocks"
