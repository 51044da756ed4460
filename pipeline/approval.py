"""Which ways to run a model below fp32 were held against fp32, and approved.

What was found is written beside the model, with a copy for the same model in other folders, so that each later call knows,
without running anything, what is approved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import __version__
from pipeline.config import Config
from pipeline.errors import EngineError
from pipeline.files import write_json
from pipeline.openvino_graph import require_quantiser
from pipeline.runtime import (
    backend_version,
    describe,
    engine_file,
    engines_folder,
    has_int8,
    is_calibrated,
    keep_engine,
    number_format,
    require_ability,
    settled,
    where_from,
)
from pipeline.settings import EngineSettings


@dataclass(frozen=True)
class Deviation:
    """How far an engine is from the exact one, over `pixels` of known tissue.

    `label_change` is the share, 0 to 1, of pixels with another label; `dice_change` the largest change of a class's Dice,
    up or down; `largest_difference` that of a probability.
    """

    pixels: int
    label_change: float
    dice_change: float
    largest_difference: float

    @property
    def numbers(self) -> bool:
        """Whether both had a number for every pixel: half precision may overflow."""
        return math.isfinite(self.largest_difference)

    def __str__(self) -> str:
        return (
            f"{self.label_change:.3%} of {self.pixels} pixels have another label, Dice changes by up to "
            f"{self.dice_change:.4f}, a probability by up to {self.largest_difference:.3f}"
        )


def require_means(config: Config) -> None:
    """Raise EngineError where this machine could not run the engine of a run, or not make a model's int8 graph for it.

    Before hours of training, that is. Workers of a scheduler may be able to do what this machine is not.
    """
    if config.cluster.scheduler is not None:
        return
    engine, model = settled(config.engine), config.output / "model"
    require_ability(engine)
    if engine.precision == "fastest" and not (model.exists() and is_calibrated(model)):
        require_quantiser()


def check(found: Deviation, settings: EngineSettings, model: Path) -> None:
    """Raise EngineError where nothing was compared, an answer is no number, or too many labels change."""
    subject = f"{model}, engine.precision {settings.precision}, engine.backend {settings.backend}"
    if not found.pixels:
        remedy = "Annotate a validation slide, or say engine.precision=exact."
        raise EngineError(subject, "no known tissue to hold it against exact on", "some on validation slides", remedy)
    if not found.numbers:
        expected, remedy = "numbers wherever exact has some", "Say engine.precision=exact."
        raise EngineError(subject, f"answers that are no numbers, and {found}", expected, remedy)
    if found.label_change > settings.max_label_change:
        expected = f"no more than {settings.max_label_change:.3%} of labels changed (engine.max_label_change)"
        remedy = "Say engine.precision=exact, or raise engine.max_label_change."
        raise EngineError(subject, str(found), expected, remedy)


def approve(found: Deviation, settings: EngineSettings, model: Path, passed_over: Sequence[str] = ()) -> None:
    """Write beside the model what was found of a way to run it, and which slides were `passed_over`, that could not be read.
    Raises EngineError where it may not be used.

    An approval by an earlier call, which allowed more labels to change, outlasts a refusal.
    """
    content = {
        "engine": _way(settings, model),
        "max_label_change": settings.max_label_change,
        "found": asdict(found),
        "passed_over": list(passed_over),
    }
    if found.label_change <= settings.max_label_change or approval(settings, model) is None:
        write_json(engines_folder(model) / _name(settings), content)
        keep_engine(model, _name(settings))
    check(found, settings, model)


def approval(settings: EngineSettings, model: Path, of_all: bool = False) -> Deviation | None:
    """What was found of a way to run the model; None where it was not held against exact, or not approved, or, if it is to
    be `of_all` slides that validate, where some of them were passed over.
    """
    found, allowed, complete = _known(settings, model) or (None, 0.0, False)
    approved = found and found.pixels and found.numbers and found.label_change <= allowed
    return found if approved and (complete or not of_all) else None


def _known(settings: EngineSettings, model: Path) -> tuple[Deviation, float, bool] | None:
    """What was found of a way to run the model, the share of labels that was allowed to change then, and whether that is of
    all slides; None: nothing.

    Raises EngineError where the backend is not installed.
    """
    backend_version(settings.backend)
    if settings.precision == "fastest" and not has_int8(model):
        return None
    path = engine_file(model, _name(settings))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        same = content["engine"] == _way(settings, model)
        found, allowed = Deviation(**content["found"]), float(content["max_label_change"])
        return (found, allowed, not content.get("passed_over")) if same else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Delete it, and run with that precision again."
        raise EngineError(str(path), f"a damaged file ({error})", "an approval as Fullfield wrote it", remedy) from error


def require_approval(settings: EngineSettings, model: Path) -> None:
    """Raise EngineError where a precision below exact was never approved for the model."""
    if settings.precision != "exact" and approval(settings, model) is None:
        known = _known(settings, model)
        allow = f", and engine.max_label_change above {known[1]:g}" if known else ""
        raise EngineError(
            f"{model}, engine.precision {settings.precision}, engine.backend {settings.backend}",
            f"a way to run it that was {f'refused: {known[0]}' if known else 'never held against exact'}",
            "one that was approved on validation tissue",
            f"Run `fullfield run CONFIG engine.precision={settings.precision} engine.backend={settings.backend} "
            f"engine.flips={str(settings.flips).lower()}`{allow} with the "
            f"configuration that the model was trained with. {where_from(model)} Or say --precision exact.",
        )


def _way(settings: EngineSettings, model: Path) -> str:
    """The way to run a model, in words, with the version of Fullfield: another may compute otherwise. Raises EngineError."""
    return f"{describe(model, settings)}, fullfield {__version__}"


def _name(settings: EngineSettings) -> str:
    """Of the file with what was found of a way to run a model."""
    flips = "-flips" if settings.flips else ""
    return f"{number_format(settings).replace(' ', '-')}-{settings.backend}{flips}.json"
