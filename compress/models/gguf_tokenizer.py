"""How a GGUF file's tokenizer cuts text, by the name that llama.cpp knows it by.

The file holds merges and tokens, but only names how text is cut into words before they are merged
(`tokenizer.ggml.pre`). transformers knows some of those names and takes all others for GPT-2's, so that
numbers, for example, become tokens that the model never saw. Here is a table of llama.cpp's names, each
compared with llama.cpp itself by a test; a name that is not in it is refused. Some vocabularies also take a
word that is a token as it stands, without merging, and begin every text with a token unless the file says no.
A sentencepiece vocabulary has a space put before every text, also before one that begins with a space.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import UserError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED % ("", "", "")
_GPT4O = _CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?", "{1,3}")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", "", r"\p{N}+", "[0-9][0-9][0-9]")


class Words(NamedTuple):
    """How text becomes words.

    Attributes:
        splits: regular expressions whose matches are words of their own, one after the other; an empty one
            stands for GPT-2's rule.
        whole: a word that is a token is not merged.
        begins: the first token of a text is BOS unless the file says otherwise.
    """

    splits: tuple[str, ...]
    whole: bool = False
    begins: bool = False


_KINDS = {
    "default": Words(_DEFAULT),
    "gpt-2 phi-2 roberta-bpe mpt olmo jais trillion jina-es jina-de jina-v2-es jina-v2-de jina-v2-code "
    "gigachat granite-docling a.x-4.0 mellum modern-bert": Words(("",)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": Words((_DIGIT, "")),
    "falcon": Words((r"[\p{P}\$\+<=>\^~\|`]+", "", "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Words(
        (_LLAMA3,), whole=True, begins=True
    ),
    "dbrx smaug-bpe": Words((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen stablelm2 megrez kormo f2llmv2 hunyuan solar-open": Words((_QWEN2,)),
    "tekken": Words((_TEKKEN,), whole=True, begins=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Words((_GPT4O,)),
}
WORDS = {name: words for names, words in _KINDS.items() for name in names.split()}


def cut_as_llama_cpp(file: Path, tokenizer: Any) -> Any:
    """The tokenizer itself, as transformers made it of a GGUF file, cutting text as llama.cpp does.

    Raises:
        UserError: the file asks for a way to cut text that is not known here.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def said(key: str, default: Any) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    kind = said("model", "")
    if said("remove_extra_whitespaces", False) and kind != "t5":
        raise UserError(
            f"{file}: tokenizer.ggml.remove_extra_whitespaces is not read here; take the original checkpoint"
        )
    if kind == "gpt2":
        _cut_words(file, tokenizer, said)
    elif kind == "llama":
        _prefix(file, tokenizer, bool(said("add_space_prefix", True)))
    return tokenizer


def _cut_words(file: Path, tokenizer: Any, said: Any) -> None:
    from tokenizers import Regex, pre_tokenizers

    name = said("pre", "default")
    words = WORDS.get(name)
    if words is None:
        raise UserError(
            f"{file}: tokenizer.ggml.pre: '{name}' is a way to cut text into words that is not known here "
            "(those of GPT-2, Llama 3, Qwen 2 and their like are); take the original checkpoint"
        )
    # GPT-2's rule comes with the step that spells bytes, where it is the last
    last = not words.splits[-1]
    steps: list[Any] = []
    for split in words.splits[:-1] if last else words.splits:
        if split == _DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(split or _GPT2_WORDS), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if steps[1:] else steps[0]
    backend.model.ignore_merges = words.whole
    if words.begins and said("add_bos_token", None) is None:
        tokenizer.add_bos_token = True


def _prefix(file: Path, tokenizer: Any, prefix: bool) -> None:
    """Whether a space is put before a text, in a sentencepiece vocabulary."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    made = json.loads(backend.to_str())
    if (made["pre_tokenizer"] or {}).get("type") == "Metaspace" and prefix:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(steps), None
    elif (made["pre_tokenizer"] or {}).get("type") == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    elif prefix != ("Prepend" in json.dumps(made["normalizer"])):
        raise UserError(
            f"{file}: tokenizer.ggml.add_space_prefix: {prefix} is not read here; take the original "
            "checkpoint"
        )
