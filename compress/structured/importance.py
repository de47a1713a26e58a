"""What a unit is worth: scores by which the least important units of a block are taken away.

    magnitude   sqrt of the sum of w^2 over everything that goes with the unit
    activation  sum over its columns j of E[x_j^2] |W_:j|^2: what it adds to the reader's output, as if no
                other input went with it
    taylor      mean over positions of |sum_j x_j dL/dx_j|: first-order change of the loss without it
    kl          KL(model || model without it) on a few texts; neurons in groups of alike activation

The loss is the task's own, and so is what stands for KL where nothing is predicted (structured/probes.py).

Magnitude over a group: Fang et al. 2023 (arXiv 2301.12900). Activation: Sun et al. 2023 (Wanda, arXiv
2306.11695), summed over a column. Taylor: Molchanov et al. 2019 (arXiv 1906.10771), per head Michel et al.
2019 (arXiv 1905.10650). Scores are compared inside a block only. Cost: magnitude none; activation one forward
pass; taylor a forward and a backward pass without gradients of weights; kl a forward pass per head and per
group of neurons on `kl_windows` windows. (solvers/least_squares.py has the fifth, by reconstruction.)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.host.progress import track
from compress.models.layers import matrix
from compress.models.running import gradients_of_activations
from compress.structured.blocks import all_blocks
from compress.structured.probes import Text, answer, distance, loss
from compress.structured.structure import Part, Structure, Sublayer
from compress.tasks.registry import task_of

Importance = Literal["magnitude", "activation", "taylor", "kl", "reconstruction"]
_GROUPS = 8  # of neurons, for KL


def magnitude(model: Any, parts: tuple[Part, ...]) -> Tensor:
    """The L2 norm of all that goes with each unit, (units,)."""
    parameters = dict(model.named_parameters())
    total = torch.zeros(len(parts[0].entries))
    for part in parts:
        squares = parameters[part.parameter].detach().float().square().cpu()
        others = [axis for axis in range(squares.dim()) if axis != part.axis]
        per_entry = squares.sum(others) if others else squares  # (entries,)
        total += per_entry[part.entries].sum(1)
    return total.sqrt()


def activation(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """sum_j E[x_j^2] |W_:j|^2 of each unit, (units,); W (out, in), H (in, in), columns (units, width)."""
    return (hessian.diagonal() * weight.square().sum(0))[columns].sum(1)


def taylor(model: Any, texts: Sequence[Text], structure: Structure) -> tuple[dict[str, Tensor], Tensor]:
    """(reader -> scores (units,), scores of the stream's channels (width,)).

    Raises:
        UserError: the model has no loss.
    """
    scores = {s.reader: torch.zeros(s.units) for s in structure.sublayers}
    stream = torch.zeros(structure.width)

    def watch(x: Tensor, columns: Tensor, total: Tensor) -> None:
        kept = x.detach()

        def add(gradient: Tensor) -> None:
            change = (kept * gradient).flatten(0, -2).float()  # (positions, in)
            total.add_(change[:, columns].sum(2).abs().sum(0).cpu())

        x.register_hook(add)

    with ExitStack() as stack:
        stack.enter_context(gradients_of_activations(model))
        for sublayer in structure.sublayers:
            columns, total = sublayer.columns, scores[sublayer.reader]
            reader = model.get_submodule(sublayer.reader)
            hook = reader.register_forward_pre_hook(
                lambda module, inputs, columns=columns, total=total: watch(inputs[0], columns, total)
            )
            stack.callback(hook.remove)
        channels = torch.arange(structure.width)[:, None]
        for block in all_blocks(model):
            hook = block.register_forward_pre_hook(
                lambda module, inputs, keywords: watch(_hidden(inputs, keywords), channels, stream),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        with track(len(texts), "first-order importance", "texts") as bar:
            for text in texts:
                loss(model, text).backward()
                bar.advance()
    return scores, stream


@torch.no_grad()
def stream_activation(model: Any, windows: Tensor, width: int) -> Tensor:
    """E[h_j^2] of the blocks' inputs, each block's relative to its mean, summed over blocks; (width,)."""
    blocks = all_blocks(model)
    totals = torch.zeros(len(blocks), width)
    with ExitStack() as stack:
        for index, block in enumerate(blocks):

            def watch(module: nn.Module, inputs: Any, keywords: Any, index: int = index) -> None:
                hidden = _hidden(inputs, keywords).float().flatten(0, -2)
                totals[index] += hidden.square().sum(0).cpu()

            stack.callback(block.register_forward_pre_hook(watch, with_kwargs=True).remove)
        for rows in windows.split(4):
            task_of(model.config).answers(model, rows)
    return (totals / totals.mean(1, keepdim=True)).sum(0)


@torch.no_grad()
def kl(model: Any, texts: Sequence[Text], structure: Structure, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """Reader -> how far the answers are apart when a unit is masked out, (units,).

    Neurons are ranked by activation first and masked in groups of neighbours; a group's KL is shared out to
    them in proportion to activation, so that the groups are ranked by what was measured.
    """
    base = [answer(model, text) for text in texts]
    energies = _energies(model, texts, structure)
    wanted = [s for s in structure.sublayers if s.kind in kinds]
    scores = {}
    with track(len(wanted), "measuring KL", "sublayers") as bar:
        for sublayer in wanted:
            groups = _groups(sublayer, energies[sublayer.reader])
            score = torch.zeros(sublayer.units)
            for group in groups:
                with _masked(model, sublayer, group):
                    found = _mean_distance(model, texts, base)
                share = energies[sublayer.reader][group].clamp(min=1e-12)
                score[group] = found * share / share.sum()
            scores[sublayer.reader] = score
            bar.advance()
    return scores


def _energies(model: Any, texts: Sequence[Text], structure: Structure) -> dict[str, Tensor]:
    """`activation` of every sublayer of the unchanged model, from one forward pass."""
    squares: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for sublayer in structure.sublayers:

            def watch(module: nn.Module, inputs: Any, name: str = sublayer.reader) -> None:
                found = inputs[0].float().flatten(0, -2).square().mean(0).cpu()
                squares[name] = squares.get(name, 0) + found

            reader = model.get_submodule(sublayer.reader)
            stack.callback(reader.register_forward_pre_hook(watch).remove)
        for text in texts:
            model(**text.inputs)
    return {
        s.reader: (squares[s.reader] * matrix(model.get_submodule(s.reader)).square().sum(0).cpu())[
            s.columns
        ].sum(1)
        for s in structure.sublayers
    }


def _groups(sublayer: Sublayer, energies: Tensor) -> list[Tensor]:
    """Units that are masked together: heads alone, neurons with others of alike activation."""
    count = sublayer.units if sublayer.kind == "heads" else min(_GROUPS, sublayer.units)
    return list(energies.argsort(stable=True).tensor_split(count))


@contextmanager
def _masked(model: Any, sublayer: Sublayer, units: Tensor) -> Iterator[None]:
    """The model without some units."""
    reader = model.get_submodule(sublayer.reader)
    keep = torch.ones(sublayer.columns.numel())
    keep[sublayer.columns[units].flatten()] = 0
    keep = keep.to(reader.weight.device)
    hook = reader.register_forward_pre_hook(lambda module, inputs: (inputs[0] * keep, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _mean_distance(model: Any, texts: Sequence[Text], base: list[Tensor]) -> float:
    task = task_of(model.config)
    pairs = zip(texts, base, strict=True)
    return sum(distance(task, wanted, answer(model, text)) for text, wanted in pairs) / len(base)


def _hidden(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    return inputs[0] if inputs else keywords["hidden_states"]
