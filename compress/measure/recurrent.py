"""A recurrent reference: an LSTM of the base's parameters, trained on as many tokens of the same text.

Method. What a transformer owes to attention rather than to its size and its text shows beside a model of that
size and text without attention. One layer of `torch.nn.LSTM`; the embedding is the output layer, too (tied,
Press & Wolf 2017), so its width is the state's. It is solved for: parameters are within 5 % of the base's.
Windows, batch and number of tokens are those that trained the base; the order is drawn anew for each epoch.
AdamW (0.9, 0.95), a tenth of warm-up and a cosine to nothing, gradients clipped to a norm of 1.

Maths (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000). With x_t = sqrt(n) E[w_t]:

    i, f, g, o = split(W x_t + b + U h_{t-1} + c)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g),    h_t = sigmoid(o) * tanh(c_t)
    log p(w_{t+1} | w_1 .. w_t) = log softmax(E h_t + d)

with d biases of the vocabulary, first the logarithms of the unigram model. A vocabulary of V and a width of n
make V n + V + 8 n^2 + 8 n parameters. A window begins with a state of zeros, and its first token is not
predicted: contexts stay inside the window.

Cost: about that of training the base; positions follow one another, so small batches use few cores. Limits:
no dropout, one layer, one learning rate for all: one who tunes a recurrent model for a text may get a better
one. Of very few parameters the nearest width may miss by more; the record says how many it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compress.host.progress import track
from compress.measure.ngrams import Unigram
from compress.models.running import autocast, backward_passes, native_precision

Ints = npt.NDArray[np.int64]
_LEARNING_RATE = 8e-3
_WARM_UP = 0.1  # share of the steps
_CLIP = 1.0
_SCORED = 1 << 24  # logits at a time: 64 MB


class Recurrent(nn.Module):
    """Tied embedding, one LSTM layer of the same width, biases of the vocabulary."""

    def __init__(self, vocabulary: int, width: int, seed: int = 0) -> None:
        """Random weights of `seed`; torch's own generator is left as it was."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # what these draw is drawn again below
            self.embedding = nn.Embedding(vocabulary, width)
            self.lstm = nn.LSTM(width, width, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        generator = torch.Generator().manual_seed(seed)
        scale = width**-0.5
        with torch.no_grad():
            self.embedding.weight.normal_(0.0, scale, generator=generator)
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("bias"):
                    parameter.zero_()
                else:
                    parameter.uniform_(-scale, scale, generator=generator)
                if name == "bias_ih_l0":
                    parameter[width : 2 * width] = 1.0  # forget gates begin open (Gers et al. 2000)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each: [batch, length] -> [batch, length, V]."""
        # rows of the table are as small as outputs need them; inputs are of size 1
        inputs = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        states, _ = self.lstm(inputs)  # [batch, length, width]
        return nn.functional.linear(states, self.embedding.weight, self.bias)

    def window_nll(self, windows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Nats per predicted token: int [n, window] -> float64 [n, window - 1]."""
        rows = max(1, _SCORED // (windows.shape[1] * self.bias.numel()))
        found = []
        with torch.inference_mode():
            for start in range(0, len(windows), rows):
                part = self._ids(windows[start : start + rows])
                found.append(self._nats(part, "none").cpu().numpy())  # [rows, window - 1]
        return np.concatenate(found).astype(np.float64)

    def loss(self, rows: npt.NDArray[Any]) -> Tensor:
        """Mean nats per predicted token of windows [n, window]."""
        return self._nats(self._ids(rows), "mean")

    def _ids(self, tokens: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(tokens, np.int64)).to(self.bias.device)

    def _nats(self, ids: Tensor, reduction: str) -> Tensor:
        logits = self(ids[:, :-1])  # [n, window - 1, V]
        nats = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)
        return nats.reshape(len(ids), -1) if reduction == "none" else nats


def parameters_of(vocabulary: int, width: int) -> int:
    """Parameters of a `Recurrent`, the tied matrix once.

    >>> parameters_of(50, 8), sum(p.numel() for p in Recurrent(50, 8).parameters())
    (1026, 1026)
    """
    return vocabulary * width + vocabulary + 8 * width * width + 8 * width


def width_for(parameters: int, vocabulary: int) -> int:
    """The width whose model comes nearest to so many parameters; 1 where even that has more.

    >>> width_for(1026, 50)
    8
    """
    linear = vocabulary + 8
    root = (math.sqrt(linear * linear + 32.0 * max(0, parameters - vocabulary)) - linear) / 16.0
    candidates = [max(1, math.floor(root)), max(1, math.ceil(root))]
    return min(candidates, key=lambda width: abs(parameters_of(vocabulary, width) - parameters))


def train_recurrent(
    stream: npt.NDArray[Any],
    vocabulary: int,
    parameters: int,
    *,
    tokens: int,
    batch: int,
    window: int,
    begin: tuple[int, ...] = (),
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[Recurrent, int]:
    """A model of about `parameters` parameters, and how many tokens it was trained on.

    Args:
        stream: ids [n] of the training text, below `vocabulary`.
        tokens: to train on, rounded to whole steps.
        batch: windows per step; fewer where the text has no more.
        window: inputs per window, each predicting the token after it.
        begin: what every window begins with.
    """
    place = device or torch.device("cpu")
    model = Recurrent(vocabulary, width_for(parameters, vocabulary), seed).to(place)
    batch = min(batch, (len(stream) - window) // window)
    if batch < 1:
        raise ValueError(f"{len(stream)} tokens hold no window of {window}")
    steps = max(1, round(tokens / (batch * window)))
    with torch.no_grad():  # how frequent tokens are need not be learnt step by step
        model.bias.copy_(torch.from_numpy(np.log(Unigram.fit(stream, vocabulary).probabilities)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    drawn = _batches(stream, batch, window, begin, seed)
    work = track(steps * batch * window, "LSTM reference", "token")
    with torch.enable_grad(), backward_passes(), work as bar:
        for step, rows in zip(range(steps), drawn, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * _rate(step, steps)
            with autocast(place, native_precision()):
                loss = model.loss(rows)  # rows: [batch, window + 1]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.advance(batch * window, loss=loss.item())
    return model.eval(), steps * batch * window


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up to 1 over the warm-up, then a cosine that ends near 0.

    >>> [round(_rate(step, 10), 2) for step in (0, 1, 5, 9)]
    [1.0, 0.98, 0.5, 0.02]
    """
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step + 1 - warm) / (steps + 1 - warm)))


def _batches(
    stream: npt.NDArray[Any], batch: int, window: int, begin: tuple[int, ...], seed: int
) -> Iterator[Ints]:
    """Rows [batch, window + 1] without end; an epoch visits every window once, from an offset of its own."""
    count = (len(stream) - window) // window
    head = np.tile(np.array(begin, np.int64), (batch, 1))
    waiting: list[int] = []  # where windows begin
    for epoch in range(2**31):
        generator = np.random.default_rng([seed, epoch])
        offset = int(generator.integers(window))
        waiting += (offset + window * generator.permutation(count)).tolist()
        while len(waiting) >= batch:
            taken, waiting = waiting[:batch], waiting[batch:]
            text = np.stack([stream[start : start + window + 1 - len(begin)] for start in taken])
            yield np.concatenate([head, text], axis=1).astype(np.int64)
