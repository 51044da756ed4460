"""One slide to segment with one model: what was asked for, and the slide, network and grid that follow from it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__, ensemble
from pipeline.canvas import Canvas, open_canvas
from pipeline.errors import CanvasError
from pipeline.geometry import Mpp
from pipeline.network import ModelSpec
from pipeline.origin import source_digest
from pipeline.pyramid import has_pyramid
from pipeline.runtime import EXACT, describe, settled
from pipeline.settings import EngineSettings, SegmentationSettings, TissueSettings
from pipeline.slide import Pixels, Slide, open_slide
from pipeline.staining import Staining
from pipeline.stitching import Stitching, stitching

if TYPE_CHECKING:
    from pipeline.tissue import Tissue

CANVAS, PROVENANCE = "segmentation.ome.zarr", "provenance.json"
MADE = ("segmentation.ome.tif", "regions.geojson", "measurements.csv", "overlay.png", "tissue.png")
"""The files that a finished slide has besides its canvas and its provenance."""

ENTROPY, TRUTH, ASSESSMENT = "entropy.ome.tif", "truth.png", "assessment.json"
MADE_OF_SOME = (ENTROPY, TRUTH, ASSESSMENT)
"""Those that some finished slides have: of ensembles, and evaluated ones."""

FOUND_TISSUE = "tissue.partial"
"""What a slide has, beside the canvas, until it is finished."""

_COARSER = 1.1  # um/px of a scan, relative to those of the model, up to which it is as good as the same
_STAINING, _CODE = "staining", "code"  # of what the canvas keeps from its beginning


@dataclass(frozen=True)
class SlideJob:
    """One slide to segment with the model in the folder `model`, into `folder`.

    `mpp`, if any, counts before the scale that the scan states. `chosen_tile_size` is for a canvas that is yet to be made,
    where the settings name none.
    """

    slide_id: str
    slide: Path
    mpp: float | None
    model: Path
    folder: Path
    settings: SegmentationSettings
    tissue: TissueSettings
    engine: EngineSettings = EXACT
    chosen_tile_size: int | None = None


def is_finished(job: SlideJob) -> bool:
    """Whether the job's folder holds all that it is to make: nothing is left to do."""
    same = _provenance(job).get("min_region_um2") == job.settings.min_region_um2
    made = (*MADE, ENTROPY) if len(ensemble.members(job.model)) > 1 else MADE
    # A machine that loses power may leave a file under its own name that is empty.
    filled = same and all(path.exists() and path.stat().st_size for path in map(job.folder.joinpath, made))
    complete = filled and is_segmented(job)
    return complete and has_pyramid(open_canvas(job.folder / CANVAS))


def is_segmented(job: SlideJob) -> bool:
    """Whether the job's folder holds a canvas that was finished, is whole, and is this job's, not another run's."""
    found, path = _provenance(job), job.folder / CANVAS
    if not found or not path.exists() or found["identity"] != OpenedJob(job).identity():
        return False
    return bool(len(open_canvas(path).whole()) == found["tiles"])


def require_segmented(job: SlideJob) -> None:
    """Raise CanvasError where `is_segmented` denies it: OtherWayError where only settings differ."""
    if is_segmented(job):
        return
    if (job.folder / CANVAS).exists():
        open_canvas(job.folder / CANVAS, OpenedJob(job).identity())
    expected = "the finished segmentation of this slide by this model"
    raise CanvasError(str(job.folder), "none", expected, "Run `fullfield run` with this configuration.")


def too_coarse(scanned: Mpp, wanted: float) -> str:
    """A remark where a slide is enlarged for a model that sees `wanted` um/px; empty where it need not be."""
    coarser = max(scanned.x, scanned.y)
    return "" if coarser <= _COARSER * wanted else f"scanned at {coarser:g} um/px, and enlarged to the model's {wanted:g}"


def finished_mm2(job: SlideJob) -> float:
    """The tissue of a slide whose job `is_finished`, in square millimetres."""
    return float(_provenance(job)["tissue_mm2"])


def two_codes(job: SlideJob, canvas: Canvas) -> str:
    """A remark where other code of Fullfield began a canvas than finished it, or goes on with it now; else empty."""
    finished = _provenance(job).get("code", source_digest())
    return "" if canvas.measured.get(_CODE, finished) == finished else "begun and finished with different code of Fullfield"


def _provenance(job: SlideJob) -> dict[str, Any]:
    """What the provenance says; nothing where there is none, or a damaged one, which vouches for nothing."""
    try:
        found = json.loads((job.folder / PROVENANCE).read_text(encoding="utf-8"))
        return {name: found[name] for name in ("code", "identity", "min_region_um2", "tiles", "tissue_mm2")}
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return {}


def job_tile_size(job: SlideJob) -> int:
    """The user's tile size; else that of the canvas which the job goes on with, whoever made it; else the one chosen.

    Raises CanvasError where there is none of them.
    """
    if job.settings.tile_size is not None:
        return job.settings.tile_size
    try:
        return open_canvas(job.folder / CANVAS).write_size * ensemble.load_spec(job.model).output_stride
    except CanvasError:
        if job.chosen_tile_size is None:
            raise
        return job.chosen_tile_size


