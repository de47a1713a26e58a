"""What a teacher shows its student: labelled texts, windows of plain text, or both."""

from collections.abc import Callable
from dataclasses import dataclass

from compress.context import Context
from compress.errors import UserError
from compress.text.labelled.encoded import LabelledData
from compress.training.batches import Batches, Material
from compress.training.example_batches import ExampleBatches
from compress.training.teaching.fields import Teaching
from compress.training.teaching.material import LabelledAndText


@dataclass(frozen=True)
class Sources:
    """What is learnt from.

    Attributes:
        material: in the order of the steps.
        plain: whether a step reads plain text.
        labelled: the labelled texts, where any are read.
        longest: tokens of the longest text.
    """

    material: Material
    plain: Callable[[int], bool]
    labelled: LabelledData | None
    longest: int


def sources(settings: Teaching, context: Context, padding: int, *, field: str) -> Sources:
    """Labelled texts where there are any, plain text as `unlabelled` says.

    Args:
        settings: has `unlabelled`, and says how many texts make up a step.
        context: the texts.
        padding: the token that fills rows.
        field: the pass's name, for errors.

    Raises:
        UserError: a share of plain text, where the text is that of the labelled rows.
    """
    text, labelled, share = context.data, context.data.labelled, settings.unlabelled
    window = settings.window or text.window
    windows = Batches(text.train, window, settings.windows, context.seed, True, text.begin, text.end, 0)
    if labelled is None:
        return Sources(windows.check(), lambda step: True, None, window)
    if share and text.source == labelled.source:
        raise UserError(
            f"{field}.unlabelled: there is no text but that of the labelled rows; give another as data.text, "
            "or leave it at 0"
        )
    if share == 1:
        return Sources(windows.check(), lambda step: True, labelled, max(window, labelled.heldout.length))
    examples = ExampleBatches(labelled.train, settings.windows, context.seed, padding)
    longest = max(labelled.train.length, labelled.heldout.length)
    if not share:
        return Sources(examples.check(), lambda step: False, labelled, longest)
    both = LabelledAndText(examples, windows, share).check()
    return Sources(both, both.plain, labelled, max(longest, window))
