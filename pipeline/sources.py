"""Annotated slides as a model sees them that is trained on them, or held against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from pipeline.ahead import ahead
from pipeline.annotations import open_truth, with_glass
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.errors import SlideError, TrainingError
from pipeline.geometry import Mpp
from pipeline.machine import threads
from pipeline.normalised import NormalisedSlide, estimate
from pipeline.patches import Source
from pipeline.slide import Slide, open_slide
from pipeline.specs import class_map
from pipeline.staining import Normalisation, Staining
from pipeline.stains import reference
from pipeline.tissue import PackedTissue, Tissue, find_tissue
from pipeline.truth import Truth


def case_truth(case: Case, config: Config) -> Truth:
    """What is known of a case. Raises AnnotationError."""
    if case.annotation is None:
        raise ValueError(f"case {case.slide_id} has no annotation")
    slide = open_slide(case.slide, case.mpp)
    return open_truth(case.annotation, slide.base, class_map(config), config.annotations.label_mpp, slide.shown)


def case_tissue(case: Case, config: Config) -> Tissue:
    """The tissue of a case. Raises SlideError."""
    return find_tissue(open_slide(case.slide, case.mpp), config.tissue)


def open_source(case: Case, config: Config, normalisation: Normalisation | None = None) -> Source:
    """The slide and the truth of an annotated case, on the lattice of the model, as a model with the normalisation sees it.

    A slide that is damaged where its stain is estimated is left as scanned, as in training.
    """
    slide = open_slide(case.slide, case.mpp)
    source = Source(slide, case_truth(case, config), slide.base.at(Mpp.square(config.network.mpp)))
    if normalisation is None:
        return source
    staining = _staining(slide, find_tissue(slide, config.tissue), normalisation.method)
    return replace(source, slide=NormalisedSlide(slide, staining, normalisation))


def open_sources(
    cases: Sequence[Case], config: Config, agreed: Callable[[Normalisation], Normalisation] = lambda found: found
) -> tuple[dict[str, Source], Normalisation | None]:
    """Annotated cases as a model that is to be trained on them will see them, and that model's normalisation.

    It normalises to the mean stain of the training slides, or to what is `agreed` in its place; each slide's is estimated
    once. Training slides also teach what glass is, see `with_glass`. Raises TrainingError where the stain of no training
    slide can be told.
    """
    method, opened = config.normalisation.method, ahead(partial(_taught, config=config), cases, 2 * threads(), threads())
    sources, stainings = dict[str, Source](), dict[str, Staining]()
    for case, (source, staining) in opened:
        sources[case.slide_id] = source
        if staining is not None:
            stainings[case.slide_id] = staining
    if method == "none":
        return sources, None
    trained = [stainings[case.slide_id] for case in cases if case.split == "train"]
    found = reference(trained, method)
    if found is None:
        problems = "; ".join(sorted({item.problem for item in trained}))
        remedy = "Say normalisation.method=none."
        raise TrainingError(f"normalisation.method {method}", problems, "a training slide whose stain can be told", remedy)
    normalisation = agreed(found)
    alike = {
        name: replace(source, slide=NormalisedSlide(source.slide, stainings[name], normalisation))
        for name, source in sources.items()
    }
    return alike, normalisation


def left_as_scanned(sources: Mapping[str, Source]) -> list[str]:
    """Those of the sources, by slide_id, that should have been normalised, but whose stain cannot be told."""
    slides = ((name, source.slide) for name, source in sources.items())
    return [name for name, slide in slides if isinstance(slide, NormalisedSlide) and slide.staining.problem]


def _taught(case: Case, config: Config) -> tuple[Source, Staining | None]:
    """A case as training sees it, and how its slide is stained where that counts.

    Only training slides teach glass: on those for validation nothing counts but what was outlined.
    """
    source, method = open_source(case, config), config.normalisation.method
    teaches_glass = case.split == "train" and bool(config.annotations.known)
    if not teaches_glass and method == "none":
        return source, None
    slide = open_slide(case.slide, case.mpp)
    tissue = find_tissue(slide, config.tissue)
    taught = replace(source, truth=with_glass(source.truth, PackedTissue.of(tissue))) if teaches_glass else source
    return taught, None if method == "none" else _staining(slide, tissue, method)


def _staining(slide: Slide, tissue: Tissue, method: str) -> Staining:
    """How a slide is stained; where something of it cannot be read, its stain cannot be told."""
    try:
        return estimate(slide, tissue, method)
    except SlideError as error:
        return Staining((255.0, 255.0, 255.0), (), error.found)