def job_engine(job: SlideJob) -> EngineSettings:
    """The job's engine. Where nobody names a backend, exact output goes on with the one that it was begun with.

    So installing the other backend later neither refuses what is there nor mixes the two in one output.
    """
    if job.engine.precision == "exact" and job.engine.backend == "auto":
        ways = [job.engine.model_copy(update={"backend": backend}) for backend in ("torch", "openvino")]
        with suppress(CanvasError):
            begun = open_canvas(job.folder / CANVAS).identity.get("engine")
            for way in ways:
                if describe(job.model, way) == begun:
                    return way
    return settled(job.engine)


@lru_cache(maxsize=4)  # slides under way; of a slide of 100000 px at 0.25 um/px the mask takes 10 MB
def _tissue_of(slide: Slide, digest: str, settings: TissueSettings) -> Tissue:
    """The tissue of a slide; the digest tells a file from another that takes its place."""
    from pipeline.tissue import find_tissue

    return find_tissue(slide, settings)


class OpenedJob:
    """A job's slide, model and grid; opening them is cheap, since a process keeps each slide open."""

    def __init__(self, job: SlideJob) -> None:
        self.job = job
        self.slide: Slide = open_slide(job.slide, job.mpp)
        self.spec: ModelSpec = ensemble.load_spec(job.model)
        lattice = self.slide.base.at(Mpp.square(self.spec.mpp))
        self.stitching: Stitching = stitching(self.spec, job.settings.blend)
        self.grid = self.stitching.grid(lattice, job_tile_size(job))

    def find_tissue(self) -> Tissue:
        """The slide's tissue, looked for in this process, which keeps it."""
        return _tissue_of(self.slide, self.slide.digest(), self.job.tissue)

    def tissue(self) -> Tissue:
        """The slide's tissue as whoever planned it has found it, for a canvas of this identity."""
        from pipeline.tissue import Tissue

        try:
            return Tissue.load(self.job.folder / FOUND_TISSUE)
        except FileNotFoundError:  # another command has sealed the slide, and cleared it away
            return self.find_tissue()

    def measured(self, tissue: Tissue) -> dict[str, object]:
        """What the canvas keeps from its beginning: with which code that was, and of a slide that is normalised the stain.

        This then holds for every tile, whichever worker segments it.
        """
        if self.spec.normalisation is None:
            return {_CODE: source_digest()}
        from pipeline.normalised import estimate

        return {_CODE: source_digest(), _STAINING: estimate(self.slide, tissue, self.spec.normalisation.method).to_dict()}

    def problem(self, canvas: Canvas) -> str:
        """Why the slide's stain could not be told; empty where it could, or need not be."""
        return Staining.from_dict(canvas.measured[_STAINING]).problem if self.spec.normalisation else ""

    def pixels(self, canvas: Canvas) -> Pixels:
        """The slide as the network sees it."""
        if self.spec.normalisation is None:
            return self.slide
        from pipeline.normalised import NormalisedSlide

        return NormalisedSlide(self.slide, Staining.from_dict(canvas.measured[_STAINING]), self.spec.normalisation)

    def identity(self) -> dict[str, str]:
        """What the labels depend on: a canvas takes tiles of no other run."""
        return {
            "fullfield": __version__,
            "model": ensemble.digest(self.job.model),
            "engine": describe(self.job.model, job_engine(self.job)),
            "slide": self.slide.digest(),
            "slide_mpp": f"{self.slide.base.mpp.x} x {self.slide.base.mpp.y}",
            "classes": ", ".join(self.spec.classes.names),
            "tile_size": str(self.grid.write_size),
            "tissue": json.dumps(self.job.tissue.model_dump(), sort_keys=True),
            **({} if self.stitching.exact else {"blend": str(self.stitching)}),
        }

    def provenance(self, canvas: Canvas, tissue_mm2: float) -> dict[str, object]:
        """Where this output comes from."""
        begun = canvas.measured.get(_CODE)
        return {
            "slide_path": str(self.job.slide.resolve()),
            "model_path": str(self.job.model.resolve()),
            "members": [str(member.resolve()) for member in ensemble.members(self.job.model)],
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "identity": self.identity(),
            "code": source_digest(),
            **({} if begun in (None, source_digest()) else {"begun_with_code": begun}),
            "exact": self.stitching.exact and self.job.engine.precision == "exact",
            "stitching": str(self.stitching),
            "model_spec": self.spec.to_dict(),
            "staining": canvas.measured.get(_STAINING),
            "min_region_um2": self.job.settings.min_region_um2,
            "mpp": asdict(canvas.lattice.mpp),
            "width": canvas.lattice.width,
            "height": canvas.lattice.height,
            "tissue_mm2": tissue_mm2,
            "tiles": len(canvas.done()),
        }
