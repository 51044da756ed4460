"""An engine's trial before a run uses it: calibrated, if that is what it takes, held against the exact one, and approved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline import checkpoint
from pipeline.approval import Deviation, approval, approve
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.network import ModelSpec
from pipeline.openvino_graph import quantise
from pipeline.patches import Source, read_index
from pipeline.precision import calibration_patches, measure_deviation
from pipeline.runtime import fp32_graph, int8_folder, is_calibrated, load_engine, open_engine, settled
from pipeline.settings import EngineSettings
from pipeline.sources import case_tissue, open_source
from pipeline.tissue import Tissue
from pipeline.validation import learned_pixels


def approve_engine(
    config: Config, cases: Sequence[Case], tiles: Path, model: Path
) -> Iterator[tuple[str, Deviation, list[str]]]:
    """Yield the backend that this worker runs, how far it is from exact on validation tissue, and which slides cannot be
    read; then approve it, or raise EngineError.

    Calibrates int8 where the run has not done so yet. An engine that was approved before, on all of these slides, is not run
    again.
    """
    engine = settled(config.engine)
    if engine.precision == "fastest" and not is_calibrated(model):
        quantise(fp32_graph(model), _calibration(config, cases, tiles, checkpoint.load_spec(model)), int8_folder(model))
    found, unread = approval(engine, model, of_all=True), list[str]()
    if found is None:
        normalisation = checkpoint.load_spec(model).normalisation

        def opened(case: Case) -> tuple[Source, Tissue]:
            return open_source(case, config, normalisation), case_tissue(case, config)

        slides = {case.slide_id: partial(opened, case) for case in cases if case.split == "val"}
        exact = open_engine(model, settled(EngineSettings(flips=engine.flips)))
        found, unread = measure_deviation(exact, load_engine(model, engine), slides, learned_pixels(config), config.seed)
    yield engine.backend, found, unread
    approve(found, engine, model, unread)


def _calibration(config: Config, cases: Sequence[Case], tiles: Path, spec: ModelSpec) -> list[np.ndarray]:
    """Patches of the training slides, on which int8 is calibrated."""
    index = read_index(tiles, config.class_list.names, "train")
    drawn = [case for case in cases if case.slide_id in index.slide_ids]
    sources = {case.slide_id: open_source(case, config, spec.normalisation) for case in drawn}
    return calibration_patches(index, sources, config.tiles.patch_size, spec)
