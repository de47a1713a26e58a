"""The time of a decoded token in two models, as a share: what a latency target is about.

The whole model is timed, as `compress.measure` times it: one token at a time after a prompt of 512, or what
the context has room for, with the cache that it left; garbage collection off. An encoder-decoder is timed by
the tokens of its answer to a source of 512, which was read before. A model that gives no text is timed by a
text of 128 tokens, batch 1.

The two models take turns of a few steps, the first to go changing, so that a machine that slows down slows
both, and the first turn of each is not counted. On a CPU the clock is that of the calling thread, which takes
part in all the work, so that time that other programs have is not counted. What they do only ever adds to a
step; so the share is that of the lower quartiles of all steps.

A search that asks many shapes picks one whose time came out low by chance. So the shape that is taken is
timed again, for longer, and that is what is reported.
"""

import statistics
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from compress.host.memory import no_garbage_collection
from compress.tasks.base import longest_text
from compress.tasks.registry import task_of
from compress.tasks.seq2seq import proceed, read

Clock = Callable[[], float]
ROUNDS, CAREFUL = 8, 30  # while searching, and of what is taken
_PROMPT, _STEPS = 512, 8
_TEXT = 128  # tokens


def decode_shares(
    model: Any, whole: Any, rounds: int = ROUNDS, clock: Clock | None = None
) -> tuple[float, list[float]]:
    """The seconds a decoded token, or a text, takes in `model` over those in `whole`: of all rounds, and of
    each."""
    clock = clock or (time.thread_time if whole.device.type == "cpu" else time.perf_counter)
    task = task_of(whole.config)
    kind = (_Answerer if task.stacks == 2 else _Decoder) if task.writes else _Reader
    pair = kind(model, clock), kind(whole, clock)
    steps: tuple[list[list[float]], list[list[float]]] = ([], [])
    with no_garbage_collection():
        for number in range(rounds + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                steps[which].append(pair[which].steps())
    own, others = steps[0][1:], steps[1][1:]
    share = _quartile([*chain(*own)]) / _quartile([*chain(*others)])
    return share, [_quartile(mine) / _quartile(its) for mine, its in zip(own, others, strict=True)]


def timed(model: Any) -> str:
    """What is timed of a model, in words."""
    task = task_of(model.config)
    if task.writes:
        return "decode" if task.stacks == 1 else "a token of an answer, the source read,"
    return f"a text of {min(_TEXT, longest_text(model))} tokens"


class _Reader:
    """A model that reads a text, batch 1, always the same one."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self.model, self.clock = model, clock
        length = min(_TEXT, longest_text(model))
        self.ids = torch.full((1, length), _anything(model), dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def steps(self) -> list[float]:
        """Seconds of a few texts."""
        seconds = []
        for _ in range(_STEPS):
            started = self.clock()
            self.model(input_ids=self.ids)[0].flatten()[0].item()
            seconds.append(self.clock() - started)
        return seconds


class _Decoder:
    """A model that goes on with a text, batch 1, always the same token."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self.model, self.clock = model, clock
        self.most = max(_STEPS + 1, longest_text(model))
        self.length = self.most  # no room: the first steps read a prompt
        self.cache: Any = None

    @torch.inference_mode()
    def steps(self) -> list[float]:
        """Seconds of a few steps."""
        if self.length + _STEPS > self.most:
            self.length = min(_PROMPT, self.most - _STEPS)
            self.cache = self._call(self.length).past_key_values
        seconds = []
        for _ in range(_STEPS):
            started = self.clock()
            self._call(1).logits[0, -1, 0].item()
            seconds.append(self.clock() - started)
        self.length += _STEPS
        return seconds

    def _call(self, tokens: int) -> Any:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.model.device)
        cache = self.cache if tokens == 1 else None
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True)


class _Answerer:
    """An encoder-decoder that answers a source, batch 1, always with the same token."""

    def __init__(self, model: Any, clock: Clock) -> None:
        self.model, self.clock = model, clock
        self.source = torch.full(
            (1, min(_PROMPT, longest_text(model))), _anything(model), device=model.device
        )
        self.token = self.source[:, :1]
        self.most = max(_STEPS, min(_PROMPT, longest_text(model)))
        self.length = self.most  # no room: the first steps read the source
        self.reading: Any = None

    @torch.inference_mode()
    def steps(self) -> list[float]:
        """Seconds of a few steps."""
        if self.length + _STEPS > self.most:
            self.reading, _ = read(self.model, self.source)
            self.length = 1
        seconds = []
        for _ in range(_STEPS):
            started = self.clock()
            proceed(self.model, self.reading, self.token)[0, 0].item()
            seconds.append(self.clock() - started)
        self.length += _STEPS
        return seconds


def _anything(model: Any) -> int:
    """A token that is no padding, which some models look for."""
    return 0 if getattr(model.config, "pad_token_id", None) else 1


def _quartile(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]
