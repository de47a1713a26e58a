"""One loop trains a model of BASE's shape from random weights: ours, nanoGPT's, or the Hugging Face Trainer.

A masked-LM is trained by ours and the Trainer, which hides tokens with the collator that it has.

    python training_worker.py BASE SETTINGS

SETTINGS is a JSON object: `loop`, `steps`, `batch`, `window`, `seed`, `learning_rate`; for ours also other
fields of `train`; `compiled` for nanoGPT's. Every loop gets the same text, shape, start, precision, threads,
and calls `Clock` when a step begins, so that what lies between two calls is a whole step, whatever it does.
Prints a JSON object: tokens per second after the first steps, and the loss on held-out text.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from compress import TextData, Train, load, native_precision

PRECISION = native_precision()
HIDDEN = 0.15  # of a masked-LM's tokens
FIRST = 5  # steps that are not timed: memory is found, code is compiled


class Clock:
    """When each step began."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    def step_seconds(self) -> float:
        """Mean of the steps after the first ones."""
        return (self.times[-1] - self.times[FIRST]) / (len(self.times) - 1 - FIRST)


def ours(
    base: Path, model: Any, text: np.ndarray, heldout: np.ndarray, s: dict[str, Any], clock: Clock
) -> Any:
    """A pass changes a copy, which is among what its peak of memory counts."""
    window, seed, steps = s.pop("window"), s.pop("seed"), s.pop("steps")
    train = Train(tokens=steps * s["batch"] * window, heldout_points=1, **s)
    model.register_forward_pre_hook(lambda module, _: clock() if module.training else None)
    bundle = load(base, stream=True).evolve(model=model, shards=None)  # base's tokenizer, not its weights
    data = TextData.of_tokens(window, train=text, heldout=heldout)
    return bundle.apply(train, text=data, seed=seed).model


def nanogpt(
    base: Path, model: Any, text: np.ndarray, heldout: np.ndarray, s: dict[str, Any], clock: Clock
) -> Any:
    """Windows at random places, AdamW with decay on matrices, cosine with warm-up, clipping at 1."""
    window, batch, steps = s["window"], s["batch"], s["steps"]
    data = torch.from_numpy(text.astype(np.int64))
    random = torch.Generator().manual_seed(s["seed"])
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s["learning_rate"], betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.55 + 0.45 * np.cos(np.pi * i / steps)),  # down to a tenth
    )
    run = torch.compile(model) if s.get("compiled") else model
    precision = torch.autocast("cpu", torch.bfloat16) if PRECISION == "bfloat16" else nullcontext()
    model.train()
    for _ in range(steps):
        clock()
        places = torch.randint(len(data) - window, (batch,), generator=random)
        inputs = torch.stack([data[i : i + window] for i in places])
        targets = torch.stack([data[i + 1 : i + 1 + window] for i in places])
        with precision:
            logits = run(input_ids=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def trainer(
    base: Path, model: Any, text: np.ndarray, heldout: np.ndarray, s: dict[str, Any], clock: Clock
) -> Any:
    """`transformers.Trainer` with its own defaults but for the shared settings."""
    window = s["window"]
    rows = torch.from_numpy(text[: len(text) // window * window].reshape(-1, window).astype(np.int64))

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=s["steps"],
            per_device_train_batch_size=s["batch"],
            learning_rate=s["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=max(1, s["steps"] // 20),
            weight_decay=0.1,
            seed=s["seed"],
            bf16=PRECISION == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = [{"input_ids": row} if masked(model) else {"input_ids": row, "labels": row} for row in rows]
        hides = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(base), mlm_probability=HIDDEN)
        more = {"data_collator": hides} if masked(model) else {}
        Trainer(model, arguments, train_dataset=data, callbacks=[Steps()], **more).train()  # type: ignore[arg-type]
    return model


def masked(model: Any) -> bool:
    """Whether it fills in tokens."""
    return str(model.config.architectures[0]).endswith("ForMaskedLM")


LOOPS: dict[str, Callable[..., Any]] = {"ours": ours, "nanogpt": nanogpt, "trainer": trainer}


@torch.inference_mode()
def heldout_masked(base: Path, model: Any, windows: torch.Tensor) -> float:
    """Mean nats per hidden token, the same of every loop; all that are hidden are masked."""
    model.eval()
    random, token = torch.Generator().manual_seed(0), AutoTokenizer.from_pretrained(base).mask_token_id
    total, count = 0.0, 0
    for row in windows:
        hidden = torch.rand(len(row), generator=random) < HIDDEN
        logits = model(input_ids=torch.where(hidden, token, row)[None]).logits[0, hidden]
        total += float(F.cross_entropy(logits.float(), row[hidden], reduction="sum"))
        count += int(hidden.sum())
    return total / count


@torch.inference_mode()
def heldout_nll(model: Any, windows: torch.Tensor) -> float:
    """Mean nats per predicted token of windows (n, length), in float32."""
    model.eval()
    total = 0.0
    for row in windows:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), row[1:], reduction="sum"))
    return total / windows[:, 1:].numel()


def main() -> None:
    base, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    loop, window, batch = LOOPS[settings.pop("loop")], settings["window"], settings["batch"]
    text, heldout = np.load(base.parent / "train.npy"), np.load(base.parent / "heldout.npy")
    torch.manual_seed(settings["seed"])
    config = AutoConfig.from_pretrained(base)
    fills = str(config.architectures[0]).endswith("ForMaskedLM")
    model = (AutoModelForMaskedLM if fills else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    model.config.architectures = config.architectures
    windows = torch.from_numpy(heldout.astype(np.int64))
    clock = Clock()
    began = time.perf_counter()
    model = loop(base, model, text, heldout, dict(settings), clock)
    seconds = time.perf_counter() - began
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": round(batch * window / clock.step_seconds(), 1),
        "seconds": round(seconds, 2),
        "heldout_nll": heldout_masked(base, model, windows) if fills else heldout_nll(model, windows),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


main()
