"""Tokenizers trained on the text that a new model is trained on.

    bpe        byte-level byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): every text can be
               encoded, and decodes to itself
    wordpiece  BERT's: words of the text cut greedily into the longest pieces, `##` before those inside a
               word. White space is lost; a word with a character that the text never had is unknown
    unigram    SentencePiece's (Kudo 2018): the likeliest cut by scores of pieces; a space is `▁`, and stands
               before every text. What has no piece is written in bytes, or unknown. Characters take half of
               the vocabulary at most where there are bytes for the rarer ones

What else is in a vocabulary belongs to the family. A text of Llama's or GPT-2's has one token,
`<|endoftext|>`, that begins, separates and pads: small vocabularies have no rows to waste. BERT's stands
between `[CLS]` and `[SEP]`, T5's ends with `</s>`, and its 100 last tokens stand for spans that are left out,
`<extra_id_0>` the very last.

Cost: seconds for a megabyte (unigram), for ten megabytes (the others). The same text gives the same
vocabulary: what the library makes in the order of a hash table is put in order, and scores have six decimals.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from compress.errors import UserError

Family = Literal["llama", "gpt2", "bert", "t5"]
Kind = Literal["bpe", "wordpiece", "unigram"]

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unknown|>"
SENTINELS = 100  # of T5's
_BYTES = [f"<0x{number:02X}>" for number in range(256)]
_INSIDE = "##"  # before a piece that does not begin a word
_SPACE = "▁"
# Words of a text whose spaces are `▁`: at most one before letters or before other signs; runs of white space.
_WORDS = r"▁?[^\s\p{L}\p{N}\p{M}▁]+|▁?[\p{L}\p{N}\p{M}]+|▁+(?=▁)|▁|\s+"
_DECIMALS = 6
_LADDER = 1e-4  # between scores of characters that the trainer puts in


class Specials(NamedTuple):
    """Tokens that are no text, numbered from 0.

    Attributes:
        roles: what `transformers` calls each, in order; some may be the same token.
        one, two: what is written around a text, and around a pair; none where nothing is.
        types: whether texts of a pair are told apart by token types.
        last: tokens at the end of the vocabulary.
    """

    roles: Mapping[str, str]
    one: str | None = None
    two: str | None = None
    types: bool = False
    last: tuple[str, ...] = ()

    @property
    def tokens(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(self.roles.values()))

    @property
    def unknown(self) -> str | None:
        """The token of what cannot be written."""
        return self.roles.get("unk_token")


def specials_of(family: Family, kind: Kind, sentinels: int = SENTINELS) -> Specials:
    """The special tokens of a family; a t5 has `sentinels`.

    >>> specials_of("llama", "bpe").tokens
    ['<|endoftext|>']
    >>> specials_of("t5", "unigram").tokens
    ['<pad>', '</s>', '<unk>']
    """
    if family == "bert":
        roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        one = "[CLS]:0 $A:0 [SEP]:0"
        return Specials(_named(roles), one, f"{one} $B:1 [SEP]:1", types=True)
    if family == "t5":
        roles = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        last = tuple(f"<extra_id_{number}>" for number in reversed(range(sentinels)))
        return Specials(_named(roles), "$A </s>", "$A </s> $B </s>", last=last)
    roles = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "pad": END_OF_TEXT}
    if kind != "bpe":  # bytes can write everything
        roles["unk"] = UNKNOWN
    return Specials(_named(roles))


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    context: int,
    kind: Kind = "bpe",
    family: Family = "llama",
    *,
    lowercase: bool = False,
    byte_fallback: bool = True,
    sentinels: int = SENTINELS,
) -> Any:
    """A `PreTrainedTokenizerFast` with exactly `vocab_size` tokens.

    Args:
        texts: to train on.
        vocab_size: special tokens and sentinels among them.
        context: the longest text, in tokens.
        kind: the algorithm.
        family: whose special tokens it has.
        lowercase: texts are lower-cased and lose their accents (wordpiece).
        byte_fallback: what has no piece is written in bytes (unigram).
        sentinels: that stand for spans left out (t5).

    Raises:
        UserError: the text has too few pieces for so many tokens, or more characters than these hold.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    specials = specials_of(family, kind, sentinels)
    if kind == "wordpiece":
        tokenizer = _wordpiece(list(texts), vocab_size, specials, lowercase)
    elif kind == "unigram":
        tokenizer = _unigram(list(texts), vocab_size, specials, byte_fallback)
    else:
        tokenizer = _byte_pairs(texts, vocab_size, specials)
    tokenizer.add_special_tokens([*specials.tokens, *specials.last])
    if (found := tokenizer.get_vocab_size()) > vocab_size:
        _refuse_characters(found, vocab_size)
    elif found < vocab_size:
        raise UserError(
            f"architecture.vocab_size: {vocab_size} tokens were asked, the text yields only {found}: give "
            "more text or ask for fewer"
        )
    if specials.one is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=specials.one,
            pair=specials.two,
            special_tokens=[
                (token, number) for number, token in enumerate(specials.tokens) if token in specials.one
            ],
        )
    more: dict[str, Any] = {"extra_special_tokens": list(specials.last)} if specials.last else {}
    if specials.types:
        more["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **specials.roles,
        **more,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _byte_pairs(texts: Iterable[str], size: int, specials: Specials) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size - len(specials.last), 0),
        special_tokens=specials.tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _wordpiece(texts: list[str], size: int, specials: Specials, lowercase: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    words = pre_tokenizers.BertPreTokenizer()
    signs = sorted(set().union(*(normalizer.normalize_str(text) for text in texts)))
    alphabet = [sign for sign in signs if words.pre_tokenize_str(sign)]  # white space makes no word
    # what can stand inside a word can do so in a text to come, too
    inside = [_INSIDE + sign for sign in alphabet if len(_cut(normalizer, words, f"x{sign}")) == 1]
    pieces = Tokenizer(models.WordPiece(unk_token=specials.unknown))
    pieces.normalizer, pieces.pre_tokenizer = normalizer, words
    # as special tokens, and the alphabet sorted: then their numbers, by which equal counts are ordered, are
    # the same every time
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(size - len(specials.last), 0),
        special_tokens=[*specials.tokens, *inside],
        initial_alphabet=alphabet,
        continuing_subword_prefix=_INSIDE,
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    vocabulary = json.loads(pieces.to_str())["model"]["vocab"]
    result = Tokenizer(models.WordPiece(vocabulary, unk_token=specials.unknown))
    result.normalizer, result.pre_tokenizer = normalizer, words
    result.decoder = decoders.WordPiece(prefix=_INSIDE)
    return result


def _unigram(texts: list[str], size: int, specials: Specials, byte_fallback: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False)
    words = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(_WORDS), "isolated")])
    # with those of "<0x1F>": such a text is then cut into them, and never taken for a byte
    signs = {_SPACE, *(set("".join(_BYTES)) if byte_fallback else ())}
    written = _BYTES if byte_fallback else []
    room = size - len(specials.tokens) - len(written) - len(specials.last)
    counts = Counter(sign for text in texts for sign in text if sign != " ")
    often = sorted(counts, key=lambda sign: (-counts[sign], sign))
    most = room // 2 - len(signs) if byte_fallback else len(often)
    rare = str.maketrans(dict.fromkeys(often[max(most, 0) :], " "))  # written in bytes
    signs |= set(often[: max(most, 0)])
    if room < len(signs):
        _refuse_characters(size - room + len(signs), size)
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = words
    trainer = trainers.UnigramTrainer(
        vocab_size=room, initial_alphabet=sorted(signs), special_tokens=[], show_progress=False
    )
    pieces.train_from_iterator((text.translate(rare) for text in texts) if rare else texts, trainer)
    scored = _settled(json.loads(pieces.to_str())["model"]["vocab"])
    # below any cut of the text "<0x1F>" into single characters
    never = len(_BYTES[0]) * scored[-1][1] - 1.0
    vocabulary = [(token, 0.0) for token in specials.tokens] + [(token, never) for token in written] + scored
    unknown = specials.tokens.index(str(specials.unknown))
    result = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=byte_fallback))
    result.pre_tokenizer = words
    result.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    return result


