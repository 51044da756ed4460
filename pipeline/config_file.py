"""Reads a configuration: a YAML file, overrides of dotted keys, and errors that name the key at fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.files import in_its_place
from pipeline.yaml_text import called, load

WRITTEN = "# Written by Fullfield, which replaces it: what you want to keep belongs into a file of another name.\n"
"""The first line of the configuration that a command leaves in its output."""

_WORDS = {
    "Value error, ": "",
    "Input ": "",
    "Tuple ": "",
    "a valid array": "a list, such as [a, b]",
    "an object": "keys and values",
}
"""Words of pydantic's, and what takes their place."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides of dotted keys, whose values are YAML as well.

    Raises ConfigError that names each key at fault, what was found there and what was expected.
    """
    if not path.is_file():
        found, remedy = in_its_place(path), "Print one with `fullfield config example`."
        if (path / "config.yaml").is_file():
            remedy = f"Name {path / 'config.yaml'}, perhaps."
        raise ConfigError(str(path), found, "a configuration, which is a YAML file", remedy)
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"broken YAML ({error})", "a YAML file", "Correct it at that place.") from error
    return parse_config(content, str(path), overrides)


def parse_config(content: Any, source: str, overrides: Sequence[str] = ()) -> Config:
    """The Config in `content`, plain values as YAML gives them, with overrides; `source` names it in errors."""
    if not isinstance(content, dict):
        raise ConfigError(source, called(content), "keys and values", "See `fullfield config example`.")
    for override in overrides:
        _override(content, override)
    try:
        text = json.dumps(content, default=str)
    except (ValueError, RecursionError) as error:
        raise ConfigError(source, f"values within themselves ({error})", "plain values", "Remove such an alias.") from error
    try:
        return Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        found = "; ".join(_describe(item) for item in _causes(error.errors()))
        remedy = "See `fullfield config example` for every key."
        raise ConfigError(asked(source, overrides), found, "a configuration that makes sense", remedy) from error


def asked(source: str, overrides: Sequence[str]) -> str:
    """How an error calls what it is about: the file, and what was overridden."""
    return " with ".join(filter(None, (source, ", ".join(overrides))))


def parse_values(override: str) -> tuple[str, list[Any]]:
    """The key of `key=value,value...`, and its values as YAML has them; a list is one value in brackets.

    Raises ConfigError where there is no key or no value.
    """
    key, separator, text = override.partition("=")
    try:
        values = load(f"[{text}]") if separator and key else []
    except yaml.YAMLError as error:
        raise ConfigError(
            repr(override), f"broken YAML ({error})", "values separated by commas", "Quote the value."
        ) from error
    if not values:
        expected = "key=value,value..., such as training.epochs=10,20"
        raise ConfigError(repr(override), "no `=`, or nothing beside it", expected, "Write it that way.")
    return key, values


def _causes(errors: Sequence[Any]) -> list[Any]:
    """The errors that do not follow from others, as that a list is too short follows where its items are wrong."""
    places = [error["loc"] for error in errors]

    def follows(error: Any) -> bool:
        place = error["loc"]
        return error["type"] == "too_short" and any(len(one) > len(place) and one[: len(place)] == place for one in places)

    return [error for error in errors if not follows(error)]


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"no `{key}`, which is required"
    if error["type"] == "extra_forbidden":
        return f"unknown key `{key}`"
    message = error["msg"].partition(" after validation")[0]
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    told = f"`{key}`: {message}" if key else message
    given = json.dumps(error["input"], ensure_ascii=False, default=str)
    return told if isinstance(error["input"], dict) else f"{told}, not {given}"


def _override(content: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not key:
        found = "nothing before `=`" if separator else "no `=`"
        raise ConfigError(f"override {text!r}", found, "key=value, such as training.epochs=10", "Write it that way.")
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        place = _step(place, part, text)
    try:
        parsed = load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}", f"broken YAML ({error})", "a YAML value", "Quote the value.") from error
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise _no_place(text)


def _step(place: Any, part: str, text: str) -> Any:
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise _no_place(text)


def _no_place(text: str) -> ConfigError:
    return ConfigError(f"override {text!r}", "no such place in the file", "a dotted key", "See `fullfield config example`.")
