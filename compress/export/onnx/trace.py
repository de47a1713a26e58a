"""The graph of an encoder or encoder-decoder with its matrices left out, traced by `torch.onnx.export`.

Method. In a copy of the model every linear layer and the token table are replaced by a node of their own,
`compress::Linear` or `compress::Embedding`, that knows only its layer's name: no weight of theirs, float or
dequantized, is copied or written. Attention becomes `MultiHeadAttention` as it is traced, with the model's
own mask as the bias that is added to the scores, so nothing has to be found again in a graph of single
operations. What the nodes stand for is filled in by `transcribe.py`, from the codes.

torch.export works on shapes alone, so the trace holds for any batch and length; a model that decides by its
input's values or size is refused by it.
Cost: seconds, most of them imports; memory of the float parameters that are left, norms and positions.
Limits: what `torch.export` can follow; needs the extra `encoders`.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import MissingExtra, UserError, reason
from compress.export.onnx.graph import MICROSOFT, OPSET, Dimensions
from compress.formats import QuantizedLinear
from compress.formats.swap import embedding_scale, tables
from compress.models.checkpoints import quiet_transformers
from compress.models.layers import is_linear

DOMAIN = "compress"
HOLDER = "model."  # what the tracer puts before the names of a model's own parameters
_EXAMPLE = {"batch": 2, "sequence": 7, "source": 5, "past": 3}  # traced with; unlike any other size

# by name; sizes that change by theirs; int64, or float32 if the last is fixed
Inputs = Mapping[str, Dimensions]
Answer = Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, ...]]  # in the order of the outputs' names


def require_tracer() -> None:
    """Raise MissingExtra, before any work, where the tracer's own dependency is absent."""
    if find_spec("onnxscript") is None:
        raise MissingExtra("onnxscript", "encoders", "export_onnx of an encoder")


class _Linear(nn.Module):
    """In the place of a linear layer: x (..., in) -> (..., out), by name."""

    def __init__(self, name: str, outputs: int) -> None:
        super().__init__()
        self.layer, self.outputs = name, outputs
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # models look here for a dtype
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.outputs)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Linear", (x,), {"layer": self.layer}, dtype=torch.float32, shape=shape, version=1
        )


class _Embedding(nn.Module):
    """In the place of a token table: ids (...) -> (..., width), by name."""

    def __init__(self, name: str, width: int, scale: float) -> None:
        super().__init__()
        self.layer, self.width, self.scale = name, width, scale
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        shape = (*ids.shape, self.width)
        rows = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Embedding", (ids,), {"layer": self.layer}, dtype=torch.float32, shape=shape, version=1
        )
        return rows if self.scale == 1.0 else rows * self.scale


class _Answer(nn.Module):
    """A model called with named tensors in a fixed order."""

    def __init__(self, model: nn.Module, inputs: Iterable[str], answer: Answer) -> None:
        super().__init__()
        self.model, self.inputs, self.answer = model, tuple(inputs), answer

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.answer(self.model, dict(zip(self.inputs, tensors, strict=True)))


def _first(model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (model(**given, return_dict=False)[0],)


def trace(
    model: Any, inputs: Inputs, outputs: Iterable[str], answer: Answer = _first, *, cached: bool = False
) -> Any:
    """The graph (onnx.ModelProto) from the inputs to `answer`, called with a model and tensors by name.

    With `cached`, attention reads keys and values as a cache holds them, (batch, heads, tokens, width), and
    they are not turned for every token; without, as a product gives them, (batch, tokens, heads * width).

    Raises:
        MissingExtra: `onnxscript` is not installed.
        UserError: torch cannot trace this model.
    """
    require_tracer()
    held = _Answer(without_matrices(model), inputs, answer).eval()
    example = tuple(_example(shape) for shape in inputs.values())
    axes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, size in enumerate(shape) if isinstance(size, str)}
        for shape in inputs.values()
    )
    try:
        with _quiet(), torch.no_grad(), _FusedAttention(cached):
            program = torch.onnx.export(
                held,
                example,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(axes,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the tracer raises errors of many kinds
        cause = error.__cause__ or error
        raise UserError(
            f"export_onnx: torch cannot trace a {type(model).__name__} ({reason(cause)}); "
            "leave export_onnx out of the recipe to have it in torch only"
        ) from error
    assert program is not None
    return program.model_proto


def _example(shape: Dimensions) -> Tensor:
    sizes = [_EXAMPLE[size] if isinstance(size, str) else size for size in shape]
    return torch.ones(sizes, dtype=torch.int64 if isinstance(shape[-1], str) else torch.float32)


def without_matrices(model: nn.Module) -> nn.Module:
    """A copy in which every linear layer and the token table are nodes that know their names."""
    held = tables(model)
    stand_ins: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) or is_linear(module):
            stand_ins[id(module)] = _Linear(name, int(module.out_features))
        elif name in held:
            stand_ins[id(module)] = _Embedding(name, int(module.embedding_dim), embedding_scale(module))
    return copy.deepcopy(model, stand_ins)  # what is in the memo counts as copied


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the tracer says of itself: deprecations, and packages that it could use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _FusedAttention(TorchFunctionMode):
    """Within it, scaled dot-product attention is one node of ONNX Runtime's own."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached = cached

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What torch asks before each of its functions."""
        given = dict(kwargs or {})
        if function is not torch.nn.functional.scaled_dot_product_attention or given.get("enable_gqa"):
            return function(*args, **given)
        return _attention(*args, **given, cached=self.cached)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    cached: bool,
) -> Tensor:
    """query, key, value (batch, heads, tokens, width) -> (batch, heads, tokens, width)."""
    batch, heads, length, width = query.shape
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # True where a token is seen
        lowest = torch.finfo(query.dtype).min
        attn_mask = torch.where(attn_mask, torch.tensor(0.0), torch.tensor(lowest))
    past = (key, value) if cached else (_side_by_side(key), _side_by_side(value))
    mixed = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MultiHeadAttention",
        (_side_by_side(query), *past, None, None, attn_mask),
        {
            "num_heads": int(heads),
            "scale": float(width**-0.5 if scale is None else scale),
            "unidirectional": int(is_causal),
        },
        dtype=query.dtype,
        shape=(batch, length, heads * value.shape[3]),
        version=1,
    )
    return mixed.unflatten(2, (heads, value.shape[3])).transpose(1, 2)


def _side_by_side(x: Tensor) -> Tensor:
    """(batch, heads, tokens, width) -> (batch, tokens, heads * width)."""
    return x.transpose(1, 2).flatten(2)
