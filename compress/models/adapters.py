"""LoRA: small matrices beside the weights, trained or read, and merged into them by `peft`.

    W <- W + (alpha / r) B A,    A (r, in), B (out, r)                  (Hu et al. 2021, arXiv 2106.09685)

After merging the model is what it was before, layer by layer, with other weights: everything else of this
package sees nothing of adapters. Of a file that somebody else wrote only safetensors are read, and of its
settings only those named here; what it is to be put on follows from the tensors, not from its patterns.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import MissingExtra, UserError, door
from compress.host.files import CONFIGURATION_BYTES, read_json
from compress.host.tensor_files import entries, opened
from compress.models.finite import numbers_of, require_finite
from compress.models.layers import is_linear

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (SETTINGS, WEIGHTS)
_PREFIX = "base_model.model."
_NAME = "default"
# of a layer's tensors: what follows its name
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# settings that decide what merging gives, and are handed on
_DECIDING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
# settings that say where it goes, or how it is trained: the tensors say the former
_OTHERS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "bias",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "lora_dropout", "init_lora_weights", "fan_in_fan_out", "peft_version", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip

_PLAIN = re.compile(r"\^?[\w.\\-]{1,200}\$?")  # of the patterns that peft would match as expressions
_STARTS = (True, "gaussian", "eva", "orthogonal")  # that leave the base's weights as they are


def require_peft(purpose: str) -> None:
    """Refuse what needs `peft` where it is absent.

    Raises:
        MissingExtra: names the command that installs it.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MissingExtra("peft", "lora", purpose) from None


def adapted(model: Any, names: Sequence[str], rank: int, alpha: float, seed: int) -> Any:
    """Put an adapter beside each of the named linear layers; of the rest of the model nothing learns.

    The adapters change nothing yet: B is zero, A is drawn from the seed.

    Returns:
        What `merged` takes; `model` is changed in place, its layers wrapped.
    """
    from peft import LoraConfig

    require_peft("lora")
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=0.0)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _beside(model, settings)


def merged(tuner: Any) -> Any:
    """The model with its adapters merged into the weights, all of which learn again."""
    model = tuner.merge_and_unload()
    vars(model).pop("peft_config", None)
    return model.requires_grad_(True)


