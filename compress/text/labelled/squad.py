"""Answers in a context: the layout of SQuAD, and the ways in which flat rows write answers.

An answer counts with the character at which it begins. Where none is given it is looked for, and begins where
it is found first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.errors import UserError


def questions(data: list[Any], file: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of `question`, `context`, `answers`, each with its place.

    Raises:
        UserError: what lies in it is not laid out so.
    """
    for a, article in enumerate(data):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{where}: {file}, data {a}")):
            place = f"{file}, data {a}, paragraph {p}"
            for q, asked in enumerate(_list(paragraph, "qas", f"{where}: {place}")):
                if not isinstance(asked, dict):
                    raise UserError(f"{where}: {place}, question {q} is no JSON object")
                row = {"question": asked.get("question"), "context": paragraph.get("context")}
                yield f"{place}, question {q}", {**row, "answers": asked.get("answers") or []}


def answers(given: Any, context: str, place: str) -> tuple[tuple[int, str], ...]:
    """(first character, answer) of each; none of a question without an answer.

    `given` is null, a text, a list of texts, `{text, answer_start}` with lists or single values, or a list of
    such.

    Raises:
        UserError: an answer that does not stand there, or nowhere.
    """
    found = dict.fromkeys(_placed(answer, start, context, place) for answer, start in _pairs(given, place))
    return tuple(found)


def _pairs(given: Any, place: str) -> Iterator[tuple[str, int | None]]:
    if given is None or given == "":
        return
    if isinstance(given, str):
        yield given, None
    elif isinstance(given, list):
        for one in given:
            yield from _pairs(one, place)
    elif isinstance(given, dict) and "text" in given:
        texts, starts = given["text"], given.get("answer_start")
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts] * len(texts)
        if len(starts) != len(texts):
            raise UserError(f"{place}: {len(texts)} answers and {len(starts)} values of answer_start")
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not (start is None or type(start) is int):
                raise UserError(f"{place}: an answer is a text, and answer_start the number of its character")
            if text:
                yield text, start
    else:
        raise UserError(f"{place}: answers are texts, or {{text, answer_start}}")


def _placed(answer: str, start: int | None, context: str, place: str) -> tuple[int, str]:
    if start is None:
        start = context.find(answer)
        if start < 0:
            raise UserError(f"{place}: the answer '{answer:.60}' is not in the context; copy it from there")
    elif start < 0 or context[start : start + len(answer)] != answer:
        there = context[max(start, 0) : max(start, 0) + len(answer)]
        raise UserError(
            f"{place}: at character {start} the context has '{there:.60}', not the answer '{answer:.60}'; "
            "mend answer_start (it counts characters, not bytes)"
        )
    return start, answer


def _list(holder: Any, name: str, place: str) -> list[Any]:
    found = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{place} has no list of '{name}', as SQuAD is laid out")
    return found
