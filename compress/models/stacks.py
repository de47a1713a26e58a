"""A model's lists of blocks, and what each block is called with.

A decoder or an encoder is one list. An encoder-decoder is two: the blocks of its decoder are called with what
the encoder made of the source, so they are reached only when its own blocks have run.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.blocks import Arguments, replaced_forward
from compress.tasks.registry import task_of
from compress.tasks.seq2seq import halves, shifted, start_token


@dataclass
class Stack:
    """A list of blocks, one feeding the next.

    Attributes:
        prefix: its name in the model.
        blocks: the modules.
        reach: runs the part of the model that holds them on windows (batch, length) and, of a decoder with
            an encoder, on what that made of them; its first output is what comes after the last block.
        more: how many values a block gives besides its output, for the next ones to be called with; found
            out by running the blocks. None: no more, and they need not be run, or be in memory, to know it.
        wrapped: whether a block's output is a tuple even so, as GPT-J's; found out by what the next one gets.
        blank: how many values such a tuple has besides that mean nothing, as DeBERTa's, whose scores were not
            asked for; found out by what the model takes apart.
    """

    prefix: str
    blocks: nn.ModuleList
    reach: Callable[[Tensor, Tensor | None], Any]
    more: int | None = None
    wrapped: bool = False
    blank: int = 0

    def inputs(
        self, batches: Sequence[Tensor], encoded: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Arguments]]:
        """Inputs of the first block, and what every block is called with: per block, per batch.

        Every block passes on what it was given.

        Raises:
            UserError: the model does something between its blocks.
        """
        while True:
            try:
                return self._inputs(batches, encoded)
            except _Unwrapped:
                self.wrapped = True
            except ValueError:  # the model takes apart what it believes to be a tuple
                if self.more is not None or self.blank == _MOST_BLANK:
                    raise
                self.wrapped, self.blank = True, self.blank + 1

    def _inputs(
        self, batches: Sequence[Tensor], encoded: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], list[Arguments]]:
        inputs: list[Tensor] = []
        calls: list[Arguments] = [[] for _ in self.blocks]

        def passing(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    inputs.append(hidden_states.clone())  # written over later, whoever else holds it
                elif hidden_states.dim() < inputs[-1].dim():
                    raise _Unwrapped
                elif not torch.allclose(hidden_states, inputs[-1], rtol=0, atol=0, equal_nan=True):
                    raise UserError(
                        f"{self.prefix}.{index}: something is done between the blocks, so they are not run "
                        "one by one here; take a pass without calibration"
                    )
                calls[index].append((args, kwargs))
                output = None if self.more is None else own(hidden_states, *args, **kwargs)
                if not isinstance(output, tuple):
                    return (hidden_states, *[None] * self.blank) if self.wrapped else hidden_states
                self.more = len(output) - 1
                return hidden_states, *output[1:]

            return forward

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, passing(index, block.forward)))
            for index, tokens in enumerate(batches):
                self.reach(tokens, None if encoded is None else encoded[index])
        return inputs, calls

    def after(self, batches: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """What the model makes of the last block's outputs, batch by batch: a norm of it, or the same.

        For an encoder whose `inputs` have been asked for.
        """

        def given(output: Tensor) -> Callable[..., Any]:
            return lambda *_, **__: (
                (output, *[None] * (self.more or self.blank)) if self.more or self.wrapped else output
            )

        found = []
        for tokens, output in zip(batches, outputs, strict=True):
            with ExitStack() as stack:
                for block in self.blocks:
                    stack.enter_context(replaced_forward(block, given(output)))
                found.append(self.reach(tokens, None)[0].clone())
        return found


_MOST_BLANK = 2


class _Unwrapped(Exception):
    """The model took the first row of an output for the first of a tuple."""


def stacks(model: Any) -> list[Stack]:
    """The model's only list of blocks, or an encoder's and then its decoder's.

    Raises:
        UserError: the model has none, or an encoder-decoder has another number of them than two.
    """
    if task_of(model.config).stacks == 1:
        return [only_stack(model)]
    prefixes = block_lists(model)
    if len(prefixes) != 2:
        found = ", ".join(prefixes) or "none"
        raise UserError(
            f"{type(model).__name__}: should have one list of blocks in its encoder and one in its decoder, "
            f"but has {found}; this architecture is not supported"
        )
    first, second = ((prefix[:-1], model.get_submodule(prefix[:-1])) for prefix in prefixes)
    encoder, decoder = model.get_encoder(), model.get_decoder()

    def read(windows: Tensor, _: Tensor | None) -> Any:
        return encoder(input_ids=halves(windows.to(_device(model)))[0])

    def write(windows: Tensor, encoded: Tensor | None) -> Any:
        text = shifted(halves(windows.to(_device(model)))[1], start_token(model))
        return decoder(input_ids=text, encoder_hidden_states=encoded, use_cache=False)

    return [Stack(*first, read, more=0), Stack(*second, write, more=0)]


def only_stack(model: Any) -> Stack:
    """The list of blocks of a decoder or an encoder.

    Raises:
        UserError: the model has none, or has two.
    """
    backbone = getattr(model, "model", None) or getattr(model, model.base_model_prefix, model)
    options = task_of(model.config).options

    def whole(windows: Tensor, _: Tensor | None) -> Any:
        return backbone(input_ids=windows.to(_device(model)), **options)

    return Stack(*decoder_blocks(model), whole)


def not_walked(model: Any) -> str | None:
    """Why a model's blocks cannot be run one by one on the text that comes to them; None if they can."""
    if model.config.model_type == "rwkv":  # each passes its state on beside the text
        return "the blocks of 'rwkv' are not run one by one here"
    try:
        stacks(model)
    except UserError as error:
        return str(error)
    if model.config.model_type == "deberta-v2" and getattr(model.config, "conv_kernel_size", 0) > 0:
        return "conv_kernel_size: a convolution between blocks, so that they are not run one by one here"
    return None


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks: the first ModuleList as long as `num_hidden_layers`.

    Raises:
        UserError: the model has none, or has two.
    """
    if task_of(model.config).stacks == 2:
        raise UserError(f"{type(model).__name__}: an encoder-decoder has two lists of blocks, not one")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = _text_part(model)
    for name, module in model.named_modules():
        if name.startswith(inside) and isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(
        f"{type(model).__name__}: has no list of {count} blocks; this architecture is not supported"
    )


def block_names(model: nn.Module) -> list[str]:
    """Names of the decoder or encoder blocks, an encoder-decoder's encoder first."""
    return [
        f"{prefix}{index}"
        for prefix in block_lists(model)
        for index, _ in enumerate(model.get_submodule(prefix[:-1]).children())
    ]


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of everything in the model's outermost lists of modules, an encoder's first;
    of a model that also sees pictures, those of the part that reads text."""
    found: list[str] = []
    inside = _text_part(model)
    for name, module in model.named_modules():
        if not name.startswith(inside):
            continue
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(found)):
            found.append(f"{name}.")
    return tuple(found)


def _text_part(model: Any) -> str:
    """What the names of the part that reads text begin with: nothing, where that is the whole model."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config or not hasattr(model, "get_decoder"):
        return ""
    text = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is text and name), "")


def _device(model: Any) -> Any:
    """Where the token table is now: weights may be in files between two calls."""
    return model.get_input_embeddings().weight.device