def _settled(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Pieces with their scores, the likeliest first, as they are the same every time.

    Characters that no likely cut has are put in by the trainer, a step above one another from the lowest
    score, in the order of a hash table: all get the lowest.

    >>> _settled([("ab", -1.0), ("y", -8.9999), ("z", -9.0), ("x", -8.9998), ("w", -8.0)])
    [('ab', -1.0), ('w', -8.0), ('x', -9.0), ('y', -9.0), ('z', -9.0)]
    """
    scored = {piece: round(score, _DECIMALS) for piece, score in pieces}
    bottom = step = min(scored.values())
    for piece in sorted((piece for piece in scored if len(piece) == 1), key=scored.__getitem__):
        if scored[piece] > step + 1.5 * _LADDER:
            break
        step, scored[piece] = scored[piece], bottom
    return sorted(scored.items(), key=lambda entry: (-entry[1], entry[0]))


def _cut(normalizer: Any, words: Any, text: str) -> list[Any]:
    found: list[Any] = words.pre_tokenize_str(normalizer.normalize_str(text))
    return found


def _refuse_characters(needed: int, asked: int) -> None:
    raise UserError(
        f"architecture.vocab_size: {asked} tokens were asked, and special tokens, bytes and the text's "
        f"characters alone are {needed}: ask for more"
    )


def _named(roles: Mapping[str, str]) -> dict[str, str]:
    return {f"{role}_token": token for role, token in roles.items()}
