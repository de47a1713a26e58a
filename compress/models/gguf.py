"""What a GGUF file says of its model, taken as llama.cpp takes it, or refused by name.

transformers reads the tensors and most sizes. What it passes over in silence is added to its configuration:
biases, which only the tensors tell of; the factors of scaled positions, which are a tensor; linear scaling,
widths of heads and experts, which are metadata. After that every key of the architecture is either read, or
says what the configuration says anyway, or does nothing (`_NEUTRAL`), and every tensor has a place; else the
file is refused, with the key or the tensor.

Factors f of positions, (head width / 2,), divide plain frequencies. Llama 3 states four numbers instead:
1 / f = (1 - s) / factor + s with s = (original / wavelength - low) / (high - low), cut to [0, 1]. They are
found again by trying those that Llama 3 was published with, then by solving for s; what gives the factors
to 1e-5 is taken. `low` can be 1 without loss, since only ratios to it matter.

Limits: scaling of positions by YaRN or LongRoPE, windows of attention outside Gemma, heads that differ from
block to block, and adapters are refused.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import UserError

_ROPE_FACTORS = "rope_freqs.weight"
_CLOSE = 1e-5
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # key of an architecture -> the values that ask for nothing
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.type": ("none", "linear"),
}
_SAYS_NOTHING = frozenset(
    {"context_length", "vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
)
_SCALING = ("rope.scaling.factor", "rope.scale_linear")  # the latter is older files' name
_FIELDS = {  # key -> field of a configuration that has it, which transformers does not set from the file
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def head_width(config: Any) -> int:
    """Of one head, as transformers takes it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_DERIVED: dict[str, Callable[[Any], Any]] = {  # key -> what a configuration says of it
    "attention.key_length": head_width,
    "attention.value_length": head_width,
    "rope.dimension_count": lambda config: int(
        head_width(config) * _rotary(config).get("partial_rotary_factor", 1.0)
    ),
    "rope.freq_base": lambda config: _rotary(config).get("rope_theta"),
}


def as_llama_cpp(file: Path, config: Any) -> Any:
    """The configuration that transformers made of a GGUF file, with what else the file says of the model.

    Raises:
        UserError: the file says something that no configuration can.
    """
    from gguf import GGUFReader
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    reader = GGUFReader(file)
    says = {name: field.contents() for name, field in reader.fields.items() if _small(name, field)}
    architecture = str(says.get("general.architecture"))
    if says.get("general.type", "model") != "model":
        raise UserError(f"{file}: general.type: '{says['general.type']}' is no model; take a model's file")
    if int(says.get("split.count", 1)) > 1:
        raise UserError(
            f"{file}: one of {says['split.count']} pieces; join them with llama-gguf-split --merge"
        )
    if architecture in GGUF_CONFIG_ARCHS:  # these transformers reads whole
        return config
    own = {key.removeprefix(f"{architecture}."): v for key, v in says.items() if key.startswith(architecture)}
    names = {tensor.name for tensor in reader.tensors}
    config = _unnamed(config)
    for key, field in _FIELDS.items():
        if key in own and hasattr(config, field):
            setattr(config, field, own[key])
    for field, tensor in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if hasattr(config, field):
            setattr(config, field, any(name.endswith(tensor) for name in names))
    factors = next((t.data for t in reader.tensors if t.name == _ROPE_FACTORS), None)
    _scale_positions(file, config, own, factors)
    _require_read(file, config, architecture, own)
    return config


def require_tensors(file: Path, model: Any) -> None:
    """Refuse a GGUF file with tensors that transformers would leave out; `model` may be without data.

    Raises:
        UserError: names the first.
    """
    from gguf import GGUFReader
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    if architecture in GGUF_CONFIG_ARCHS:  # transformers itself tells what was left
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    taken = get_gguf_hf_weights_map(model, processor)
    left = [
        tensor.name
        for tensor in reader.tensors
        # experts are known without the ending
        if tensor.name not in taken and tensor.name.removesuffix(".weight") not in taken
    ]
    left = [name for name in left if name != _ROPE_FACTORS]  # it is in the configuration by now
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        raise UserError(
            f"{file}: nothing in {type(model).__name__} takes the stored tensor '{left[0]}'{more}; take the "
            "original checkpoint"
        )


def _small(name: str, field: Any) -> bool:
    """Whether a field is worth unpacking here: not the vocabulary."""
    return not name.startswith("tokenizer.") or len(field.data) == 1


