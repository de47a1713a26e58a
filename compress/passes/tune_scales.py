"""tune_scales: the codes stay, their scales and the norm gains learn from the original model's distribution.

After quantization every layer is as good as its own inputs allow; what is left is how the layers' errors add
up in the output. Codes frozen, forward KL from the recipe's base model is minimised over one number per group
of codes and the gains (and biases) of the norms, by plain gradients (training/codes/scales.py has the
equation, training/codes/tuning.py the loop). Not a byte is added: the scales stay float16, the zero-points as
they are; but for entropy-coded weights, whose equal scales were written as next to nothing and now take up to
16 / columns bits per weight. EfficientQAT (Chen et al. 2024, arXiv 2407.11062) trains scales with the text's
cross-entropy; the KL wanders less from the original at the few hundred thousand tokens that a CPU can afford.

The point kept is the one with the lowest KL on held-out windows, the start included: where nothing helps
the model comes back as it was and the notes say "no gain".

Cost per token: student forward and backward, teacher forward, 8 operations per parameter.
"""

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models.layers import is_linear, linear_layers, replace_module
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL
from compress.text.windows import TextData
from compress.training.codes.scales import digest_of_state, make_tunable
from compress.training.codes.tuning import Tuning, tune, units_of


class TuneScales(Pass, Tuning):
    """Tune scales and norm gains end to end, codes frozen."""

    kind: ClassVar[Kind] = "tune"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "calibration", "heldout", "teacher"})
    only_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    tasks: ClassVar[frozenset[Task]] = frozenset({CAUSAL})  # others have no next-token distribution

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks (and embeddings and norms besides)."""
        return linear_layers(model)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward, and the teacher's forward; as long as 5.5 operations per parameter and token
        take in the other passes, since no matrix is updated."""
        return 5.5 * parameters * self.tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Tune a copy; notes tell held-out KL before and after, tokens, seconds and the curve.

        Raises:
            UserError: the text does not fill one batch.
        """
        teacher = context.teacher().model
        result = bundle.clone()
        model = result.model
        digests = f"{digest_of_state(teacher)} {digest_of_state(model)}"
        places = {name: module for name, module in model.named_modules() if hasattr(module, "quantized")}
        tensors = make_tunable(model)
        vectors = [p for p in model.parameters() if p.ndim == 1 and self.vector_rate]  # gains and biases
        shifts = [tensor.shift for _, tensor in tensors.values()]
        if not shifts and not vectors:
            raise UserError(f"{self.name()}.vector_rate: 0 leaves nothing to tune in a model without codes")
        trained = {id(parameter) for parameter in (*shifts, *vectors)}
        wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in wanted:
            parameter.requires_grad_(id(parameter) in trained)
        model.to(context.device)
        teacher.to(context.device)
        _narrow(teacher, context.precision)
        notes = tune(
            model,
            teacher,
            [*shifts, *vectors],
            [*[None] * len(shifts), *units_of(vectors, self.vector_rate)],
            self,
            _text(context.data, self.batch * min(self.window, context.data.window)),
            context,
            digests=digests,
            what=self.name(),
        )
        model.cpu()
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        for quantized, tensor in tensors.values():
            quantized.scales = tensor.scales().to(torch.float16)
        for name, module in places.items():
            replace_module(model, name, module)
        notes["scales"] = sum(shift.numel() for shift in shifts)
        notes["vectors"] = sum(vector.numel() for vector in vectors)
        return result.evolve(exports={}, notes=notes)


def _text(data: TextData, step_tokens: int) -> NDArray[np.int32]:
    """The training text, or the calibration windows where it does not fill a step."""
    return data.train if len(data.train) >= 2 * step_tokens else data.calibration.text


def _narrow(teacher: nn.Module, precision: str) -> None:
    """Store the matrices as autocast would cast them at every step; the embedding stays float32."""
    if precision == "bfloat16":
        for module in teacher.modules():
            weight = module.weight if is_linear(module) else None
            if isinstance(weight, nn.Parameter):
                module.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
