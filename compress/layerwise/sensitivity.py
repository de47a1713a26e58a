"""How much each tensor's rounding costs, measured at the model's output.

For one layer at a time: round it alone, run the rest of the model from its block on, and compare what comes
out with the original:

    loss = mean over positions of KL(p_original || p_rounded)        (models with a vocabulary)
    loss = mean over positions of 1 - cos(h_original, h_rounded)     (encoders without)

Every layer is measured at one width, where its loss stands well above the noise of the arithmetic, rounded by
GPTQ under the second moments H of its inputs. To other widths the loss is extended by the layer's output
error, tr(D H D^T) with D = W - W^, which it is proportional to as long as errors are small (second order in
D); that error is computed by GPTQ on a sample of rows. Embedding and head, whose errors enter in two places,
are measured at every width.

In bfloat16 any change, however small, lets all later roundings fall differently, which has a loss of its own
(1e-4 to 3e-4 nats in a 30-block model, as much as a whole layer in 4 bits). So the error is magnified,
W - a D in place of W - D with the loss divided by a^2, and the loss of a change that means nothing is
measured per block and subtracted.

That losses of several layers add up, is an assumption, too: exact to second order for independent errors.

Cost: per layer half a forward pass of the measured tokens on average, and the head on every `stride`-th.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.walk import walk
from compress.formats import Format, QuantizedTensor
from compress.models.blocks import call, replaced_forward
from compress.models.layers import matrix
from compress.models.running import Precision
from compress.models.stacks import only_stack
from compress.solvers.gptq import Factor, factorise, gptq

_MAGNIFIED = 2.0  # a
_MEANINGLESS = 1e-4  # relative change of weights: far below the rounding of any format
_LEAST = 0.1  # of the noise: what a loss that drowns in it is taken for
_TOGETHER = 4  # windows per forward pass
_SAMPLED_ROWS = 64  # per layer, for the errors at the other widths


class Probe:
    """The original model's outputs on some text, and how far a changed model is from them.

    Args:
        model: in float and eval mode; may be changed between the calls.
        windows: token ids (n, length).
        precision: of the blocks.
        stride: every so many positions the outputs are compared.
    """

    @torch.no_grad()
    def __init__(self, model: Any, windows: Tensor, precision: Precision, stride: int = 4) -> None:
        self.model, self.precision, self.stride = model, precision, stride
        self.stack = only_stack(model)
        self.blocks = self.stack.blocks
        self.batches = list(windows.split(_TOGETHER))  # bfloat16 weights are made anew for every batch
        self.hidden, self.arguments = self.stack.inputs(self.batches)
        self.at = 0
        self.has_logits = False  # known once the model has run
        self.original = [self._output(index, h) for index, h in enumerate(self.hidden)]

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Go on to the inputs of a block, through the model as it is."""
        for number in range(self.at, block):
            self.hidden = [self._through(number, index, h) for index, h in enumerate(self.hidden)]
        self.at = max(self.at, block)

    @torch.no_grad()
    def loss(self) -> float:
        """With whatever has been changed in the block advanced to, or after it."""
        return self._mean(self.hidden)

    @torch.no_grad()
    def whole_loss(self) -> float:
        """With whatever has been changed, embeddings included; only before the first `advance`."""
        assert self.at == 0
        return self._mean(self.stack.inputs(self.batches)[0])

    @torch.no_grad()
    def noise(self, module: nn.Module, *, whole: bool = False) -> float:
        """The loss of a change to `module` that means nothing: that of the arithmetic; 0 in float32."""
        if self.precision == "float32":
            return 0.0
        weight = matrix(module)
        generator = torch.Generator(weight.device).manual_seed(0)
        change = torch.randn(weight.shape, generator=generator, device=weight.device)
        with replaced_weight(module, weight * (1 + _MEANINGLESS * change)):
            return self.whole_loss() if whole else self.loss()

    def _mean(self, hidden: list[Tensor]) -> float:
        losses = [self._distance(index, self._output(index, h)) * len(h) for index, h in enumerate(hidden)]
        return sum(losses) / sum(len(h) for h in hidden)

    def _through(self, number: int, index: int, hidden: Tensor) -> Tensor:
        return call(self.blocks[number], hidden, self.arguments[number][index], self.precision)

    def _output(self, index: int, hidden: Tensor) -> Tensor:
        """What the model gives for a batch whose hidden state before block `at` is known: (positions, n)."""
        for number in range(self.at, len(self.blocks)):
            hidden = self._through(number, index, hidden)
        scored = hidden[:, :: self.stride]
        tokens = self.batches[index][:, :: self.stride].to(hidden.device)
        with ExitStack() as stack:  # norm and head, wherever they are: the model, its blocks passed by
            for block in self.blocks:
                stack.enter_context(replaced_forward(block, lambda *_, **__: scored))
            output = self.model(input_ids=tokens)
        logits = output.get("logits", output.get("prediction_logits"))
        self.has_logits = logits is not None
        if logits is not None:
            return torch.log_softmax(logits.float(), -1).flatten(0, 1)
        return torch.nn.functional.normalize(output.last_hidden_state.float(), dim=-1).flatten(0, 1)

    def _distance(self, index: int, output: Tensor) -> float:
        before = self.original[index]
        if self.has_logits:
            gap = before - output
            # p (d + e^-d - 1) sums to the same, and no term is a small difference of large ones
            return float((before.exp() * (gap + torch.expm1(-gap))).sum(-1).mean())
        return float(1 - (before * output).sum(-1).mean())


