"""YAML that takes 1e-3 for a number, as everybody does who writes one; YAML itself takes it for a word."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT, _MERGE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NUMBER = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice or is no plain word, and letters that no file's name may have."""

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and _NO_TEXT.search(value):
            raise yaml.constructor.ConstructorError(None, None, f"{value!r}, which is no text", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        nodes = [key for key, _ in node.value if key.tag != _MERGE]
        keys, marks = [self.construct_object(key, deep=True) for key in nodes], [key.start_mark for key in nodes]
        if strange := [key for key in keys if not isinstance(key, str | int | float | None)]:
            raise yaml.constructor.ConstructorError(None, None, f"no plain words as keys: {strange}", node.start_mark)
        again = [index for index, key in enumerate(keys) if key in keys[:index]]
        if again:
            twice = sorted({str(keys[index]) for index in again})
            raise yaml.constructor.ConstructorError(None, None, f"key given twice: {twice}", marks[again[0]])
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a word that would be read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789"))


def load(text: str) -> Any:
    """What a text says. Raises yaml.YAMLError, also for what `_Loader` refuses and for a day that no calendar has."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def called(value: object) -> str:
    """What kind of value a text has given, in words."""
    kinds = {type(None): "nothing", list: "a list", dict: "keys and values", str: "words"}
    return kinds.get(type(value), "a single value")


def dump(content: object) -> str:
    """The text that `load` reads back, its keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
