"""round_activations: after the weights, round what flows into them to 8 bits, too.

    dynamic    per token, at run time (formats/activations.py)
    static     per tensor, range from calibration text; put `fold_scales` (SmoothQuant) before quantizing
    llm_int8   dynamic, columns beyond `threshold` stay float (Dettmers et al. 2022, arXiv 2208.07339)

An integer product runs faster than one that widens its codes; this pass shows what it costs in quality, in
torch, from the artifact. `export_onnx` writes static rounding of int8 layers as QDQ (export/onnx/static.py);
dynamic it does by itself, with `int8_form: token`. Head and embedding keep float inputs. Takes a pass over
the calibration text for `static`, nothing otherwise.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.formats import Activations, QuantizedLinear
from compress.formats.swap import coded_layers
from compress.host.progress import track
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass


class RoundActivations(Pass):
    """Eight-bit activations for the quantized linear layers."""

    kind: ClassVar[Kind] = "activations"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    only_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"activations"})

    mode: Literal["dynamic", "static", "llm_int8"] = Field("dynamic", description="how the grid is chosen")
    threshold: float = Field(6.0, gt=0, description="magnitude beyond which `llm_int8` keeps a column float")
    select: tuple[str, ...] = Field(("*",), min_length=1, description="wildcards of the layers to take")
    skip: tuple[str, ...] = Field((), description="wildcards of those to leave")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers of the blocks, with codes or before they have any."""
        return linear_layers(model, self.select, self.skip) + coded_layers(model, self.select, self.skip)

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Set the rule on every selected layer that holds codes.

        Raises:
            UserError: no selected layer holds codes.
        """
        result = bundle.clone()
        held = {
            name: cast(QuantizedLinear, result.model.get_submodule(name))
            for name in coded_layers(result.model, self.select, self.skip)
        }
        if not held:
            raise UserError(f"{self.name()}.select: {list(self.select)} matches no layer that holds codes")
        bounds: dict[str, Tensor] = {}
        if self.mode == "static":
            bounds = _ranges(
                result.model, list(held), torch.from_numpy(context.data.calibration.tokens).long()
            )
        rule = Activations(
            mode="static" if self.mode == "static" else "dynamic",
            outliers=self.threshold if self.mode == "llm_int8" else None,
        )
        for name, layer in held.items():
            layer.activations = rule
            layer.activation_bounds = bounds.get(name)
        return result.evolve(notes={"layers": len(held), "activations": rule.model_dump()})


@torch.no_grad()
def _ranges(model: Any, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """Smallest and largest input of each layer, (2,), over windows (n, length)."""
    found: dict[str, Tensor] = {}

    def looking(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = args[0].aminmax()
            old = found.get(name, torch.stack((low, high)))
            found[name] = torch.stack((torch.minimum(old[0], low), torch.maximum(old[1], high)))

        return look

    handles = [model.get_submodule(name).register_forward_pre_hook(looking(name)) for name in names]
    try:
        with track(len(windows), "calibrating activations", "windows") as progress:
            for window in windows:
                model(input_ids=window[None])
                progress.advance()
    finally:
        for handle in handles:
            handle.remove()
    return found
