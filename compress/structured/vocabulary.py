"""A vocabulary without the tokens that a text never uses.

Byte-pair encoding merges two pieces into a longer one, the merge of the lowest rank first. A token that is
used was made by merges; they and all pieces they pass through are kept, as are the 256 bytes and all added
tokens. Then

    every text that could be written still can, in bytes at worst, and is read back to the byte;
    text made of the words that were counted is cut as before: at each step the merge that the full
    tokenizer would take is kept, and is the lowest of those that are, since the others are fewer.

Tokens keep their order and are numbered anew, without holes. Rows of embedding and head go with them.
Limits: byte-level BPE, or BPE with bytes to fall back on; other tokenizers could lose text.
"""

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch

from compress.errors import UserError
from compress.host.scratch import scratch
from compress.models.checkpoints import load_tokenizer
from compress.structured.slicing import assembled, held

_FILE = "tokenizer.json"


def require_bytes(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer that could not write every text without some of its tokens."""
    kind, content = type(tokenizer).__name__, _json(tokenizer)
    if content["model"]["type"] != "BPE" or not _bytes(content):
        raise UserError(
            f"prune_vocabulary: {kind} ({content['model']['type']}) has no bytes to fall back on, so text "
            "could be lost; only byte-level BPE can be trimmed, leave prune_vocabulary out"
        )


def kept_tokens(tokenizer: Any, used: Iterable[int]) -> list[int]:
    """The used tokens, all they are merged from, bytes and added tokens; ids, ascending."""
    content = _json(tokenizer)
    vocabulary: dict[str, int] = content["model"]["vocab"]
    strings = {i: token for token, i in vocabulary.items()}
    made_of: dict[str, list[str]] = {}
    for left, right in _merges(content):
        made_of.setdefault(left + right, []).extend((left, right))
    kept = {entry["id"] for entry in content["added_tokens"]}
    waiting = [strings[i] for i in used if i in strings] + _bytes(content)
    unknown = content["model"].get("unk_token")
    waiting += [unknown] if unknown in vocabulary else []
    while waiting:
        token = waiting.pop()
        if vocabulary[token] not in kept:
            kept.add(vocabulary[token])
            waiting += made_of.get(token, [])
    return sorted(kept)


def trimmed_tokenizer(tokenizer: Any, kept: list[int]) -> Any:
    """A tokenizer of the tokens `kept`, numbered anew in their order; loaded as anybody would load it."""
    new = {old: number for number, old in enumerate(kept)}
    with scratch() as folder:
        tokenizer.save_pretrained(folder)
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        model = content["model"]
        vocabulary = {token: new[i] for token, i in model["vocab"].items() if i in new}
        as_lists = bool(model["merges"]) and not isinstance(model["merges"][0], str)
        merges = [
            pair for pair in _merges(content) if all(part in vocabulary for part in (*pair, "".join(pair)))
        ]
        model["vocab"] = vocabulary
        model["merges"] = [list(pair) if as_lists else " ".join(pair) for pair in merges]
        for entry in content["added_tokens"]:
            entry["id"] = new[entry["id"]]
        ids = {**vocabulary, **{entry["content"]: entry["id"] for entry in content["added_tokens"]}}
        content["post_processor"] = _renumbered(content.get("post_processor"), ids)
        if content.get("padding"):
            content["padding"]["pad_id"] = ids[content["padding"]["pad_token"]]
        (folder / _FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):  # older forms of the same
            (folder / name).unlink(missing_ok=True)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        result = load_tokenizer(folder)
        result.name_or_path = ""
        return result


def special_ids(model: Any) -> set[int]:
    """Ids that the configurations of a model name."""
    configs = [model.config, model.generation_config] if model.can_generate() else [model.config]
    found = (i for config in configs for _, ids in _ids_in(config) for i in ids)
    return {i for i in found if 0 <= i < model.config.vocab_size}


def fewer_rows(model: Any, kept: list[int]) -> Any:
    """A new model with the rows `kept` of embedding and head; ids in its configurations are the new ones."""
    rows = torch.tensor(kept)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = table.weight.shape[0]
    of_rows = {id(table.weight)}
    if head is not None:
        of_rows |= {id(p) for p in head.parameters() if p.shape[0] == size}
    state = {
        name: tensor[rows.to(tensor.device)] if id(tensor) in of_rows else tensor
        for name, tensor in held(model).items()
    }
    new = {old: number for number, old in enumerate(kept)}
    config = _config_with(model.config, new)
    config.vocab_size = len(kept)
    result = assembled(model, config, state)
    if result.can_generate():
        result.generation_config = _config_with(model.generation_config, new)
    return result


def _config_with(config: Any, new: dict[int, int]) -> Any:
    """A copy in which ids are the new ones; those of no token at all stay."""
    result = copy.deepcopy(config)
    for key, ids in _ids_in(config):
        value = [new.get(i, i) for i in ids]
        setattr(result, key, value if isinstance(getattr(config, key), list) else value[0])
    return result


def _ids_in(config: Any) -> list[tuple[str, list[int]]]:
    """Fields of a configuration that hold token ids."""
    found = []
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_tokens")) and value is not None:
            ids = value if isinstance(value, list) else [value]
            numbers = ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
            if numbers and (key.endswith("_token_id") or isinstance(value, list)):
                found.append((key, ids))
    return found


def _bytes(content: dict[str, Any]) -> list[str]:
    """The tokens that stand for single bytes; none where there are no such tokens.

    Byte-level tokenizers may lack bytes that their text never had, or that UTF-8 never has.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = content["model"]["vocab"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    if content["model"].get("byte_fallback") and all(token in vocabulary for token in fallback):
        return fallback
    alphabet = [token for token in sorted(ByteLevel.alphabet()) if token in vocabulary]
    level = "ByteLevel" in json.dumps(content.get("pre_tokenizer")) + json.dumps(content.get("decoder"))
    return alphabet if level else []


def _merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write each as one string."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _renumbered(value: Any, ids: dict[str, int]) -> Any:
    """A post-processor with the new ids, wherever a token stands beside its id."""
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return [value[0], ids[value[0]]]
        return [_renumbered(item, ids) for item in value]
    if isinstance(value, dict):
        if isinstance(value.get("tokens"), list) and "ids" in value:
            return {**value, "ids": [ids[token] for token in value["tokens"]]}
        return {key: _renumbered(item, ids) for key, item in value.items()}
    return value


def _json(tokenizer: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content
