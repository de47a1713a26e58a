"""Which parameters of a model are one: what is in memory and in the files decides, not what a flag says.

A configuration with `tie_word_embeddings: true` beside files that hold a head of its own means, to stock
`transformers`, the head in the files. It keeps the pairs that are really tied in the model's
`all_tied_weights_keys` (target -> source), and so do we: whoever ties a model again, or makes another after
it, asks for these. Where none of the pairs is left the flag becomes false, so that whatever believes it
(other runtimes, a model made of the configuration) is right; where some are (T5 with a head of its own) the
flag stays, since it speaks of the others, too.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def settled(model: Any) -> Any:
    """The model itself, its list of tied parameters and the flag as its parameters are.

    Parameters that layers of codes have replaced are left alone.
    """
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart = [
        target
        for target, source in pairs.items()
        if target in parameters and source in parameters and parameters[target] is not parameters[source]
    ]
    for target in apart:
        del pairs[target]
    if not pairs:
        _say_untied(model)
    return model


def tie(model: Any) -> None:
    """Make the parameters one again that were, and no others."""
    model.tie_weights(recompute_mapping=False)


def untie(model: Any, targets: Iterable[str]) -> None:
    """Give these parameters memory of their own, with the values of what they were tied to."""
    for target in targets:
        place, _, leaf = target.rpartition(".")
        module = model.get_submodule(place)
        old = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    settled(model)


def tied_like(model: Any, other: Any) -> Any:
    """The model itself, with those of its pairs untied that are not tied in `other`, which is of its kind."""
    untie(model, sorted(model.all_tied_weights_keys.keys() - other.all_tied_weights_keys.keys()))
    return model


def _say_untied(model: Any) -> None:
    """Set the flag of a model that could have tied parameters and has none, in all its parts."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(module, "_tied_weights_keys", None) and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
