"""label-likelihood: a decoder without a head gives a text the label that it finds likeliest after a prompt.

Nothing is trained. With the prompt x and the tokens t_1 .. t_n of a label (text/prompts.py)

    s(label) = 1/n sum_i ln p(t_i | x, t_1 .. t_i-1)          or the sum, where that is asked for

and the likeliest label is decided. These s are what the labels' logits are to a classifier: probabilities of
labels are softmax(s), of which loss, KL and calibration error are. Of sums that is what the model says of the
labels among themselves; of means it is no probability of the model's, which makes long labels unlikely.

It is no task that a model has: models are decoders, and are asked so where the data say how.
"""

from typing import Any, ClassVar

from compress.tasks.sequence_classification import SequenceClassification


class Prompted(SequenceClassification):
    """To find a label likely."""

    name: ClassVar[str] = "label-likelihood"
    noun: ClassVar[str] = "a decoder that is asked for labels"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def claims(self, config: Any, architecture: str) -> bool:
        """No model: it is the data that ask."""
        return False


PROMPTED = Prompted()
