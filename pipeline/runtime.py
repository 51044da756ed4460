"""Which engine runs a model here, and where what is made for it is kept.

    MODEL/                          the checkpoint, which nothing is added to
    MODEL.engines/DIGEST/int8/      its int8 graph, calibrated once and then part of what labels depend on
    MODEL.engines/DIGEST/*.json     how far other precisions were found to be from exact, see approval.py
    ~/.cache/fullfield/engines/DIGEST/  a copy of these, for the same model in another folder, such as one of the registry
    ~/.cache/fullfield/graphs/, compiled/  fp32 graphs and what OpenVINO compiled; the oldest go, see files.keep_in_cache
    ~/.cache/fullfield/models/, probes/    models from an MLflow server, which ensembles name by their paths, and what tiles
                                           take, a few hundred bytes each: both stay until somebody deletes them

DIGEST is the beginning of the model's own, so that nothing made for one model is ever used with another.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import checkpoint, ensemble, openvino_engine, openvino_graph
from pipeline.errors import EngineError
from pipeline.files import keep_in_cache, replacing
from pipeline.machine import cache_folder, has_gpu
from pipeline.network import ModelSpec
from pipeline.openvino_graph import GRAPH
from pipeline.origin import source_digest
from pipeline.settings import Backend, EngineSettings, Precision

if TYPE_CHECKING:
    from pipeline.engine import Engine

EXACT = EngineSettings()

_DIGITS = 16  # of a digest, in the name of a folder
_INT8 = f"int8/{GRAPH}"  # of a model's engines

_OTHER_VIEWS = ((0, -1), (2, 1), (2, -1), (1, 1), (1, -1), (3, 1), (3, -1))
"""Quarter turns of a window, and the step along its columns, -1 for its mirror image; those of its own shape come first."""


def load_engine(model: Path, settings: EngineSettings = EXACT) -> Engine:
    """The engine of a trained model's folder; a process keeps the last two.

    Raises CheckpointError where there is no model, and EngineError where it cannot be run in that way here.
    """
    chosen = settled(settings)
    digests = (ensemble.digest(model), *(_int8_digests(model) if chosen.precision == "fastest" else ()))
    return _shared_engine(model, digests, chosen.precision, chosen.backend, chosen.flips)


@lru_cache(maxsize=2)
def _shared_engine(model: Path, digests: tuple[str, ...], precision: Precision, backend: Backend, flips: bool) -> Engine:
    return open_engine(model, EngineSettings(precision=precision, backend=backend, flips=flips))


def open_engine(model: Path, settings: EngineSettings) -> Engine:
    """An engine that nobody else shares; `settings` name a backend. Raises as `load_engine` does."""
    engines = [_open_one(member, settings) for member in ensemble.members(model)]
    engine = engines[0] if len(engines) == 1 else _Mean(ensemble.load_spec(model), engines)
    return Mirrored(engine) if settings.flips else engine


class Mirrored:
    """An engine that answers with the mean over eight views of a window: itself, its mirror image, and their quarter turns.

    Tiles stay exact: the halo is as wide on every side, and windows end on the stride as they begin on it, so that what is
    mirrored or turned lies on the stride as well.
    """

    def __init__(self, engine: Engine) -> None:
        self.spec, self._engine = engine.spec, engine

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine."""
        total = self._engine(windows)
        for turns, step in _OTHER_VIEWS:
            view = np.rot90(windows[:, :, ::step], turns, (1, 2)).copy()
            total += np.rot90(self._engine(view), -turns, (2, 3))[..., ::step]
        total /= 1 + len(_OTHER_VIEWS)
        return total