def delta(model: nn.Module, name: str) -> Tensor:
    """What merging will add to the weight of an adapted layer, (out, in)."""
    layer: Any = model.get_submodule(name)
    found: Tensor = layer.get_delta_weight(_NAME)
    return found.detach()


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder merged into its weights, in place.

    Raises:
        UserError: the folder holds none that is read here, or one of another model.
    """
    settings = check_adapter(model, folder)
    with opened(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    require_finite(list(tensors.items()), f"adapter: '{folder}'")
    layers, whole = _sorted(tensors, folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in whole.items():
            parameters[name].copy_(tensor)
        for name, tensor in whole.items():
            if not torch.equal(parameters[name], tensor.to(parameters[name].dtype)):
                raise UserError(
                    f"adapter: '{folder}' gives '{name}' other values than the weight that it is tied to in "
                    "this model; take the adapter of this base"
                )
    if layers:
        from peft import LoraConfig

        with door(f"adapter: '{folder}' cannot be put on this model"):
            tuner = _beside(
                model, LoraConfig(**settings, target_modules=sorted(layers), init_lora_weights=False)
            )
            own = dict(model.named_parameters())
            with torch.no_grad():
                for name, parts in layers.items():
                    for part, tensor in parts.items():
                        own[_trained(name, part)].copy_(tensor)
            merged(tuner)
    require_finite(numbers_of(model), f"adapter: '{folder}' merged")
    return model


def check_adapter(model: Any, folder: Path) -> dict[str, Any]:
    """The settings of an adapter, which are of a kind that is read, and fit a model that may hold no data.

    Raises:
        UserError: in one line.
    """
    require_peft("adapter")
    settings = read_json(
        folder / SETTINGS,
        f"adapter: '{folder}' holds no {SETTINGS}, so it is no adapter",
        CONFIGURATION_BYTES,
    )
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / SETTINGS}: peft_type is {settings.get('peft_type')!r:.80}; LORA alone is merged here"
        )
    unknown = sorted(n for n, v in settings.items() if v and n not in _OTHERS and n not in _DECIDING)
    if unknown:
        raise UserError(
            f"{folder / SETTINGS}: '{unknown[0]:.80}' is set, which is not merged here; merge the adapter "
            "with peft, and give the model that comes of it"
        )
    if (start := settings.get("init_lora_weights")) and start not in _STARTS:
        raise UserError(
            f"{folder / SETTINGS}: init_lora_weights is {start!r:.80}, which changes the base as well; "
            "merge the adapter with peft, and give the model that comes of it"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(folder.glob("adapter_model*.bin")) + sorted(folder.glob("*.pt"))
        raise UserError(
            f"{pickled[0]}: pickled weights are refused, since unpickling can run any code; save the adapter "
            "as safetensors"
            if pickled
            else f"{folder / WEIGHTS}: is missing; copy the adapter again"
        )
    found = entries(folder / WEIGHTS)
    if odd := [e for e in found if e.dtype not in ("F64", "F32", "F16", "BF16")]:
        raise UserError(f"{folder / WEIGHTS}: '{odd[0].name:.200}' is of {odd[0].dtype}; save it as numbers")
    shapes = {entry.name: tuple(entry.shape) for entry in found}
    layers, whole = _sorted(shapes, folder)
    hint = settings.get("base_model_name_or_path")
    of = f" (it was made for '{hint:.200}')" if isinstance(hint, str) and hint else ""
    for name, parts in layers.items():
        _check_layer(model, name, parts, folder, of)
    _check_ranks(settings, {parts[_A][0] for parts in layers.values()}, folder)
    known = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, shape in whole.items():
        if known.get(name) != shape:
            there = (
                f"which has {_words(known[name])} in this model" if name in known else "and this model none"
            )
            raise UserError(f"adapter: '{folder}' holds '{name:.200}' {_words(shape)}, {there}{of}")
    if not layers and not whole:
        raise UserError(f"{folder / WEIGHTS}: holds no tensors; copy the adapter again")
    return {name: settings[name] for name in _DECIDING if settings.get(name) is not None}


def _check_layer(model: Any, name: str, parts: Mapping[str, Any], folder: Path, of: str) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        raise UserError(
            f"adapter: '{folder}' goes beside '{name:.200}', which is no linear layer of this model{of}"
        )
    rows, columns = module.weight.shape
    a, b = parts.get(_A, ()), parts.get(_B, ())
    if len(a) != 2 or len(b) != 2 or a[1] != columns or b != (rows, a[0]):
        raise UserError(
            f"adapter: '{folder}' has matrices {_words(a)} and {_words(b)} for '{name:.200}', which is "
            f"{_words((rows, columns))} in this model{of}"
        )


def _check_ranks(settings: Mapping[str, Any], ranks: set[int], folder: Path) -> None:
    """Refuse ranks that no tensor has, for which room would be made, and patterns that are no names."""
    patterns = {name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for field, found in patterns.items():
        if not isinstance(found, dict) or not all(_PLAIN.fullmatch(name) for name in found):
            raise UserError(
                f"{folder / SETTINGS}: {field} is {found!r:.80}; names of modules with numbers are read"
            )
    for rank in (settings.get("r", 8), *patterns["rank_pattern"].values()):
        if ranks and (type(rank) is not int or rank < 1 or rank > max(ranks)):
            raise UserError(
                f"{folder / SETTINGS}: a rank of {rank!r:.80}, where the tensors have {max(ranks)} at most; "
                "copy the adapter again"
            )


def _sorted(found: Mapping[str, Any], folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Layer -> its tensors by what follows its name; and name -> tensor that stands in another's place."""
    layers: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for key, value in found.items():
        name = key.removeprefix(_PREFIX)
        part = next((end for end in (_A, _B, _MAGNITUDE) if name.endswith(end)), None)
        if not key.startswith(_PREFIX) or (part is None and "lora_" in name):
            raise UserError(f"{folder / WEIGHTS}: '{key:.200}' is no part of an adapter that is merged here")
        if part is None:
            whole[name] = value
        else:
            layers.setdefault(name.removesuffix(part), {})[part] = value
    return layers, whole


def _trained(layer: str, part: str) -> str:
    """The name of a parameter beside a layer, once it is there."""
    return f"{layer}{part.removesuffix('.weight')}.{_NAME}.weight"


def _beside(model: Any, settings: Any) -> Any:
    from peft.tuners.lora import LoraModel

    with _without_words():
        return LoraModel(model, {_NAME: settings}, _NAME)


@contextmanager
def _without_words() -> Iterator[None]:
    """What peft warns of is checked here, or cannot be."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _words(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "of no size"
