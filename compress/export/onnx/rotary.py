"""Heads in the order in which `GroupQueryAttention` can turn them.

The operator turns column i of a head with column i + n, for i < n, and takes only multiples of 8 for n. Where
a model turns fewer (10 in Pythia 2.8B), n becomes the next multiple, frequencies are filled up with zeros,
whose angles turn nothing, and columns are put in an order in which the old pairs still meet:

    first of the pairs, fill, second of the pairs, fill, rest

One order for queries and keys leaves every score what it was. It is given to the rows of their weights with
codes, scales and zero-points, to biases and to norms, so it costs nothing.
Limit: a head must be wide enough to fill up, as one is not whose every column is turned.
"""

from dataclasses import replace

import torch
from torch import Tensor

from compress.errors import UserError
from compress.export.onnx.architecture import Attention, Linear, Norm, Rotary

HEAD_STEP = 16  # what a head's width must be a multiple of
_STEP = 8  # what the number of pairs must be a multiple of


def arranged(attention: Attention) -> Attention:
    """The same attention with heads that the operator can turn. Raises UserError where there is no such."""
    order = column_order(attention)
    if order is None:
        return attention
    assert attention.rotary is not None
    frequencies = attention.rotary.frequencies
    filled = torch.zeros(_filled(len(frequencies)))
    filled[: len(frequencies)] = frequencies
    return replace(
        attention,
        query=_reordered(attention.query, order),
        key=_reordered(attention.key, order),
        query_norm=_reordered_norm(attention.query_norm, order),
        key_norm=_reordered_norm(attention.key_norm, order),
        rotary=Rotary(filled, attention.rotary.scaling),
    )


def column_order(attention: Attention) -> Tensor | None:
    """Which of a head's columns stands where, (head width,); None where they stay."""
    rotary, width = attention.rotary, attention.head_width
    if rotary is None or len(rotary.frequencies) == _filled(len(rotary.frequencies)):
        return None
    turned = len(rotary.frequencies)
    require_turnable(width, turned, rotary.scaling)
    columns = torch.arange(width)
    fill = _filled(turned) - turned
    first, second, rest = columns[:turned], columns[turned : 2 * turned], columns[2 * turned :]
    return torch.cat((first, rest[:fill], second, rest[fill:]))


def require_turnable(width: int, pairs: int, scaling: float = 1.0) -> None:
    """Raise UserError for heads that the operator cannot turn `pairs` pairs of, whatever the order."""
    filled = _filled(pairs)
    if 2 * filled > width or (filled != pairs and scaling != 1.0):
        raise UserError(
            f"export_onnx: heads {width} wide of which {2 * pairs} columns are turned are not supported; "
            f"ONNX Runtime turns multiples of {2 * _STEP}"
        )


def _filled(pairs: int) -> int:
    """How many pairs of columns the operator turns."""
    return -(-pairs // _STEP) * _STEP


def _every_head(order: Tensor, rows: int) -> Tensor:
    """The order of all heads' columns, (rows,)."""
    starts = torch.arange(0, rows, len(order))
    return (starts[:, None] + order).reshape(-1)


def _reordered(layer: Linear, order: Tensor) -> Linear:
    return layer.rows(layer.name, _every_head(order, layer.outputs))


def _reordered_norm(norm: Norm | None, order: Tensor) -> Norm | None:
    if norm is None:
        return None
    rows = _every_head(order, len(norm.weight))
    return replace(norm, weight=norm.weight[rows], bias=None if norm.bias is None else norm.bias[rows])
