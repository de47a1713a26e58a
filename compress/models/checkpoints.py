"""Somebody else's weights, read safely.

Reads Hugging Face directories with safetensors, hub ids, and single GGUF files. Never unpickles, never
runs code that came with a checkpoint, and checks that weight files are whole before loading them.
Weights are taken to float32: the solvers work in it, and sizes are stated against it.
"""

import copy
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from compress.errors import UserError, door
from compress.host.files import (
    CONFIGURATION_BYTES,
    VOCABULARY_BYTES,
    leaves,
    read_bytes,
    read_json,
    require_regular,
)
from compress.host.tensor_files import PICKLES, entries
from compress.host.tokenizer_files import require_short
from compress.models.companions import with_pooling
from compress.models.gguf import as_llama_cpp, require_tensors
from compress.models.gguf_files import require_gguf
from compress.models.gguf_tokenizer import cut_as_llama_cpp
from compress.models.pretrained import pretrained
from compress.models.sizes import require_possible
from compress.models.unused import in_float, in_float_now, quantization, require_all_used, require_rows
from compress.tasks.registry import task_of

# read whole by transformers, whatever they hold
_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken")
# settings of weights that their `config.json` knows nothing of, and what they are of
_ELSEWHERE = {
    "adapter_config.json": "an adapter, which goes on top of another model; give both, as "
    "model: {checkpoint: BASE, adapter: FOLDER}, or compress.load(BASE, adapter=FOLDER)",
    "quantize_config.json": "a GPTQ quantization; take the original checkpoint",
    "quant_config.json": "an AWQ quantization; take the original checkpoint",
    "hf_quant_config.json": "a ModelOpt quantization; take the original checkpoint",
}
# of a configuration without weights beside it: more than any model has
_ANY_TENSORS, _ANY_BYTES = 4096, 1 << 41


def load_checkpoint(source: str | Path) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a directory, a `.gguf` file, or a hub id.

    Raises:
        UserError: nothing there, a pickle, remote code, a broken or missing weight file, no decoder.
    """
    path = Path(source)
    if path.is_file():
        return _load_gguf(path)
    if path.is_dir():
        check_directory(path)
    elif path.is_absolute() or str(source).count("/") != 1:
        raise UserError(f"model: '{source}' is neither a directory, a .gguf file nor a hub id (owner/name)")
    revision = None if path.is_dir() else hub_revision(str(source))
    model = _load_pretrained(str(source), revision=revision or "main")
    return model, _fitting(model, load_tokenizer(source, revision), source)


def hub_revision(source: str) -> str:
    """The commit that a hub id stands for: what the cache holds, else the newest, asked of the hub.

    So a run goes on with the model that it began with, online or not; `hf download` fetches another.

    Raises:
        UserError: neither the cache nor the hub has it.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_file, extract_commit_hash

    if _is_path(source):
        refuse_mistyped_path(source)
    with loading(f"model: '{source}' cannot be loaded"):
        file = try_to_load_from_cache(source, "config.json")
        if not isinstance(file, str):
            refuse_mistyped_path(source)
            file = cached_file(source, "config.json")
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise UserError(f"model: '{source}' lies in {file}, which names no commit; download it again")
    return str(commit)


def refuse_mistyped_path(source: str) -> None:
    """Refuse `folder/name` where the folder is here and the name is not, and what is longer than a hub's
    `owner/name`: no hub is asked for that.

    Raises:
        UserError: names what is there.
    """
    path = Path(source)
    if path.parent.is_dir() or _is_path(source):
        there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        near = get_close_matches(path.name, there, n=1)
        hint = (
            f"did you mean '{path.with_name(near[0])}'?" if near else "give a folder, a .gguf or owner/name"
        )
        raise UserError(f"model: '{source}' does not exist; {hint}")


def _is_path(source: str) -> bool:
    """Whether it cannot be a hub's `owner/name`."""
    return source.startswith(("~", ".", "/")) or source.count("/") > 1


def check_directory(path: Path) -> None:
    """Refuse a directory that is no checkpoint, is a pickle, wants remote code, or is not whole."""
    for name, what in _ELSEWHERE.items():  # a lone adapter has no configuration beside it
        if (path / name).exists():
            raise UserError(f"{path / name}: the settings of {what}")
    refuse_remote_code(path)
    require_settings(path)
    weights = list(weight_files(path))
    if not weights:
        pickles = [p.name for pattern in PICKLES for p in sorted(path.glob(pattern))]
        if pickles:
            raise UserError(
                f"{path / pickles[0]}: pickled weights are refused, since unpickling can run any code; "
                "convert the checkpoint to safetensors first"
            )
        raise UserError(f"{path}: no weights (model.safetensors) in this directory")
    for file in weights:
        entries(file)


