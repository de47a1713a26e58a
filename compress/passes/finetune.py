"""Fine-tuning: learn the labels of `data.labelled`, with the head that they ask for; or what chats answer.

A model with a head of the task and these labels keeps it; on another, a decoder's or an encoder's with a
masked-LM head or none, a new head is put on the body. Losses: training/objectives/labelled.py. Of chats a
decoder with its own head learns what the assistant says, and what is said to it is only read
(training/objectives/chats.py); an encoder-decoder learns targets that are texts (objectives/texts.py).
Everything of the loop holds: frozen layers, rates that fall with depth, blocks that are unfrozen one after
the other, averages, early stopping by the task's own score. Pruned weights stay zero, so it heals what was
pruned.

Pairs of texts without a label teach an encoder to embed (objectives/pairs.py): it gets no head, and pools
its states as its files say, or `pooling`. So do pairs with a number where either says how.

With `lora` only small matrices beside the weights learn, and the head: they are merged into the weights when
the pass ends (models/adapters.py), so that what comes out is a model as any other. What they would put where
weights are pruned is left out in the end; the notes say how much that was, and what it cost. With `augment`
the texts of a share of the examples are changed, anew in every epoch (training/augmentation.py).

Which weights to keep is decided by the held-out rows of the data; where there are none, by those to train on,
which the plan and the notes say: there early stopping sees no overfitting.

Cost: 6 operations per parameter and token of the texts, `epochs` times; 4 with `lora`. Limits: one head;
texts longer than the model takes are cut off, which the run says. Long contexts of questions are several
examples (text/passages.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models import adapters
from compress.models.companions import pooled_by
from compress.models.heads import outside_body, renamed, with_head, without_head
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task, longest_text
from compress.tasks.embedding import Embedding
from compress.tasks.registry import TASKS, task_learnt, task_of
from compress.text.labelled.base import NAMED
from compress.text.labelled.encoded import LabelledData
from compress.training.augmentation import Augment, Augmented
from compress.training.example_batches import ExampleBatches
from compress.training.loop import optimise
from compress.training.masking import Masks
from compress.training.objectives.base import Objective
from compress.training.objectives.chats import answers_of_chats
from compress.training.objectives.labelled import StopBy, labelled_examples
from compress.training.objectives.pairs import embedded_pairs
from compress.training.objectives.texts import texts_of_texts
from compress.training.optimizers import OptimizerName, ScheduleName
from compress.training.pair_batches import PairBatches
from compress.training.plan import Optimization

_OF_LABELS = ("class_weights", "sampling", "augment", "label_smoothing")


class Lora(BaseModel):
    """Adapters that learn in the place of the weights: W + (alpha / rank) B A."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(8, ge=1, le=4096, description="of B A")
    alpha: float = Field(16.0, gt=0, le=1e6, description="over the rank: what B A is multiplied by")
    targets: tuple[str, ...] | None = Field(
        None, description="wildcards of linear layers in the blocks; null: all of them"
    )


