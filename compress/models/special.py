"""Tokens that the configurations of a model name by their numbers."""

from typing import Any


def special_ids(model: Any) -> set[int]:
    """Ids that the configurations of a model name."""
    configs = [model.config, model.generation_config] if model.can_generate() else [model.config]
    found = (i for config in configs for _, ids in ids_in(config) for i in ids)
    return {i for i in found if 0 <= i < model.config.vocab_size}


def ids_in(config: Any) -> list[tuple[str, list[int]]]:
    """Fields of a configuration that hold token ids."""
    found = []
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_tokens")) and value is not None:
            ids = value if isinstance(value, list) else [value]
            numbers = ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
            if numbers and (key.endswith("_token_id") or isinstance(value, list)):
                found.append((key, ids))
    return found