def refuse_remote_code(path: Path) -> None:
    """Refuse a directory without a configuration, or with one that names code to run."""
    config = read_json(
        path / "config.json", f"{path}: no config.json, so this is no model directory", CONFIGURATION_BYTES
    )
    for name, content in (("config.json", config), ("tokenizer_config.json", _optional(path))):
        if "auto_map" in content:
            raise UserError(
                f"{path / name}: 'auto_map' asks for remote code, which is never run; if transformers knows "
                f"model_type '{config.get('model_type')}' itself, delete that field"
            )


def weight_files(path: Path) -> Iterator[Path]:
    """The safetensors files of a directory, in the order of its index."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index, f"{index}: unreadable").get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{index}: no 'weight_map' that names files; download the checkpoint again")
        for name in sorted(set(named.values())):
            file = inside(path, name)
            if not file.is_file():
                raise UserError(f"{file}: named by {index.name} but missing; download the checkpoint again")
            yield file
    elif (path / "model.safetensors").is_file():
        yield path / "model.safetensors"


def require_settings(path: Path) -> None:
    """Refuse a directory with a small file that is none, or whose configuration asks for more than it holds.

    `transformers` reads these files whole, and makes of the configuration what it says.

    Raises:
        UserError: names the file.
    """
    for name in _VOCABULARIES:
        for file in path.glob(name):
            if require_regular(file) > VOCABULARY_BYTES:
                raise UserError(f"{file}: is longer than {VOCABULARY_BYTES:,} bytes, so it is no vocabulary")
    for file in (path / name for name in _OBJECTS):
        if file.exists():
            read_json(file)
    for file in path.glob("*.jinja"):
        read_bytes(file)
    file = path / "config.json"
    config = read_json(file, most=CONFIGURATION_BYTES) if file.exists() else {}
    # a link to nothing is no file: whoever reads the weights says so, if they are wanted
    weights = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    tensors = sum(map(_count, weights)) if weights else _ANY_TENSORS
    size = sum(file.stat().st_size for file in weights) if weights else _ANY_BYTES
    require_possible(config, path / "config.json", tensors, size)


def _count(file: Path) -> int:
    """Tensors in a file, none if it is damaged: that is told by whoever reads them."""
    try:
        return len(entries(file))
    except UserError:
        return 0


def inside(folder: Path, name: str) -> Path:
    """A path named by a file we did not write; raises UserError if it leaves `folder`."""
    if leaves(name):
        raise UserError(f"{folder}: refers to '{name:.200}', which lies outside it")
    return folder / name


def save_configurations(model: Any, folder: Path, config: Any = None) -> None:
    """Write the model's configuration, or `config`, and that of generation where the model writes text.

    The latter says what ends a text, which the former need not know.
    """
    (config or model.config).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def with_generation_settings(model: Any, folder: Path) -> Any:
    """A model that was made of a configuration alone, with the settings of generation that lie beside it.

    What ends a text is often written there only.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if model.can_generate() and file.is_file():
        with loading(f"{file}: no settings of generation"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' own bars and warnings while it loads; what matters we say ourselves."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        # the bar of its GGUF reader heeds no setting
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def loading(failure: str) -> Iterator[None]:
    """Let transformers load something in silence; whatever it raises becomes a UserError, `failure: reason`.

    A damaged file, or a wrong type in a configuration, fails wherever it is first used, with any exception.
    """
    with door(failure), quiet_transformers():
        yield


def load_config(folder: Path) -> Any:
    """The configuration of a directory; raises UserError where there is none that transformers knows."""
    from transformers import AutoConfig

    require_settings(folder)
    with loading(f"{folder / 'config.json'}: no model can be made of it"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return with_pooling(config, folder)


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The fast tokenizer of a directory, `.gguf` file or hub id; raises UserError where none works."""
    from transformers import AutoTokenizer

    source, file = _place(path)
    if file is None and Path(source).is_dir():
        require_settings(Path(source))
    with loading(f"{path}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file=file, revision=revision or "main", trust_remote_code=False
        )
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            require_short(backend, path)
        tokenizer.decode(tokenizer.encode("a b", verbose=False))  # some damage shows at the first use
        return tokenizer if file is None else cut_as_llama_cpp(Path(path), tokenizer)


def _place(source: str | Path) -> tuple[str | Path, str | None]:
    """A source as transformers asks for it: directory or hub id, and the name of a GGUF file in it."""
    path = Path(source)
    return (path.parent, path.name) if path.is_file() else (source, None)


def tokenizer_of(model: Any, folder: Path) -> Any:
    """The tokenizer in a model's folder; raises UserError where the model lacks rows for its tokens."""
    tokenizer = load_tokenizer(folder)
    require_rows(model, tokenizer, folder)
    return tokenizer


def _fitting(model: Any, tokenizer: Any, source: str | Path) -> Any:
    require_rows(model, tokenizer, f"model: '{source}'")
    return tokenizer


def _load_pretrained(source: str, **options: str) -> Any:
    import torch
    from transformers import AutoConfig

    from compress.models.conv1d import linears, of_config
    from compress.models.finite import numbers_of, require_finite
    from compress.models.owned import own_memory
    from compress.models.stored import require_kinds, stored_kinds
    from compress.models.tying import settled

    with loading(f"model: '{source}' cannot be loaded"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        config = _pooled(config, source, options.get("revision", "main"))
        if "gguf_file" in options:
            config = as_llama_cpp(Path(source) / options["gguf_file"], config)
        stored = None if "gguf_file" in options else quantization(config)
        if stored is not None:
            in_float(config, f"model: '{source}'")
        elif Path(source).is_dir() and "gguf_file" not in options:
            # before: what is read is of these kinds and shapes, or nothing is
            with torch.device("meta"):
                planned = of_config(copy.deepcopy(config))
            kinds = stored_kinds(weight_files(Path(source)))
            require_kinds(planned, kinds, f"model: '{source}'", shapes=True)
        model, found = pretrained(source, config, **options)
    # an encoder that embeds is often saved without the layer after it, which only a head uses
    unused = "pooler." if task_of(config).output == "last_hidden_state" else "\0"
    missing = sorted(name for name in found["missing_keys"] if unused not in name)
    if missing:
        raise UserError(
            f"model: '{source}' has no weights for '{missing[0]}'"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ", which would be random; download it again, or name its class under 'architectures'"
        )
    require_all_used(model, found["unexpected_keys"], f"model: '{source}'")
    if stored is None and "gguf_file" not in options and not Path(source).is_dir():
        require_kinds(model, stored_kinds(_cached(source, options["revision"])), f"model: '{source}'")
    own_memory(model)
    if "gguf_file" in options:
        require_tensors(Path(source) / options["gguf_file"], model)
    require_finite(numbers_of(model), f"model: '{source}'")
    return settled(linears(in_float_now(model, stored is not None))).eval()


def place_of(source: str | Path, revision: str = "main") -> Path:
    """The folder of a model's small files: its own, or of a hub id that in the cache."""
    path, nowhere = Path(source), Path(source) / "no folder"
    if path.exists():
        return path if path.is_dir() else nowhere
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(str(source), "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else nowhere


def _pooled(config: Any, source: str, revision: str) -> Any:
    """A configuration that says how states are pooled, of an encoder that embeds; of a hub id, the files that
    say so are fetched."""
    if not str((getattr(config, "architectures", None) or [""])[0]).endswith("Model"):
        return config
    if not Path(source).exists():
        from transformers.utils.hub import cached_file

        options = dict.fromkeys(
            ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
        )
        for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
            cached_file(source, name, revision=revision, **options)
    return with_pooling(config, place_of(source, revision))


def _cached(source: str, revision: str) -> list[Path]:
    """The weight files of a hub id, which are in the cache by now."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", revision=revision)
    return list(weight_files(Path(config).parent)) if isinstance(config, str) else []


def _load_gguf(path: Path) -> tuple[Any, Any]:
    require_gguf(path)
    model = _load_pretrained(str(path.parent), gguf_file=path.name)
    return model, _fitting(model, load_tokenizer(path), path)


def _optional(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return read_json(file, "") if file.is_file() else {}


def meta_model(source: Any, *, for_passes: bool = False) -> Any:
    """A model without data (torch's meta device): of a directory, `.gguf` file or hub id, or of a config.

    Raises:
        UserError: the configuration cannot be read, or describes no decoder that transformers knows; or
            `for_passes`, which start from float, and its weights are quantized.
    """
    import torch
    from transformers import AutoConfig

    from compress.models.conv1d import of_config

    config = source
    with loading(f"model: '{source}' cannot be loaded"):
        if isinstance(source, str):
            path = Path(source)
            place, file = _place(source)
            if path.is_file():
                require_gguf(path)
            elif path.is_dir():
                require_settings(path)
            commit = None if path.exists() else hub_revision(source)
            config = AutoConfig.from_pretrained(
                place, gguf_file=file, revision=commit or "main", trust_remote_code=False
            )
            config = _pooled(config, source, commit or "main")
            if path.is_file():
                config = as_llama_cpp(path, config)
            elif for_passes:
                in_float(config, f"model: '{source}'")
        with torch.device("meta"):
            model = of_config(config)
        if isinstance(source, str) and path.is_file():
            require_tensors(path, model)
        return model
