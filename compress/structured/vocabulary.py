"""A vocabulary without the tokens that a text never uses.

Of three kinds of tokenizers it is known which tokens must stay beside the used ones, so that text like the
counted one is cut as before and no text is lost that could be written:

    byte-pair encoding (byte-level, or with bytes to fall back on) merges two pieces into a longer one, the
    merge of the lowest rank first. The merges that made a used token, and all pieces they pass through, are
    kept, and the bytes. At each step the merge that the full tokenizer would take is kept, and is the lowest
    of those that are, since the others are fewer.

    WordPiece takes the longest piece that a word goes on with. Where that is kept no longer one is, since
    there was none. Characters that are tokens by themselves are kept, at the begin of a word and inside it.

    Unigram takes the cut whose scores add up to most. That cut is kept, its sum is what it was, and of the
    others some are gone. What an unknown character costs follows from the lowest score of all, so the token
    that has it is kept; and characters, bytes to fall back on, and the unknown token.

A token with a character that is none by itself stays, too: each that goes can be written with those that
stay. Added tokens stay. Tokens keep their order and are numbered anew, without holes; every row that the
model has per token (embedding, head, their biases, in both stacks of an encoder-decoder) goes with them.

Limits: other tokenizers (and BPE without bytes) could lose text. A word that was never counted may be unknown
to WordPiece where one of its characters is a token only together with others.
"""

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.host.scratch import scratch
from compress.models.checkpoints import load_tokenizer, quiet_transformers
from compress.models.conv1d import of_config
from compress.models.special import ids_in
from compress.structured.slicing import assembled, held

