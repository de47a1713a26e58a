"""Which forms integer layers take in a graph; what each is, `linear.py` and `integers.py` tell."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress.export.architecture import Weight

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


def form_of(weight: Weight, forms: Forms) -> Literal["float", "blocks", "token", "tensor"]:
    """The form this weight takes."""
    if isinstance(weight, Tensor):
        return "float"
    if weight.format.bits == 8 and weight.scales.shape[1] == 1:
        return forms.int8
    return "blocks"