class _Mean:
    """Several engines as one, which answers with the mean of their probabilities."""

    def __init__(self, spec: ModelSpec, engines: Sequence[Engine]) -> None:
        self.spec, self._engines = spec, engines

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Engine; of windows with three channels for each member, every one takes its own."""
        count = len(self._engines)
        seen = [windows] * count if windows.shape[-1] == 3 else np.split(windows, count, -1)
        answers = (engine(np.ascontiguousarray(own)) for engine, own in zip(self._engines, seen, strict=True))
        total = next(answers)
        for answer in answers:
            total += answer
        total /= count
        return total


def _open_one(model: Path, settings: EngineSettings) -> Engine:
    if settings.backend == "torch":
        from pipeline.engine import TorchEngine

        return TorchEngine(*checkpoint.load(model), settings.precision)
    graph = int8_graph(model) if settings.precision == "fastest" else fp32_graph(model)
    key = openvino_graph.graph_digest(graph)[:_DIGITS]
    cache = keep_in_cache(cache_folder() / "compiled" / key)
    return openvino_engine.OpenVinoEngine(checkpoint.load_spec(model), graph, settings.precision, cache)


def settled(settings: EngineSettings) -> EngineSettings:
    """The same settings with the faster backend in place of `auto`, told without importing either.

    On a processor that is OpenVINO. Mpx per second of it, torch and OpenVINO, as `python -m benchmarks.engines exact` and
    `fast` print them: one thread, windows of 1024 px, allocator as workers have it, torch fused:

                        fp32, AVX2    fp32, AVX-512   bf16, AVX-512
        fcn             1.57  1.67     1.99  2.08      3.59  4.21
        heatmap         2.73  2.90     3.44  3.61      6.08  6.49
        classifier      1.04  1.08     1.35  1.40      2.58  2.87
        unet            2.95  3.04     3.77  3.96      7.04  7.15
        basic_unet      1.92  2.01     2.33  2.45      4.21  4.42
        flexible_unet   0.56  0.56     0.70  0.72      1.35  1.45
    """
    if settings.backend != "auto":
        return settings
    openvino = settings.precision == "fastest" or (openvino_graph.installed() and not has_gpu())
    return settings.model_copy(update={"backend": "openvino" if openvino else "torch"})


def holds_turned(settings: EngineSettings) -> bool:
    """Whether an engine keeps what a window takes and what its quarter turn takes, unless they are one shape; see
    `OpenVinoEngine`. `settings` name a backend.
    """
    return settings.flips and settings.backend == "openvino"


def require_ability(settings: EngineSettings) -> None:
    """Raise EngineError where this machine cannot compute in that way; `settings` name a backend.

    Nothing heavy is imported to tell that of exact.
    """
    backend_version(settings.backend)
    if settings.backend == "openvino":
        openvino_engine.computed_in(settings.precision)
    elif settings.precision != "exact":
        from pipeline import engine

        engine.require_ability(settings.precision)


def with_flips(settings: EngineSettings, model: Path, flips: bool | None) -> EngineSettings:
    """The settings with `flips`, or, where that is None, with what the run that trained the model had."""
    own = ensemble.load_run_record(model).get("flips", False) if flips is None else flips
    return settings.model_copy(update={"flips": own})


def describe(model: Path, settings: EngineSettings) -> str:
    """What labels depend on besides the model: the number format, backend, and the int8 graph's digest.

    Below exact, where another way to compute the same shows, the backend's version too. Raises EngineError.
    """
    parts: list[str] = [number_format(settings), settings.backend]
    if settings.precision != "exact":
        parts[1] += f" {backend_version(settings.backend)}"
    if settings.precision == "fastest":
        parts += _int8_digests(model)
    if settings.flips:
        parts.append("eight views")
    return ", ".join(parts)


def number_format(settings: EngineSettings) -> str:
    """The precision, and which half it computes in; fastest: in what, where not in int8. Raises EngineError."""
    if settings.precision == "exact":
        return "exact"
    half = _half(settings.backend) if settings.precision == "fast" else openvino_engine.beside_int8()
    return f"{settings.precision} {half}"


def backend_version(backend: Backend) -> str:
    """The version of a backend's library. Raises EngineError where it is not installed."""
    return openvino_graph.openvino_version() if backend == "openvino" else version("torch")


def _half(backend: Backend) -> str:
    """The half precision in which a backend computes `fast` here."""
    if backend == "openvino":
        return openvino_engine.half()
    if not has_gpu():
        return "bf16"
    from pipeline.engine import torch_half

    return torch_half()


def fp32_graph(model: Path) -> Path:
    """A model as an OpenVINO graph, from the cache, else made from the checkpoint and left there for the next process."""
    # Other code may make another graph: one made before a mistake was mended is not used again.
    made_by = f"fullfield-{source_digest()[:_DIGITS]}-openvino-{openvino_graph.openvino_version()}"
    folder = keep_in_cache(cache_folder() / "graphs" / f"{_key(model)}-{made_by}")
    if not (folder / GRAPH).is_file():
        openvino_graph.export(*checkpoint.load(model), folder)
    return folder / GRAPH


def int8_graph(model: Path) -> Path:
    """A model's int8 graph. Raises EngineError where it has none yet."""
    graph = engine_file(model, _INT8)
    if not graph.is_file():
        remedy = (
            "Run `fullfield run CONFIG engine.precision=fastest` with the configuration that the model was trained with. "
            f"{where_from(model)}"
        )
        raise EngineError(str(model), "no int8 form of this model", f"one in {graph.parent}", remedy)
    return graph


def _int8_digests(model: Path) -> list[str]:
    """The digest of each member's int8 graph. Raises EngineError where one has none."""
    return [openvino_graph.graph_digest(int8_graph(member)) for member in ensemble.members(model)]


def has_int8(model: Path) -> bool:
    """Whether a model has been calibrated for int8."""
    return engine_file(model, _INT8).is_file()


def is_calibrated(model: Path) -> bool:
    """Whether the int8 graph is where the model's own run writes it."""
    return (int8_folder(model) / GRAPH).is_file()


def int8_folder(model: Path) -> Path:
    """Where a model's int8 graph is written."""
    return (engines_folder(model) / _INT8).parent


def engines_folder(model: Path) -> Path:
    """Where a model's int8 graph and approvals are written: beside the model, since a checkpoint is never added to."""
    return model.with_name(f"{model.name}.engines") / _key(model)


def engine_file(model: Path, name: str) -> Path:
    """Where what was written into `engines_folder` is read: there, or, where it is only there, from `keep_engine`'s copy."""
    beside, kept = engines_folder(model) / name, _kept_engines(model) / name
    return kept if kept.is_file() and not beside.is_file() else beside


def keep_engine(model: Path, name: str) -> None:
    """Copy an approval of this `name`, and the int8 graph that it may be of, to where this machine finds them for the same
    model in any other folder.
    """
    beside, kept = engines_folder(model), _kept_engines(model)
    with suppress(OSError):  # where the disk is full, they are found beside the model only
        if is_calibrated(model):
            openvino_graph.copy_graph(beside / _INT8, kept / _INT8)
        with replacing(kept / name) as partial:
            shutil.copyfile(beside / name, partial)


def where_from(model: Path) -> str:
    """What to do with a model whose own run has written engines elsewhere."""
    return f"Where another machine did so, copy model.engines/{_key(model)} of that run to {_kept_engines(model)} here."


def _kept_engines(model: Path) -> Path:
    return cache_folder() / "engines" / _key(model)


def _key(model: Path) -> str:
    return checkpoint.digest(model)[:_DIGITS]