_FILE = "tokenizer.json"
_OLDER = (  # files that hold the same vocabulary in older forms
    "vocab.json", "merges.txt", "added_tokens.json", "vocab.txt", "spiece.model", "tokenizer.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


def require_trimmable(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer that could not write every text without some of its tokens."""
    kind, content = type(tokenizer).__name__, _json(tokenizer)
    model = content["model"]["type"]
    if model not in ("WordPiece", "Unigram") and (model != "BPE" or not _bytes(content)):
        raise UserError(
            f"prune_vocabulary: {kind} ({model}) has no bytes to fall back on, so text could be lost; BPE "
            "with bytes, WordPiece and Unigram can be trimmed, leave prune_vocabulary out"
        )


def kept_tokens(tokenizer: Any, used: Iterable[int]) -> list[int]:
    """The used tokens, all that cutting text with them needs, and added tokens; ids, ascending."""
    content = _json(tokenizer)
    vocabulary = _vocabulary(content)
    strings = {i: token for token, i in vocabulary.items()}
    needed = {"WordPiece": _of_word_pieces, "Unigram": _of_unigram}.get(content["model"]["type"], _of_bytes)
    kept = {entry["id"] for entry in content["added_tokens"]}
    waiting = [strings[i] for i in used if i in strings] + needed(content)
    unknown = content["model"].get("unk_token")
    waiting += [unknown] if unknown in vocabulary else []
    made_of: dict[str, list[str]] = {}
    for left, right in _merges(content):
        made_of.setdefault(left + right, []).extend((left, right))
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
        vocabulary = {token: new[i] for token, i in _vocabulary(content).items() if i in new}
        _trim(content, vocabulary, new)
        for entry in content["added_tokens"]:
            entry["id"] = new[entry["id"]]
        ids = {**vocabulary, **{entry["content"]: entry["id"] for entry in content["added_tokens"]}}
        content["post_processor"] = _renumbered(content.get("post_processor"), ids)
        if content.get("padding"):
            content["padding"]["pad_id"] = ids[content["padding"]["pad_token"]]
        (folder / _FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        for name in _OLDER:
            (folder / name).unlink(missing_ok=True)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        result = load_tokenizer(folder)
        if result.get_vocab() != ids:  # some classes add tokens of their own
            raise UserError(
                f"prune_vocabulary: a {type(tokenizer).__name__} of fewer tokens is not read as it was "
                "written; leave prune_vocabulary out"
            )
        result.name_or_path = ""
        return result


def fewer_rows(model: Any, kept: list[int]) -> Any:
    """A new model of the tokens `kept`: everything that has an entry per token (embeddings, heads, their
    biases) keeps those of them. Ids in its configurations are the new ones.
    """
    new = {old: number for number, old in enumerate(kept)}
    config = _config_with(model.config, new)
    config.vocab_size = len(kept)
    with quiet_transformers(), torch.device("meta"):
        smaller = of_config(copy.deepcopy(config))
    both = (smaller.named_parameters(remove_duplicate=False), smaller.named_buffers(remove_duplicate=False))
    shapes = {name: tensor.shape for tensors in both for name, tensor in tensors}
    rows = torch.tensor(kept)
    state = {name: _fewer(tensor, shapes.get(name), rows) for name, tensor in held(model).items()}
    result = assembled(model, config, state)
    if result.can_generate():
        result.generation_config = _config_with(model.generation_config, new)
    return result


def _fewer(tensor: Tensor, shape: torch.Size | None, rows: Tensor) -> Tensor:
    """Of a tensor that a model of fewer tokens has in this shape, the entries `rows` of the axis that differs
    ((tokens, width), (tokens,), or (1, tokens)).
    """
    if shape is None or len(shape) != tensor.dim():
        return tensor  # what makes the model says so
    for axis, length in enumerate(shape):
        if length != tensor.shape[axis]:
            return tensor.index_select(axis, rows.to(tensor.device))
    return tensor


def _config_with(config: Any, new: dict[int, int]) -> Any:
    """A copy in which ids are the new ones; those of no token at all stay."""
    result = copy.deepcopy(config)
    for key, ids in ids_in(config):
        value = [new.get(i, i) for i in ids]
        setattr(result, key, value if isinstance(getattr(config, key), list) else value[0])
    return result


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """Token -> id, without added tokens that the model does not know."""
    held = content["model"]["vocab"]
    return dict(held) if isinstance(held, dict) else {token: i for i, (token, _) in enumerate(held)}


def _trim(content: dict[str, Any], vocabulary: dict[str, int], new: dict[int, int]) -> None:
    """Leave in the model of a `tokenizer.json` the tokens of `vocabulary`, by their new numbers."""
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
        return
    pairs = [p for p in _merges(content) if all(part in vocabulary for part in (*p, "".join(p)))]
    model["vocab"] = vocabulary
    if model.get("merges"):
        as_lists = not isinstance(model["merges"][0], str)
        model["merges"] = [list(pair) if as_lists else " ".join(pair) for pair in pairs]


def _of_bytes(content: dict[str, Any]) -> list[str]:
    """What BPE needs beside the used tokens and what they are made of."""
    return _bytes(content)


def _of_word_pieces(content: dict[str, Any]) -> list[str]:
    """Tokens of one character, begin and inside of a word apart; and those with a character that is none."""
    vocabulary = content["model"]["vocab"]
    prefix = content["model"]["continuing_subword_prefix"]
    found = []
    for token in vocabulary:
        inside = token.startswith(prefix) and token != prefix
        signs = token.removeprefix(prefix) if inside else token
        forms = [prefix + sign if inside or place else sign for place, sign in enumerate(signs)]
        if len(forms) == 1 or any(form not in vocabulary for form in forms):
            found.append(token)
    return found


def _of_unigram(content: dict[str, Any]) -> list[str]:
    """Characters, bytes, the unknown token, that of the lowest score, and tokens with a character that is
    no token where there are no bytes for it.
    """
    model, vocabulary = content["model"], _vocabulary(content)
    entries: list[tuple[str, float]] = model["vocab"]
    written = _bytes(content)
    found = [*written, min(entries, key=lambda entry: entry[1])[0]]
    if model.get("unk_id") is not None:
        found.append(entries[model["unk_id"]][0])
    for token, _ in entries:
        if len(token) == 1 or not (written or all(sign in vocabulary for sign in token)):
            found.append(token)
    return found


def _bytes(content: dict[str, Any]) -> list[str]:
    """The tokens that stand for single bytes; none where there are no such tokens.

    Byte-level tokenizers may lack bytes that their text never had, or that UTF-8 never has.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = _vocabulary(content)
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    if content["model"].get("byte_fallback") and all(token in vocabulary for token in fallback):
        return fallback
    alphabet = [token for token in sorted(ByteLevel.alphabet()) if token in vocabulary]
    level = "ByteLevel" in json.dumps(content.get("pre_tokenizer")) + json.dumps(content.get("decoder"))
    return alphabet if level else []


def _merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs; older files write each as one string."""
    merges = content["model"].get("merges") or []
    pairs = (m.split(" ") if isinstance(m, str) else m for m in merges)
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
