"""A byte-level BPE tokenizer as GGUF metadata.

llama.cpp knows the merges and the tokens from the file, but splits text into words by rules of its own, which
the file only names. The name is recognised from the tokenizer's rules; a tokenizer whose rules have no name
here is refused, because llama.cpp would cut text otherwise and the model would read it badly.
Limits: BPE on bytes as in GPT-2, Llama 3, Qwen 2 and SmolLM; no sentencepiece.
"""

import json
from dataclasses import dataclass
from typing import Any

from compress.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {  # regular expression -> llama.cpp's name
    _ENDINGS + _WORDS % r"\p{N}{1,3}": "llama-bpe",
    _ENDINGS + _WORDS % r"\p{N}": "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    split: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]  # bos, eos, pad, unk -> id
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def vocabulary(tokenizer: Any, size: int, split: str | None = None) -> Vocabulary:
    """Read a fast tokenizer for a model with `size` rows of embeddings; `split` overrides the name.

    Raises UserError for a tokenizer that is no byte-level BPE, or whose splitting has no known name.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise UserError(
            f"export_gguf: the tokenizer is a {model.get('type')} that this export does not write, only "
            "byte-level BPE; leave this export out"
        )
    names = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    for token in content.get("added_tokens", ()):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(names) >= size:
        raise UserError(
            f"export_gguf: the tokenizer has token {max(names)}, the model only {size} embeddings"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }
    template = tokenizer.chat_template
    return Vocabulary(
        split=split or split_name(content),
        tokens=tuple(names.get(index, f"[unused {index}]") for index in range(size)),
        types=tuple(kinds.get(index, UNUSED) for index in range(size)),
        merges=tuple(merges),
        special={name: int(index) for name, index in special.items() if index is not None},
        add_bos=len(framed) > len(plain) and framed[0] == special["bos"],
        add_eos=len(framed) > len(plain) and framed[-1] == special["eos"],
        chat_template=template if isinstance(template, str) else None,
    )


def split_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text into words.

    >>> split_name({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "model": {}})
    'gpt-2'
    """
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", []) if outer.get("type") == "Sequence" else [outer]
    kinds = [step.get("type") for step in steps]
    name = None
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own_words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_words:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and own_words and steps[0].get("individual_digits"):
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not own_words and steps[0].get("behavior") == "Isolated":
            name = _PATTERNS.get(steps[0].get("pattern", {}).get("Regex", ""))
    # only Llama 3's splitting takes whole words that are tokens without merging
    if name is None or bool(content["model"].get("ignore_merges")) != (name == "llama-bpe"):
        raise UserError(
            "export_gguf: llama.cpp has no name that this export knows for how the tokenizer splits text "
            f"({', '.join(map(str, kinds))}); set pre_tokenizer to its name in llama.cpp"
        )
    return name
