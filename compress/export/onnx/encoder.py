"""An encoder as one ONNX graph: BERT and its relatives, traced, with the codes it holds.

Inputs   input_ids, attention_mask int64 (batch, sequence), the mask 0 where a row is padded, on either side
         (see sides.py);
         token_type_ids where the model tells texts apart by them and its tokenizer gives them.
Outputs  logits (batch, sequence, vocabulary) of a masked-LM head, (batch, sequence, labels) of one for
         words, (batch, labels) of one for texts; start_logits, end_logits (batch, sequence) of one that finds
         answers; else last_hidden_state (batch, sequence, width).

Names and shapes are those of `optimum`. Matrices that are one in the model (a head tied to its embedding) are
one in the file.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compress.export.onnx.architecture import Linear
from compress.export.onnx.closed_heads import without_closed_heads
from compress.export.onnx.families.parts import linear
from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import Dimensions, GraphBuilder
from compress.export.onnx.sides import on_either_side
from compress.export.onnx.trace import Answer, trace
from compress.export.onnx.transcribe import transcribe
from compress.formats import QuantizedEmbedding, QuantizedLinear
from compress.formats.swap import tables
from compress.host.progress import track
from compress.models.layers import is_linear
from compress.tasks.base import Task
from compress.tasks.registry import task_of


def write_encoder(
    graph: GraphBuilder, model: Any, task: Task, inputs: list[str], forms: Forms
) -> tuple[list[Linear], bool, int]:
    """Trace `model` with the inputs named and describe it to `graph`; returns the layers the graph has,
    whether rows may be padded on the left, and how many closed heads were left out.

    Raises:
        UserError: torch cannot trace it; a group of codes that no kernel takes.
    """
    model, closed = without_closed_heads(model)
    shapes: dict[str, Dimensions] = dict.fromkeys(inputs, ("batch", "sequence"))
    forms = replace(forms, many_rows=True)
    with track(2, "writing the graph", "stages") as progress:
        answer, either = encoder_answer(model, inputs, task)
        traced = trace(model, shapes, task.outputs, answer)
        progress.advance()
        used = transcribe(graph, traced, layers(model), forms, shapes)
        progress.advance()
    return used, either, closed


def encoder_answer(model: Any, inputs: list[str], task: Task | None = None) -> tuple[Answer, bool]:
    """What is traced, and whether it takes rows padded on the left; `task`: of the model's, if not told."""
    task = task or task_of(model.config)

    def read(model: Any, given: Mapping[str, Tensor]) -> Tensor:
        return task.given(model(**given, return_dict=False))

    def answer(model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        found = way(model, given)
        return found.unbind(-1) if task.columns else (found,)

    way, either = on_either_side(model, read, inputs, pooled=task.pooled)
    return answer, either


def encoder_inputs(model: Any, tokenizer: Any) -> list[str]:
    """What the graph is to read."""
    types = int(getattr(model.config, "type_vocab_size", 0) or 0)
    told_apart = types > 1 and "token_type_ids" in tokenizer.model_input_names
    return ["input_ids", "attention_mask", *(["token_type_ids"] if told_apart else [])]


def layers(model: Any) -> dict[str, Linear]:
    """Every matrix by its module's name; one that is tied to another bears the name of the first of them."""
    first: dict[int, str] = {}
    held = tables(model)
    found: dict[str, Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) or is_linear(module):
            found[name] = linear(first.setdefault(_identity(module), name), module)
        elif name in held:
            quantized = isinstance(module, QuantizedEmbedding)
            weight = module.quantized if quantized else module.weight.detach()
            found[name] = Linear(first.setdefault(_identity(module), name), weight, None)
    return found


def _identity(module: nn.Module) -> int:
    """What tied matrices have in common."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        return id(module.quantized)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data_ptr()
