"""Codes in the compressed-tensors layout, which stock `transformers` and vLLM read.

Each linear layer with codes becomes

    weight_packed      int32 (out, ceil(in * bits / 32)): the codes of a row as one stream of bits
    weight_scale       float16 (out, groups)
    weight_zero_point  int32 (ceil(out * bits / 32), groups), packed along the rows; absent when symmetric
    weight_shape       int64 (2,)

and stands for (q - z) * s as it does here: the codes are copied, nothing is rounded a second time. Scales
stay float16, which holds them exactly; bfloat16 would round every one of them.

What stock `transformers` 5.23 with compressed-tensors 0.20 cannot load is written otherwise, and said so:
embeddings in codes, and so a head tied to them, become float (one copy, still tied). A head of its own
keeps its codes. Zero-points load only with `dequantize` set and where all layers share one scheme; where
schemes differ, a zero-point is absorbed: q - z of b bits is a symmetric code of b + 1 bits, exactly.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.artifact.integrity import write_sums
from compress.errors import UserError
from compress.formats import Format, QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.packing import pack
from compress.models.checkpoints import meta_model, quiet_transformers, save_configurations
from compress.models.conv1d import StoredTransposed

FloatType = Literal["float16", "float32"]

_NAME = "export_compressed_tensors"
_LARGEST = 65504.0  # of float16
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # vLLM makes one layer of each


@dataclass(frozen=True, order=True)
class Scheme:
    """How the codes of a layer are stored; `group` 0 is a scale per row."""

    bits: int
    symmetric: bool
    group: int

    @property
    def arguments(self) -> dict[str, Any]:
        """`weights` of a group in the configuration."""
        size = {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False, **size}


def refusal(format: Format) -> str | None:
    """Why this layout cannot hold codes of a format, and what to do; None if it can."""
    if format.affine:
        return None
    return f"pack-quantized holds integer grids, not {format.kind}; use int4, or leave this export out"


def scheme_of(name: str, weight: QuantizedTensor) -> Scheme:
    """The scheme of a layer's codes. Raises UserError for no integer grid, and for groups that do not divide
    a row.
    """
    columns, form = weight.shape[1], weight.format
    reason = refusal(form)
    if reason is not None:
        raise UserError(f"{_NAME}: {name}: {reason}")
    if form.groups(columns) == 1:
        return Scheme(form.bits, form.symmetric, 0)
    reason = width_refusal(columns, form)
    if reason is not None:
        raise UserError(f"{_NAME}: {name} {reason}")
    return Scheme(form.bits, form.symmetric, form.group_width(columns))


def width_refusal(columns: int, format: Format) -> str | None:
    """Why this layout cannot hold rows so many columns wide, and what to do; None if it can."""
    width = format.group_width(columns)
    if format.groups(columns) == 1 or columns % width == 0:
        return None
    return (
        f"is {columns} wide, no multiple of its group of {width}, as compressed-tensors demands; quantize "
        "with a group that divides it, or group: null"
    )


def absorbed(scheme: Scheme) -> Scheme:
    """The symmetric scheme that holds q - z. Raises UserError beyond 8 bits."""
    if scheme.symmetric:
        return scheme
    if scheme.bits == 8:
        raise UserError(
            f"{_NAME}: transformers reads zero-points only where all layers share one format, and those of "
            "int8 cannot be absorbed into codes; set symmetric: true for int8"
        )
    return Scheme(scheme.bits + 1, True, scheme.group)


def packed_layer(weight: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that stand for a layer, without its name."""
    codes, grid = weight.unpacked(), weight.grid
    if scheme.symmetric and not weight.format.symmetric:
        width = weight.format.group_width(weight.shape[1])
        zeros = grid.zeros.repeat_interleave(width, dim=1)[:, : weight.shape[1]]
        # (q - z) + middle of the wider grid
        codes = (codes.to(torch.int16) - zeros + (1 << scheme.bits - 1)).to(torch.uint8)
    found = {
        "weight_packed": _words(codes, scheme.bits),
        "weight_scale": weight.scales.clone(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = _words(grid.zeros.T.contiguous(), scheme.bits).T.contiguous()
    return found


def write_checkpoint(bundle: Bundle, folder: Path, dtype: FloatType) -> dict[str, Any]:
    """Write configuration, tokenizer and weights into an empty `folder`; returns what was written.

    Raises UserError for layers that are no `torch.nn.Linear` in transformers or round their input, for
    formats and groups that the layout does not have, and for weights too large for float16.
    """
    coded = coded_linears(bundle.model)
    _require_linear(bundle.model, coded)
    own = {name: scheme_of(name, weight) for name, weight in coded.items()}
    # zero-points are read with one scheme for the whole model
    absorb = len(set(own.values())) > 1 and not all(scheme.symmetric for scheme in own.values())
    schemes = {name: absorbed(scheme) if absorb else scheme for name, scheme in own.items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with quiet_transformers():
        save_configurations(bundle.model, folder)
        bundle.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype
    if schemes:
        config["quantization_config"] = _quantization(bundle.model, schemes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    floats, change = _float_state(bundle.model, getattr(torch, dtype))
    state = dict(floats)
    for name, scheme in schemes.items():
        state |= {f"{name}.{key}": value for key, value in packed_layer(coded[name], scheme).items()}
    file = folder / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    write_sums(folder)
    tables = [f"{name}.weight" for name in _embeddings(bundle.model)]
    return {
        "dtype": dtype,
        "schemes": [
            {**scheme.arguments, "layers": sum(s == scheme for s in schemes.values())}
            for scheme in sorted(set(schemes.values()))
        ],
        "zero_points_absorbed": absorb,
        "embeddings_as_float": tables,
        "embedding_bytes": sum(floats[name].nbytes for name in tables),
        "largest_relative_change_of_floats": change,
        "file_bytes": file.stat().st_size,
        "vllm": vllm_objection(schemes, _head(bundle.model)),
    }


def coded_linears(model: nn.Module) -> dict[str, QuantizedTensor]:
    """The linear layers that keep their codes: all that hold some, but a head tied to the embedding."""
    tables = [m.quantized for m in model.modules() if isinstance(m, QuantizedEmbedding)]
    return {
        name: module.quantized
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and not any(module.quantized is table for table in tables)
    }


def vllm_objection(schemes: dict[str, Scheme], head: str | None = None) -> str | None:
    """Why vLLM cannot load layers of these schemes, as far as its rules are known; None if it can.

    `head` is the name of the layer that computes the logits.
    """
    for parts in FUSED:
        for name, scheme in schemes.items():
            block, _, leaf = name.rpartition(".")
            if leaf == parts[0] and any(schemes.get(f"{block}.{part}") != scheme for part in parts[1:]):
                return f"{', '.join(parts)} of {block} differ in format, and vLLM makes one layer of them"
    if any(scheme.bits not in (4, 8) for scheme in schemes.values()):
        return "has codes of other widths than 4 and 8 bits, for which only recent versions have kernels"
    if head in schemes:
        return f"has codes in {head}, which vLLM reads since March 2026 only (its pull request 37291)"
    return None


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n), uint8, as a stream of bits per row, in int32 (rows, ceil(n * bits / 32))."""
    stream = pack(codes, bits)
    padded = nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).view(len(codes), -1)


def _require_linear(model: Any, coded: dict[str, QuantizedTensor]) -> None:
    skeleton = meta_model(copy.deepcopy(model.config))
    for name in coded:
        if model.get_submodule(name).activations is not None:
            raise UserError(f"{_NAME}: {name} rounds its input, which is not written; leave this export out")
        require_linear(name, skeleton.get_submodule(name))


def require_linear(name: str, module: nn.Module) -> None:
    """Refuse a layer that transformers holds transposed: it is no `torch.nn.Linear` there.

    Raises:
        UserError: names the layer.
    """
    if isinstance(module, StoredTransposed):
        raise UserError(
            f"{_NAME}: {name} is stored transposed, and compressed-tensors reads torch.nn.Linear only; "
            "leave this export out"
        )


def _head(model: Any) -> str | None:
    """The name of the layer that computes the logits, None for a model without one."""
    module = model.get_output_embeddings()
    return next((name for name, found in model.named_modules() if found is module), None)


def _embeddings(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedEmbedding)]


def _quantization(model: nn.Module, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """`quantization_config`, one group per scheme."""
    found = sorted(set(schemes.values()))
    head = _head(model)
    ignored = [
        name
        for name, module in model.named_modules()
        if name not in schemes and (isinstance(module, nn.Linear) or name == head)
    ]
    groups = {}
    for number, scheme in enumerate(found):
        names = [name for name, own in schemes.items() if own == scheme]
        groups[f"group_{number}"] = {
            # vLLM's head is no Linear, so that one is named
            "targets": ["Linear", *(n for n in names if n == head)] if len(found) == 1 else names,
            "weights": scheme.arguments,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        # transformers makes room for packed zero-points only on this way
        "dequantize": not all(scheme.symmetric for scheme in found),
    }


def _float_state(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """Everything without codes and the embeddings, once each; and the largest relative change by rounding."""
    holders = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)
    )
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        if name.startswith(holders) and not name.endswith(".bias"):
            continue
        key = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0)
        if key not in seen:
            seen.add(key)
            state[name] = tensor
    for name in _embeddings(model):
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedEmbedding)
        state[f"{name}.weight"] = module.quantized.dequantize()
    largest = 0.0
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if dtype == torch.float16 and tensor.numel() and float(tensor.abs().max()) > _LARGEST:
            raise UserError(f"{_NAME}: {name} has values beyond float16; set dtype: float32")
        state[name] = tensor.detach().to(dtype, copy=True).contiguous()
        change = (state[name].float() - tensor).abs() / tensor.abs().clamp(min=2.0**-14)
        largest = max(largest, float(change.max()) if change.numel() else 0.0)
    return state, largest
