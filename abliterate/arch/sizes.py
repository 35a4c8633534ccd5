"""What a model's configuration says of its sizes, and whether its head is tied."""

from collections.abc import Mapping
from typing import Any

from abliterate.arch.packed import text_config
from abliterate.arch.spec import Family
from abliterate.errors import UnknownTensorError


def config_sizes(config: Mapping[str, Any], family: Family, where: str) -> dict[str, int]:
    """The sizes that ``family`` names, by axis; those marked "?" only where the configuration has them.

    Raises:
        UnknownTensorError: one is absent or not a positive integer.
    """
    sizes = {}
    for axis, key in family.sizes.items():
        names = key.removesuffix("?").split("|")
        if key.endswith("?") and not any(config.get(name.removeprefix("len ")) for name in names):
            continue
        sizes[axis] = config_size(config, key.removesuffix("?"), where)
    return sizes


def config_size(config: Mapping[str, Any], key: str, where: str) -> int:
    """A positive integer of a configuration.

    ``key`` may name alternatives, separated by bars; of one behind "len", a list or a pattern with a letter for each
    block, it is the length.

    Raises:
        UnknownTensorError: absent or not a positive integer.
    """
    value = None
    for name in key.split("|"):
        found = config.get(name.removeprefix("len "))
        if found is not None:
            value = (len(found) if isinstance(found, list | str) else None) if name.startswith("len ") else found
            break
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnknownTensorError(f"{where}/config.json: {key} is {value!r}", "the configuration must give this size")
    return value


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Whether transformers ties the head: the top level decides, then ``text_config``, then the family's default."""
    for part in (config, text_config(config)):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return config.get("model_type") in family.tied_by_default
