"""What a configuration describes: a model, and what names and values in annotation files stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.config_file import WRITTEN, asked, load_config
from pipeline.errors import ConfigError, NetworkError
from pipeline.network import ModelSpec
from pipeline.settings import NetworkSettings, TileSettings
from pipeline.truth import ClassMap


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """What `load_config` reads, if its network can be built. Raises ConfigError that names the key at fault."""
    config = load_config(path, overrides)
    if _was_moved(path, config) and not any(override.startswith("output=") for override in overrides):
        remedy = f"Say output={path.parent} if that was moved here; any other folder begins anew."
        raise ConfigError(str(path), f"`output` {config.output}, which is not there", "the folder that it lies in", remedy)
    try:
        model_spec(config)
    except NetworkError as error:
        found = f"{_dotted(error.subject.removeprefix('model spec, '))}: {error.found}"
        raise ConfigError(asked(str(path), overrides), found, error.expected, _dotted(error.remedy)) from error
    return config


def _was_moved(path: Path, config: Config) -> bool:
    """Whether a configuration that a command left in its output names a folder that is gone."""
    return path.read_bytes().startswith(WRITTEN.encode()) and not config.output.exists()


def model_spec(config: Config) -> ModelSpec:
    """The model that a configuration describes, before its footprint is measured. Raises NetworkError."""
    return ModelSpec(
        **config.network.model_dump(),
        classes=config.class_list,
        patch_size=config.tiles.patch_size,
        halo=None if config.network.norm == "instance" else 0,
        rest=rest_index(config),
    )


def class_map(config: Config) -> ClassMap:
    """How names in annotation files, and values in label images, become classes."""
    settings, classes = config.annotations, config.class_list
    return ClassMap(
        classes=classes,
        names={name: index for index, item in enumerate(config.classes) for name in item.annotations or (item.name,)},
        values={value: index for index, item in enumerate(config.classes) for value in item.values},
        known=settings.known,
        ignored=settings.ignored,
        rest=rest_index(config),
        unnamed=None if settings.unnamed is None else classes.index(settings.unnamed),
    )


def rest_index(config: Config) -> int | None:
    """The index of the class of known pixels under no outline, or None."""
    rest = config.annotations.rest
    return None if rest is None else config.class_list.index(rest)


def _dotted(text: str) -> str:
    """A text with the keys of a model spec as a configuration has them."""
    keys = {key: f"network.{key}" for key in NetworkSettings.model_fields}
    keys |= {key: f"tiles.{key}" for key in TileSettings.model_fields}
    return re.sub(r"`(\w+)`", lambda key: f"`{keys.get(key[1], key[1])}`", text)