def layer_losses(
    model: Any,
    names: list[str],
    formats: Sequence[Format],
    measured: Format,
    probe: Probe,
    windows: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    damping: float = 0.01,
    batch: int | None = None,
    precision: Precision = "float32",
) -> dict[str, list[float]]:
    """The loss that each layer alone causes in each format.

    Args:
        model: in float; it comes back as it was.
        names: full names of linear layers inside the blocks.
        formats: to predict for.
        measured: the format in which the loss is measured.
        probe: made of the same model.
        windows: calibration token ids (n, length) for the second moments.
        masks: module name -> bool (out, in); False stays exactly zero.
        damping: as for `quantize_sequentially`; `batch` and `precision`, too.
    """
    losses: dict[str, list[float]] = {}
    masks = masks or {}
    noise: dict[int, float] = {}  # per block
    visits = walk(model, windows, names, batch=batch, precision=precision, what="measuring")
    for visit in visits:
        probe.advance(visit.block)
        hessian = visit.covariance.hessian / visit.covariance.count
        factor = factorise(hessian, damping)
        parts = [(name, matrix(model.get_submodule(name)), masks.get(name)) for name in visit.names]
        rounded = _rounded([(w, m) for _, w, m in parts], measured, hessian, factor)
        samples = [(w[:: _step(w)], None if m is None else m[:: _step(w)]) for _, w, m in parts]
        errors = {format: _errors(samples, format, hessian, factor) for format in {*formats, measured}}
        if visit.block not in noise:
            noise[visit.block] = probe.noise(model.get_submodule(visit.names[0]))
        for place, ((name, weight, _), values) in enumerate(zip(parts, rounded, strict=True)):
            with replaced_weight(model.get_submodule(name), weight + _MAGNIFIED * (values - weight)):
                loss = _above(probe.loss(), noise[visit.block]) / _MAGNIFIED**2
            unit = max(errors[measured][place], 1e-30)
            losses[name] = [loss * errors[format][place] / unit for format in formats]
    return losses


def embedding_losses(model: Any, formats: Sequence[Format], probe: Probe) -> list[float]:
    """The loss that embedding and head, rounded together, cause in each format; tied ones stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding]
    if head is not None and head.weight is not embedding.weight:
        modules.append(head)
    losses = []
    noise = probe.noise(embedding, whole=True)
    for format in formats:
        with ExitStack() as stack:
            for module in modules:
                values = QuantizedTensor.round(format, matrix(module)).dequantize()
                stack.enter_context(replaced_weight(module, values))
            losses.append(_above(probe.whole_loss(), noise))
    return losses


def _above(loss: float, noise: float) -> float:
    return max(loss - noise, _LEAST * noise, 0.0)


@contextmanager
def replaced_weight(module: nn.Module, values: Tensor) -> Iterator[None]:
    """Let a layer have other weights (out, in) while the block runs; whoever shares them has them, too."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    before = weight.data
    if values.stride() != before.stride():  # what order a product reads its weight in decides its last bits
        values = torch.empty_like(before).copy_(values)
    weight.data = values.to(before.dtype)
    try:
        yield
    finally:
        weight.data = before


_Part = tuple[Tensor, Tensor | None]  # a weight (out, in) and its mask


def _rounded(parts: list[_Part], format: Format, hessian: Tensor, factor: Factor) -> list[Tensor]:
    """Layers that share an input, rounded by GPTQ together."""
    weight = torch.cat([w for w, _ in parts])
    mask = None
    if any(m is not None for _, m in parts):
        mask = torch.cat([torch.ones_like(w, dtype=torch.bool) if m is None else m for w, m in parts])
    grid = format.fit(weight, hessian.diagonal())
    values = gptq(weight, factor, format.column_rounder(grid, weight.shape[1]), mask)
    return list(values.split([len(w) for w, _ in parts]))


def _errors(parts: list[_Part], format: Format, hessian: Tensor, factor: Factor) -> list[float]:
    """tr(D H D^T) of each layer."""
    found = []
    for (weight, _), values in zip(parts, _rounded(parts, format, hessian, factor), strict=True):
        difference = weight - values
        found.append(float(((difference @ hessian) * difference).sum()))
    return found


def _step(weight: Tensor) -> int:
    return max(1, len(weight) // _SAMPLED_ROWS)
