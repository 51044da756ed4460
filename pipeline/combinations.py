"""The combinations of a sweep: every value of a key with every value of the others, each with a name for its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pipeline.config_file import parse_values
from pipeline.errors import ConfigError

_FIXED = ("output", "cluster", "tracking", "cohort", "classes", "annotations")
"""What may be set for a whole sweep, but not swept: where work is done, and the truth that all are held against."""


@dataclass(frozen=True)
class Combination:
    """One of a sweep: a name that may be a folder's, and the swept values that it sets, by dotted key."""

    name: str
    values: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """What it sets, as `load_config` takes it."""
        return [_override(key, value) for key, value in self.values.items()]


def combine(overrides: Sequence[str]) -> tuple[list[str], list[Combination]]:
    """Overrides that hold for all, and the product of the others, `key=value,value...`, the last key running fastest.

    Raises ConfigError where an override is none, a key stands twice or is not to be swept, nothing has two values, or two
    combinations cannot be told apart by name.
    """
    parsed = [parse_values(override) for override in overrides]
    keys = [key for key, _ in parsed]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(", ".join(twice), "given twice", "each key once", "Separate its values with commas.")
    fixed = [_override(key, values[0]) for key, values in parsed if len(values) == 1]
    swept = {key: values for key, values in parsed if len(values) > 1}
    if not swept:
        expected = "a key with two values or more, such as network.width=16,32"
        raise ConfigError(" ".join(overrides), "one value for each key", expected, "Name another value.")
    for key in swept:
        if key.partition(".")[0] in _FIXED:
            raise ConfigError(key, "several values", "one for a whole sweep", "Sweep over what a network is made with.")
    found = [Combination(_name(swept, values), dict(zip(swept, values, strict=True))) for values in product(*swept.values())]
    names = [combination.name for combination in found]
    alike = sorted({name for name in names if names.count(name) > 1})
    if alike:
        raise ConfigError(", ".join(alike), "several combinations of this name", "values that differ", "Name each once.")
    return fixed, found


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value, default=str, ensure_ascii=False)}"


def _name(keys: Collection[str], values: Sequence[Any]) -> str:
    """`learning_rate=0.001,width=16`: the last word of a key where no other has it, else the whole."""
    lasts = [key.rpartition(".")[2] for key in keys]
    words = [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    named = ",".join(f"{word}={text}" for word, text in zip(words, texts, strict=True))
    return re.sub(r"[^\w.,=+-]+", "_", named)
