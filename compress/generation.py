"""Text from any artifact: one loop over the runtime protocol, so torch and ONNX Runtime run the same code.

Greedy, or sampled after temperature, top-k (Fan et al. 2018) and top-p (Holtzman et al. 2019). Text is
yielded as soon as its bytes make whole characters. Needs no torch and no transformers for an ONNX folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoints import read_json
from compress.errors import UserError
from compress.runtimes import detect_runtime, open_runtime
from compress.runtimes.base import Runtime


def generate(
    artifact: Path,
    prompt: str,
    *,
    threads: int | None = None,
    limit: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Load `artifact` and continue `prompt` by at most `limit` tokens, piece by piece.

    Raises:
        UserError: no artifact there, an empty prompt, or one that fills the model's context.
    """
    tokenizer = _tokenizer(artifact)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise UserError("--prompt: is empty; give some text to continue")
    runtime = open_runtime(artifact, detect_runtime(artifact), threads)
    if len(ids) >= runtime.context:
        raise UserError(f"--prompt: has {len(ids)} tokens, but the model takes at most {runtime.context}")
    choose = Chooser(temperature, top_k, top_p, seed)
    new = continue_tokens(runtime, ids, choose, min(limit, runtime.context - len(ids)), _ends(artifact))
    return whole_characters(tokenizer, ids, new)


class Chooser:
    """Picks the next token from logits; the same seed picks the same tokens."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """A token id from logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = self.distribution(logits)
        return int(self.random.choice(len(probabilities), p=probabilities))

    def distribution(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities after temperature, top-k and top-p, (vocabulary,); they sum to one.

        >>> Chooser(temperature=1.0, top_k=2).distribution(np.log([0.5, 0.25, 0.25 / 2, 0.25 / 2])).round(3)
        array([0.667, 0.333, 0.   , 0.   ])
        """
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        ranked = np.exp(scaled[order] - scaled[order[0]])
        ranked /= ranked.sum()
        if self.top_k:
            ranked[self.top_k :] = 0
        # the smallest set whose probability reaches top_p: a token stays if those before it fall short
        ranked[np.cumsum(ranked) - ranked >= self.top_p * ranked.sum()] = 0
        result = np.zeros_like(scaled)
        result[order] = ranked / ranked.sum()
        return result


def continue_tokens(
    runtime: Runtime, prompt: Sequence[int], choose: Chooser, limit: int, ends: Sequence[int] = ()
) -> Iterator[int]:
    """At most `limit` new token ids after `prompt`, ended before a token of `ends`."""
    state = runtime.prefill(np.asarray([prompt], dtype=np.int32))
    for count in range(1, limit + 1):
        token = choose(state.logits[0])
        if token in ends:
            return
        yield token
        if count < limit:
            state = runtime.decode(state, np.asarray([token], dtype=np.int32))


def whole_characters(tokenizer: Any, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text of `tokens` after `prompt`, held back while a character is incomplete."""
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids)[len(shown) :]
    if rest:
        yield rest


def _tokenizer(artifact: Path) -> Any:
    from tokenizers import Tokenizer

    file = artifact / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{artifact}: no tokenizer.json, so this is no artifact to generate with")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    return tokenizer


def _ends(artifact: Path) -> list[int]:
    """Ids that end a text, from the generation config or the model's."""
    for name in ("generation_config.json", "config.json"):
        if (artifact / name).is_file():
            ends = read_json(artifact / name, "").get("eos_token_id")
            if ends is not None:
                return list(ends) if isinstance(ends, list) else [ends]
    return []