class Finetune(Pass, Optimization):
    """Learn labels, with a head for them on the model that is there."""

    kind: ClassVar[Kind] = "train"
    needs: ClassVar[frozenset[Need]] = frozenset({"labelled"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    together: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    epochs: float | None = Field(3.0, gt=0, le=1e6, description="times to go through the training texts")
    batch: int = Field(32, ge=1, le=4096, description="texts per micro-batch")
    optimizer: OptimizerName = Field("adamw", description="muon: matrices by Muon, the rest by AdamW")
    learning_rate: float = Field(1e-4, gt=0, le=10, description="of every optimizer but Muon")
    weight_decay: float = Field(0.01, ge=0, le=1, description="on the matrices in the blocks")
    schedule: ScheduleName = Field("linear", description="of the rates, after warm-up")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps")
    heldout_points: int = Field(3, ge=1, le=1000, description="held-out scores on the way")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all labels")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: a label counts by one over its frequency"
    )
    sampling: Literal["none", "balanced"] = Field(
        "none", description="balanced: texts of rare labels are drawn more often"
    )
    stop_by: StopBy = Field(
        "score",
        description="of the held-out texts, what decides which weights to keep; of chats it is the loss",
    )
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        None,
        description="of pairs: which states embed a text; null: as the model's files say, or their mean",
    )
    scale: float = Field(20.0, gt=0, le=1000, description="of pairs: of cosines; one over the temperature")
    lora: Lora | None = Field(None, description="learn adapters, merged in the end; null: learn the weights")
    augment: Augment | None = Field(
        None, description="change words of texts, anew in every epoch; null: none"
    )

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks (and embeddings, norms and the head besides); or the targets of
        adapters.

        Raises UserError where these fit none.
        """
        self.check(model)
        if self.lora is None:
            return linear_layers(model)
        adapters.require_peft("finetune.lora")
        found = linear_layers(model, self.lora.targets or ("*",))
        if not found:
            raise UserError(
                f"finetune.lora.targets: {list(self.lora.targets or ())} fits no linear layer in the blocks; "
                f"they are called {', '.join(linear_layers(model)[:2])} ..."
            )
        return found

    def refuses_labels(self, kind: str) -> str | None:
        """Settings that are of other labels."""
        fields = type(self).model_fields
        given = {name for name in _OF_LABELS if getattr(self, name) != fields[name].default}
        for name in _OF_LABELS:
            if kind == "chat" and name in given and name != "label_smoothing":
                return f"{name}: is for texts with labels, and chats have none; leave it out"
            if kind == "pair" and name in given:
                return f"{name}: is for labels, and these are pairs of texts; leave it out"
        if "class_weights" in given and kind not in NAMED:
            return f"class_weights: labels of the kind '{kind}' have no classes; leave it at none"
        if "sampling" in given and kind != "class":
            return f"sampling: balanced is for one label per text, not '{kind}'; leave it at none"
        return None

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward: 6 operations per parameter and token, 4 where adapters learn."""
        return (6.0 if self.lora is None else 4.0) * parameters * self.tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Train a copy of the bundle's model.

        Raises:
            UserError: no labelled data, or a head that cannot be had.
        """
        data = context.data.labelled
        if data is None:
            raise UserError("finetune: needs labels; give data.labelled, or labelled= to apply")
        task = task_learnt(bundle.model.config, data.kind, paired=data.paired, pooling=self.pooling)
        if task is None:
            raise UserError(f"finetune: labels of the kind '{data.kind}' are not learnt here")
        if (reason := self.refuses_labels(data.kind)) is not None:
            raise UserError(f"finetune.{reason}")
        data = data.apart(bundle.tokenizer, longest_text(bundle.model), wanted=task.embeds)
        result = bundle.clone()
        if isinstance(task, Embedding):
            return self._embed(result, task, data, context)
        if self.pooling is not None:
            raise UserError(
                f"finetune.pooling: is of pairs of texts that are embedded, and these are labels of the kind "
                f"'{data.kind}'; set labelled.kind to pair, or leave it out"
            )
        model = with_head(result.model, task, data.names, context.seed)
        masks = renamed(bundle.masks, result.model, model)
        padding = bundle.tokenizer.pad_token_id or 0
        if model.config.pad_token_id is None:
            model.config.pad_token_id = padding
        augmented = None
        if self.augment is not None:
            longest = longest_text(model)
            augmented = Augmented(data.train, self.augment, bundle.tokenizer, longest, context.seed)
        batches = ExampleBatches(
            data.train, self.windows, context.seed, padding, self._shares(data), augmented
        )
        heldout, weights = data.deciding, self._weights(data)
        stop_by: StopBy = "loss" if task.labels is None else self.stop_by
        if task.labels is None:  # it keeps its head, and what is judged is what is minimised
            objective = answers_of_chats(batches, heldout, padding, smoothing=self.label_smoothing)
        elif task.writes:
            objective = texts_of_texts(
                model, batches, heldout, bundle.tokenizer,
                smoothing=self.label_smoothing, stop_by=stop_by,
            )  # fmt: skip
        else:
            objective = labelled_examples(
                task, batches, heldout, padding,
                smoothing=self.label_smoothing, weights=weights, stop_by=stop_by,
                loss_kind=data.train.loss_kind,
            )  # fmt: skip
        facts: dict[str, Any] = {"task": task.name, "labels": len(data.names), "examples": len(data.train)}
        facts |= {"cut_off": data.train.cut, "stop_by": stop_by}
        if data.train.loss_kind != data.kind:
            facts["loss"] = "binary cross-entropy: all numbers are 0 or 1"
        if model is not result.model:  # how states became a vector means nothing under it
            facts |= {"head": "new", "left_behind": sorted(bundle.companions)}
        facts["judged_by"] = "held-out texts" if len(data.heldout) else "training texts: none are held out"
        notes = self._learn(model, objective, context, masks)
        return result.evolve(model=model, masks=masks, exports={}, notes={**facts, **notes})

    def _embed(self, bundle: Bundle, task: Embedding, data: LabelledData, context: Context) -> Bundle:
        """Train a model to embed the texts of pairs; `bundle` is a copy."""
        if (reason := self.refuses_labels("pair")) is not None:
            raise UserError(f"finetune.{reason}")
        model = without_head(bundle.model, task)
        masks = renamed(bundle.masks, bundle.model, model)
        padding = bundle.tokenizer.pad_token_id or 0
        batches = PairBatches(data.train, self.windows, context.seed, padding)
        objective = embedded_pairs(
            task, batches, data.deciding, padding, scale=self.scale, stop_by=self.stop_by
        )
        facts: dict[str, Any] = {"task": task.name, "pairs": len(data.train.pairs), "pooling": task.pooling}
        facts |= {"texts": len(data.train), "cut_off": data.train.cut, "stop_by": self.stop_by}
        if data.kind == "pair":
            facts["negatives"] = f"the other texts of {min(self.batch, len(data.train.pairs))} pairs at most"
        facts["judged_by"] = "held-out pairs" if len(data.heldout) else "training pairs: none are held out"
        notes = self._learn(model, objective, context, masks)
        beside = pooled_by(bundle.companions, task.pooling, model.config, longest_text(model))
        facts |= {} if beside == dict(bundle.companions) else {"pooling_files": "written"}
        return bundle.evolve(
            model=model, masks=masks, exports={}, companions=beside, notes={**facts, **notes}
        )

    def _learn(
        self, model: Any, objective: Objective, context: Context, masks: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Train the weights, or adapters of them; the notes."""
        if self.lora is not None:
            return self._adapt(model, self.lora, objective, context, masks)
        return optimise(model, self, objective, context, masks=masks, what="fine-tuning")

    def _adapt(
        self, model: Any, lora: Lora, objective: Objective, context: Context, masks: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Train adapters and the head, and merge; the notes."""
        names = self.layers(model)
        tuner = adapters.adapted(model, names, lora.rank, lora.alpha, context.seed)
        if task_of(model.config).labels is not None:  # the head of others knows its work
            for parameter in outside_body(model):
                parameter.requires_grad_(True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        notes = optimise(model, self, objective, context, masks=masks, what="fine-tuning")
        told: dict[str, Any] = {"rank": lora.rank, "layers": len(names), "trained": trained}
        moved = {name: adapters.delta(model, name).square() for name in names if name in masks}
        adapters.merged(tuner)
        if moved:
            dropped = sum(float(square[~masks[name]].sum()) for name, square in moved.items())
            told["masked_share"] = dropped / max(sum(float(s.sum()) for s in moved.values()), 1e-30)
            told["heldout_before_masking"] = notes["heldout_after"]
            Masks(model, masks).weights()
            assert objective.heldout is not None
            notes["heldout_after"] = objective.heldout(model, self.precision_on(context.precision))
        parameters = sum(p.numel() for p in model.parameters())
        notes |= {"parameters": parameters, "tokens_per_parameter": round(notes["tokens"] / parameters, 3)}
        return {**notes, "lora": told}

    def _weights(self, data: LabelledData) -> NDArray[np.float64] | None:
        if self.class_weights == "none":
            return None
        counts = _counts(data)
        present = counts > 0  # a label without rows weighs nothing
        return np.divide(counts.sum() / present.sum(), counts, out=np.zeros_like(counts), where=present)

    def _shares(self, data: LabelledData) -> NDArray[np.float64] | None:
        if self.sampling == "none":
            return None
        counts = _counts(data)
        shares = np.array([1 / counts[item.targets[0]] for item in data.train.items])
        return shares / shares.sum()


def _counts(data: LabelledData) -> NDArray[np.float64]:
    """How often each label is right in training."""
    found = np.concatenate([item.targets for item in data.train.items])
    if data.kind == "classes":
        return np.stack([item.targets for item in data.train.items]).sum(0).astype(np.float64)
    return np.bincount(found[found >= 0], minlength=len(data.names)).astype(np.float64)
