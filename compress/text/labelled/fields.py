"""Which column is the text, the second text, the label, the words: named in the recipe, or recognised.

Names are compared without case. Two texts that belong together by their names come first (`premise` and
`hypothesis`), then one text. Whatever the recipe names is taken as named, and the rest recognised among the
other columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import UserError
from compress.text.labelled.base import Kind
from compress.text.labelled.config import LabelledConfig

_WORDS = ("tokens", "words")
_TAGS = ("ner_tags", "tags", "pos_tags", "ner", "pos", "chunk_tags", "labels", "label")
_PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("premise", "hypo"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("#1 string", "#2 string"),
    ("anchor", "positive"), ("query", "positive"), ("query", "passage"), ("query", "document"),
    ("question", "sentence"), ("question", "passage"), ("question", "answer"), ("text", "text_pair"),
    ("summary", "function"),
)  # fmt: skip
_TEXTS = (
    "text", "sentence", "utterance", "query", "question", "content", "review", "tweet", "comment", "body",
    "document", "article", "dialogue", "premise", "sentence1", "source", "input", "function",
)  # fmt: skip
_LABELS = (
    "gold_label", "label", "labels", "category", "categories", "intent", "target", "class", "score",
    "is_duplicate", "quality", "similarity", "sentiment", "emotion", "topic", "rating", "stars",
)  # fmt: skip
_TARGETS = ("summary", "highlights", "translation", "target", "output", "completion", "reference")
_SOURCES = ("document", "article", "dialogue", "source", "input", "function")  # of which a text is made
_ANSWERS = ("answers", "answer")
_CHATS = ("messages",)


@dataclass(frozen=True)
class Fields:
    """Columns by what they are; of no name where there is none. `kind` where the names tell it."""

    text: str = ""
    pair: str = ""
    label: str = ""
    words: str = ""
    kind: Kind | None = None


def recognised(columns: Sequence[str], config: LabelledConfig, origin: str, where: str) -> Fields:
    """The columns of a table.

    Raises:
        UserError: one is named that is not there, or one is neither named nor recognised.
    """
    for name in ("text", "pair", "label", "words"):
        given = getattr(config, name)
        if given is not None and given not in columns:
            raise UserError(f"labelled.{name}: {origin} has no column '{given}' (it has {_list(columns)})")
    kind = config.kind
    # columns that the recipe names are nothing else besides
    named = {config.text, config.pair, config.label, config.words}
    free = {name.lower(): name for name in reversed(columns) if name not in named}

    def first(names: Sequence[str]) -> str:
        return next((free[name] for name in names if name in free), "")

    chat = config.text if kind == "chat" and config.text else first(_CHATS)
    labelled = config.text or config.label or (first(_TEXTS) and first(_LABELS))
    if kind == "chat" or (kind is None and chat and not labelled):
        return _complete(Fields(chat, kind="chat"), columns, origin)
    words = config.words or ("" if config.text else first(_WORDS))
    if kind == "tags" or (kind is None and words):
        return _complete(
            Fields(words=words, label=config.label or first(_TAGS), kind="tags"), columns, origin
        )
    context = config.pair or first(["context"])
    asked = config.text or first(["question"])
    if kind == "span" or (kind is None and asked and context == first(["context"]) != ""):
        label = config.label or first(_ANSWERS)
        if label or kind == "span":
            return _complete(Fields(asked, context, label, kind="span"), columns, origin)
    if kind == "text" or (kind is None and not config.label and _translates(free, config)):
        text = config.text or first(_SOURCES) or first(_TEXTS)
        label = config.label or first([name for name in (*_TARGETS, *_LABELS) if name != text.lower()])
        return _complete(Fields(text, "", label, kind="text"), columns, origin)
    label = config.label or ("" if kind == "pair" else first(_LABELS))
    rest = [name for name in columns if name != label]
    text, pair = _texts(rest, config)
    if not label and text and pair and kind is None:
        kind = "pair"
    return _complete(Fields(text, pair, label, kind=kind), columns, origin)


def _translates(free: dict[str, str], config: LabelledConfig) -> bool:
    """Whether the names of columns tell that a text is to be made of another, and no label is among them."""
    if any(name in free for name in _LABELS if name != "target"):
        return False
    target = any(name in free for name in _TARGETS if name != "target")
    return target or ("target" in free and (config.text or "source") in (config.text, *free))


def _texts(columns: Sequence[str], config: LabelledConfig) -> tuple[str, str]:
    """The text and the second one."""
    known = {name.lower(): name for name in reversed(columns)}
    for one, other in _PAIRS:
        if one in known and other in known:
            pair = known[one], known[other]
            if config.text in (None, pair[0]) and config.pair in (None, pair[1]):
                return pair
    text = config.text or next((known[n] for n in _TEXTS if n in known and known[n] != config.pair), "")
    return text, config.pair or ""


def _complete(fields: Fields, columns: Sequence[str], origin: str) -> Fields:
    wanted = {
        "tags": ("words", "label"),
        "span": ("text", "pair", "label"),
        "pair": ("text", "pair"),
        "chat": ("text",),
    }
    for name in wanted.get(fields.kind or "", ("text", "label")):
        if not getattr(fields, name):
            of = f" of kind '{fields.kind}'" if fields.kind else ""
            raise UserError(
                f"labelled.{name}: no column of {origin} is recognised as the {name}{of} (it has "
                f"{_list(columns)}); set labelled.{name} to one of them"
            )
    return fields


def _list(columns: Sequence[str]) -> str:
    shown = [f"{name:.40}" for name in columns[:20]]
    return ", ".join(shown) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