def _unnamed(config: Any) -> Any:
    """The configuration itself, or a Llama's where the file's name made it a Mistral's: llama.cpp computes
    both alike, and transformers has no tensors for the latter."""
    from transformers import LlamaConfig

    if config.model_type != "mistral":
        return config
    left = ("model_type", "sliding_window", "architectures", "transformers_version", "attention_bias")
    return LlamaConfig(**{name: value for name, value in config.to_dict().items() if name not in left})


def _rotary(config: Any) -> dict[str, Any]:
    """Settings of rotary positions; of the blocks that see everything where there are two kinds."""
    settings: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return settings.get("full_attention") or settings


def _scale_positions(file: Path, config: Any, own: Mapping[str, Any], factors: Any) -> None:
    """Put the file's scaling of positions into the configuration."""
    rotary = _rotary(config)
    scale = float(next((own[key] for key in _SCALING if key in own), 1.0))
    if own.get("rope.scaling.type", "linear") == "linear" and scale not in (0.0, 1.0):
        if factors is not None or not rotary:
            raise UserError(
                f"{file}: {_SCALING[0]}: {scale:g} is not read here; take the original checkpoint"
            )
        rotary.update(rope_type="linear", factor=scale)
    elif factors is not None:
        found = next(
            (s for s in _candidates(config, factors.astype(float)) if _gives(config, s, factors)), None
        )
        if found is None:
            raise UserError(
                f"{file}: the factors in '{_ROPE_FACTORS}' are not those of Llama 3's scaled positions, and "
                "no others are read here; take the original checkpoint"
            )
        rotary.update(found)


def _frequencies(config: Any) -> Any:
    """Plain ones, (head width / 2,), in float64."""
    width = head_width(config)
    return float(_rotary(config)["rope_theta"]) ** -(np.arange(0, width, 2) / width)


def _candidates(config: Any, factors: Any) -> Iterator[dict[str, Any]]:
    """Settings that could have given factors (head width / 2,)."""
    if len(factors) != head_width(config) // 2:
        return
    if np.allclose(factors, 1.0, rtol=_CLOSE):
        yield {}
        return
    for factor in dict.fromkeys([float(factors.max()), 8.0, 32.0, 4.0, 16.0, 2.0]):
        for original in (8192, *(1 << power for power in range(4, 18))):
            yield _llama3(factor, 4.0, original)
        shares = (1 / factors - 1 / factor) / (1 - 1 / factor)  # s above
        inner = (shares > _CLOSE) & (shares < 1 - _CLOSE)
        if inner.sum() > 1:
            turns = _frequencies(config)[inner] / (2 * math.pi)  # 1 / wavelength
            slope, shift = np.polyfit(turns, shares[inner], 1)
            if shift < 0:
                span = -1 / shift  # high - low where low is 1
                yield _llama3(factor, 1 + span, round(slope * span))


def _llama3(factor: float, high: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _gives(config: Any, settings: Mapping[str, Any], factors: Any) -> bool:
    """Whether settings of positions mean these factors, by the formula above."""
    if not settings:
        return True
    turns = _frequencies(config) / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    share = np.clip((settings["original_max_position_embeddings"] * turns - low) / (high - low), 0, 1)
    return np.allclose(1 / ((1 - share) / settings["factor"] + share), factors, rtol=_CLOSE, atol=0)


def _require_read(file: Path, config: Any, architecture: str, own: Mapping[str, Any]) -> None:
    """Refuse a key of the architecture that says something else than the configuration."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    known = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    read = known.get(config.model_type, known.get(architecture, {}))
    said = {"rope.freq_base": 10000.0, **own} if _rotary(config) else own  # llama.cpp's own default
    for key, value in said.items():
        if isinstance(value, list):
            fine = False
        elif key in _DERIVED:
            fine = _same(_DERIVED[key](config), value)
        elif key in _NEUTRAL and value in _NEUTRAL[key]:
            fine = True
        elif key == "attention.sliding_window" and read.get(key) is None:
            fine = value == 0 or value >= own.get("context_length", 0)
        elif key in _FIELDS:
            fine = hasattr(config, _FIELDS[key])
        else:
            fine = read.get(key) is not None or key in _SAYS_NOTHING or key in _SCALING
        if not fine:
            shown = "a value per block" if isinstance(value, list) else value
            shown = f"{shown:g}" if isinstance(shown, float) else shown
            raise UserError(
                f"{file}: {architecture}.{key}: {shown} is not read here, and the model would be another "
                "without it; take the original checkpoint"
            )


def _same(one: Any, other: Any) -> bool:
    return one is not None and math.isclose(float(one), float(other), rel_tol=1e-6)
