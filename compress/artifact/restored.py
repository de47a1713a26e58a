"""A model of codes, or one whose zeros are not stored, made again of its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact.coded import without_streams
from compress.artifact.counts import code_files, unique_state
from compress.artifact.sparse import SPARSE, expand, keep_packed, widen
from compress.errors import UserError
from compress.formats import Activations, QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.registry import format_from
from compress.formats.split import FREQUENT, RARE, SplitEmbedding
from compress.formats.swap import embedding_scale
from compress.host.tensor_files import load_tensors
from compress.models.checkpoints import (
    load_config,
    loading,
    refuse_remote_code,
    with_generation_settings,
)
from compress.models.conv1d import of_config
from compress.models.finite import require_finite
from compress.models.layers import replace_module
from compress.models.owned import own_tensors
from compress.models.tying import settled
from compress.records.manifest import LayerRecord, Manifest


def restored(folder: Path, manifest: Manifest, packed: bool) -> Any:
    """Rebuild a model whose layers hold codes, or whose zeros are not stored; it is not the files any more.

    Never touches memory for float weights that are not in the files.

    Raises:
        UserError: the files are damaged, or do not match the manifest.
    """
    from transformers.initialization import no_init_weights

    refuse_remote_code(folder)
    files = code_files(folder)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= without_streams(own_tensors(load_tensors(file)), manifest.layers, file)
    if not packed:
        expand(state, manifest.sparse, manifest.layers, folder / SPARSE)
    config = load_config(folder)
    with loading(f"{folder / 'config.json'}: no model can be made of it"), no_init_weights():
        model = of_config(config, dtype=torch.float32)
    require_finite(state.items(), folder)
    try:
        make_room(model, manifest.layers)
        if packed:
            keep_packed(model, state, manifest.sparse, manifest.layers, folder / SPARSE)
        _require_same_kinds(state, model, files)
        widen(state, model)
        result = model.load_state_dict(state, strict=False, assign=True)
        _require_places(model)
        if isinstance(model.get_input_embeddings(), nn.Embedding):  # float: the head it may share
            model.tie_weights(missing_keys=set(result.missing_keys), recompute_mapping=False)
            settled(model)
    # no such layer; codes of another shape; a format of impossible numbers
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(_mismatch(files, str(error).strip().splitlines()[-1].strip())) from None
    wrong = sorted(set(unique_state(model)) & set(result.missing_keys)) + list(result.unexpected_keys)
    if wrong:
        raise UserError(_mismatch(files, f"'{wrong[0]}'"))
    return with_generation_settings(model.eval(), folder)


def make_room(model: Any, layers: Mapping[str, LayerRecord]) -> None:
    """Put empty layers of codes where the manifest has them, shared ones where they were tied."""
    held: dict[str, QuantizedTensor] = {}
    _split_tables(model, layers)
    for name, record in layers.items():
        old = model.get_submodule(name)
        if tuple(old.weight.shape) != tuple(record.shape):
            raise ValueError(f"'{name}' is {tuple(old.weight.shape)}, not {tuple(record.shape)}")
        if record.embedding != isinstance(old, nn.Embedding):
            raise ValueError(
                f"'{name}' is {'no' if record.embedding else 'a'} table of embeddings in the model"
            )
        owner = record.tied_to or name
        if owner not in held:
            held[owner] = QuantizedTensor(format_from(record.format), record.shape)
        new: nn.Module
        if record.embedding:
            new = QuantizedEmbedding(held[owner], scale=embedding_scale(old))
        else:
            rule = record.activations
            activations = None if rule is None else Activations.model_validate(rule)
            new = QuantizedLinear(held[owner], getattr(old, "bias", None), activations)
        replace_module(model, name, new)


def _split_tables(model: Any, layers: Mapping[str, LayerRecord]) -> None:
    """Put two tables where the manifest has two parts of one."""
    for name in [name for name, record in layers.items() if record.embedding]:
        whole, _, part = name.rpartition(".")
        if part != FREQUENT or f"{whole}.{RARE}" not in layers:
            continue
        old: Any = model.get_submodule(whole)
        shapes = [layers[f"{whole}.{each}"].shape for each in (FREQUENT, RARE)]
        if tuple(old.weight.shape) != (shapes[0][0] + shapes[1][0], shapes[0][1]):
            raise ValueError(f"'{whole}' is {tuple(old.weight.shape)}, and its parts are {shapes}")
        frequent, rare = (nn.Embedding(*shape, device="meta") for shape in shapes)
        place = torch.empty(len(old.weight), dtype=torch.int32)
        replace_module(model, whole, SplitEmbedding(frequent, rare, place))


def _require_places(model: Any) -> None:
    """Refuse a table in two parts some of whose tokens have no row."""
    table = model.get_input_embeddings()
    if isinstance(table, SplitEmbedding):
        rows = table.place.sort().values
        if not torch.equal(rows, torch.arange(table.num_embeddings, dtype=rows.dtype)):
            raise ValueError("the places of a table's rows are not each row once")


def _require_same_kinds(state: Mapping[str, Tensor], model: nn.Module, files: list[Path]) -> None:
    """Floats where the model computes with floats, and integers of the very type that codes have."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name not in own:
            continue
        kinds = (tensor.dtype, own[name].dtype)
        if kinds[0] != kinds[1] and not all(kind.is_floating_point for kind in kinds):
            raise UserError(_mismatch(files, f"'{name}' is stored as {kinds[0]} where {kinds[1]} is wanted"))


def _mismatch(files: list[Path], what: str) -> str:
    return f"{files[0]}: does not match its manifest ({what}); write the artifact again"
