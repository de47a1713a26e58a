"""What is compared of artifacts and graphs with stock `transformers`; a check gives a line per difference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import AutoConfig

from compress.generation.generator import TextGenerator
from compress.models.checkpoints import quiet_transformers
from compress.runtimes.onnx_encoder import OnnxEncoder
from compress.runtimes.onnx_runtime import OnnxRuntime
from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
from compress.tasks.base import Task
from compress.tasks.registry import task_of
from compress.tasks.seq2seq import start_token

TOLERANCE = 2e-4  # of the largest answer: float32 in another order
_TOKENS = 8
_PAD = 0


def stock(folder: Path) -> Any:
    """What stock `transformers` makes of a folder, in float32, the class that its configuration names."""
    import transformers

    config = AutoConfig.from_pretrained(folder)
    with quiet_transformers():
        return (
            getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
        )


def answers(model: Any, ids: Any) -> Any:
    """Stock answers to ids (batch, length), those of an encoder-decoder to the second half."""
    ids = torch.from_numpy(np.asarray(ids, np.int64))
    with torch.inference_mode():
        if not model.config.is_encoder_decoder:
            return model(input_ids=ids)[0].numpy()
        middle = ids.shape[1] // 2
        start = torch.full_like(ids[:, :1], start_token(model))
        text = torch.cat((start, ids[:, middle:-1]), 1)
        return model(input_ids=ids[:, :middle], decoder_input_ids=text).logits.numpy()


def same(what: str, found: Any, expected: Any) -> Iterator[str]:
    """A line where they differ by more than the order of sums explains; NaN differs."""
    if found.shape != expected.shape:
        yield f"{what}: shape {found.shape}, not {expected.shape}"
        return
    difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    if not difference <= TOLERANCE * largest:
        yield f"{what}: differs by {difference:.3g} of {largest:.3g}"


def opened(graph: Path, task: Task) -> Any:
    """The runtime of a graph, prompts in small parts."""
    if task.continues:
        return OnnxRuntime(graph, 1, prefill_chunk=7)
    return (OnnxSeq2Seq if task.writes else OnnxEncoder)(graph, 1)


def runtime(what: str, face: Any, model: Any, ids: Any) -> Iterator[str]:
    """At once; and where text is written, in parts and token by token."""
    expected = answers(model, ids)
    yield from same(f"{what} logits", face.logits(ids), expected)
    if not face.task.writes:
        return
    if face.task.continues:
        prompt, given = ids[:, :-6], ids[:, -6:]
    else:  # the second half, from its start token on
        middle = ids.shape[1] // 2
        prompt, given = ids[:, :middle], ids[:, middle:-1]
    state = face.prefill(prompt)
    steps = [state.logits.copy()]
    for token in given.T:
        state = face.decode(state, token)
        steps.append(state.logits.copy())
    yield from same(f"{what} in parts", np.stack(steps, 1), expected[:, -len(steps) :])


def generated(what: str, folder: Path, model: Any, prompt: str) -> Iterator[str]:
    """Greedily, the text that stock `generate` writes."""
    ours = TextGenerator(folder, threads=1)
    ids = torch.tensor([ours.encode(prompt)])
    # no cache of theirs: some of its layers heed a window that the model does not
    options = {
        "use_cache": False,
        "max_new_tokens": _TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "attention_mask": torch.ones_like(ids),
    }
    if model.config.is_encoder_decoder:
        options["min_length"] = 0
        model.generation_config.forced_eos_token_id = None  # the last of as many as are asked for is no end
    with quiet_transformers(), torch.inference_mode():
        written = model.generate(ids, **options)[0]
    written = written[1:] if model.config.is_encoder_decoder else written[ids.shape[1] :]
    expected = ours.tokenizer.decode(written.tolist()).strip()
    found = ours.generate([prompt], _TOKENS)[0].strip()
    if found != expected:
        yield f"{what}: {found!r}, not {expected!r}"


def padded(graph: Path, model: Any, ids: Any) -> Iterator[str]:
    """Texts of unlike lengths in one batch, on every side, as each is alone."""
    texts = [ids[0][:19], ids[1][:5], ids[0][3:14]]
    task = task_of(model.config)
    for side in ("left", "right", "both"):
        rows, mask = _batch(texts, side)
        if task.continues:
            yield from _padded_decoder(side, graph, model, texts, rows, mask)
            continue
        face = opened(graph, task)
        if side != "right" and not face.takes_left:
            continue  # it fails, as is promised and tested
        if task.writes:
            if side == "both":
                continue
            found = face.padded(texts, _PAD, left=side == "left")
        else:
            answer = face.masked(rows, mask)
            found = [row[real == 1] for row, real in zip(answer, mask, strict=True)]
        for text, one in zip(texts, found, strict=True):
            yield from same(f"onnx padded {side}", one, answers(model, text[None])[0])


def _batch(texts: list[Any], side: str) -> tuple[Any, Any]:
    """Ids and mask (texts, 2 more than the longest)."""
    width = max(map(len, texts)) + 2
    rows = np.full((len(texts), width), _PAD, np.int64)
    mask = np.zeros_like(rows)
    for row, text in enumerate(texts):
        start = {"right": 0, "left": width - len(text), "both": (width - len(text)) // 2}[side]
        rows[row, start : start + len(text)], mask[row, start : start + len(text)] = text, 1
    return rows, mask


def _padded_decoder(
    side: str, graph: Path, model: Any, texts: list[Any], rows: Any, mask: Any
) -> Iterator[str]:
    """The graph itself, as somebody else's program feeds it: a prompt, and two tokens after it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph / "model.onnx", options, providers=["CPUExecutionProvider"])
    caches = [x for x in session.get_inputs() if x.name.startswith("past_key_values")]
    names = ["logits", *(x.name.replace("past_key_values", "present") for x in caches)]
    past = {x.name: np.zeros((len(rows), x.shape[1], 0, x.shape[3]), np.float32) for x in caches}
    given, after, steps = rows, np.asarray([[7, 11], [9, 8], [6, 30]], np.int64), []
    for step in range(3):
        feed = {"input_ids": given, "attention_mask": mask, **past, "logits_to_keep": np.asarray([1])}
        logits, *present = session.run(names, feed)
        past = {x.name: value for x, value in zip(caches, present, strict=True)}
        steps.append(logits[:, -1])
        given, mask = after[:, step : step + 1], np.concatenate((mask, np.ones_like(mask[:, :1])), 1)
    for row, text in enumerate(texts):
        alone = answers(model, np.concatenate((text, after[row]))[None])[0, len(text) - 1 :]
        yield from same(f"onnx padded {side}", np.stack(steps)[:, row], alone)
