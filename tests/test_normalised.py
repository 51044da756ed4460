"""Slides of other stains become alike; what is learnt, segmented and verified sees them so, without being told."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import yaml
from pyarrow import parquet

from pipeline import checkpoint, fitting
from pipeline.canvas import open_canvas
from pipeline.classes import IGNORED
from pipeline.cohort import Case, read_manifest, write_manifest
from pipeline.config import Config
from pipeline.config_file import parse_config
from pipeline.errors import TrainingError
from pipeline.fitting import fit
from pipeline.geometry import Mpp, Roi
from pipeline.grid import Grid
from pipeline.histology import GLASS, draw, plan
from pipeline.normalised import NormalisedSlide, estimate, normalised
from pipeline.phantom import make_cohort, write_slide
from pipeline.runtime import load_engine
from pipeline.settings import ClusterSettings, EngineSettings, TissueSettings
from pipeline.slide import Pixels, Slide, open_slide
from pipeline.slide_job import CANVAS, SlideJob
from pipeline.slide_tasks import plan_slide, seal_slide, segment_block
from pipeline.sources import left_as_scanned, open_source, open_sources
from pipeline.staining import METHODS, Normalisation
from pipeline.stains import reference, staining_of
from pipeline.team import Alone
from pipeline.tissue import find_tissue
from pipeline.workspace import slide_job
from workflows.segment import segment
from workflows.tile import tile, tile_case
from workflows.train import train
from workflows.verify import verify

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, MPP = 701, 553, 2.0
EXACT, HERE = EngineSettings(), ClusterSettings(workers=0)


@pytest.fixture(scope="module")
def stained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Slide, Slide, np.ndarray]:
    """One phantom, stained and scanned in two ways, and where it is tissue."""
    folder = tmp_path_factory.mktemp("stained")
    scene = plan(11, WIDTH, HEIGHT, MPP, 0.9)
    other = replace(
        scene,
        stains=np.array([[0.95, 0.85, 0.30], [0.10, 0.70, 0.45]], np.float32),
        white=np.array([232, 240, 228], np.float32),
    )
    for name, each in (("one", scene), ("two", other)):
        image, truth = draw(each, 0, HEIGHT)
        write_slide(image, folder / f"{name}.tiff", MPP)
    return open_slide(folder / "one.tiff"), open_slide(folder / "two.tiff"), truth != GLASS


def alike(slide: Slide, others: list[Slide], method: str) -> NormalisedSlide:
    """A slide normalised to the mean of some."""
    found = [estimate(other, find_tissue(other, TissueSettings()), method) for other in others]
    wanted = reference(found, method)
    assert wanted is not None
    pixels = normalised(slide, find_tissue(slide, TissueSettings()), wanted)
    assert isinstance(pixels, NormalisedSlide)
    return pixels


@pytest.mark.parametrize("method", METHODS)
def test_two_stains_of_one_tissue_become_alike(stained: tuple[Slide, Slide, np.ndarray], method: str) -> None:
    one, two, tissue = stained
    pictures = [slide.read(one.base.roi, one.base).astype(float) for slide in (one, two)]
    normal = [alike(slide, [one, two], method).read(one.base.roi, one.base).astype(float) for slide in (one, two)]
    before, after = (np.abs(first - second)[tissue].mean() for first, second in (pictures, normal))
    assert after < before / 2
    assert np.abs(normal[0] - normal[1])[~tissue].mean() < 3 < np.abs(pictures[0] - pictures[1])[~tissue].mean()


@pytest.mark.parametrize("method", METHODS)
def test_a_normalised_slide_read_in_pieces_is_the_same(stained: tuple[Slide, Slide, np.ndarray], method: str) -> None:
    pixels, roi = alike(stained[0], list(stained[:2]), method), Roi(-9, 211, 500, 371)
    lattice = stained[0].base.at(Mpp.square(2.7))
    whole, pieces = pixels.read(roi, lattice), np.empty((*roi.shape, 3), np.uint8)
    for y in range(roi.y, roi.bottom, 97):
        for x in range(roi.x, roi.right, 131):
            piece = Roi(x, y, 131, 97).intersect(roi)
            pieces[piece.within(roi).slices()] = pixels.read(piece, lattice)
    np.testing.assert_array_equal(pieces, whole)
    assert (whole[:, :9] == 255).all(), "beyond the slide is white"
    assert (whole != stained[0].read(roi, lattice)).any()


def test_without_normalisation_a_slide_is_itself(stained: tuple[Slide, Slide, np.ndarray]) -> None:
    assert normalised(stained[0], find_tissue(stained[0], TissueSettings()), None) is stained[0]


@pytest.mark.parametrize("method", METHODS)
def test_real_slides_are_given_the_stain_of_the_reference(shared_data: Path, method: str) -> None:
    slides = [open_slide(shared_data / "glas" / f"glas-patient-{number}.tiff") for number in ("08", "06")]
    lattice = slides[0].base.at(Mpp.square(2.0))
    pixels = alike(slides[0], slides, method)
    seen = pixels.read(lattice.roi, lattice)[find_tissue(slides[0], TissueSettings()).sampled(lattice.roi, lattice)]
    again, wanted = staining_of(seen, np.full(3, 255.0), method), np.array(pixels.normalisation.dyes)
    before, after = (np.abs(np.array(each.dyes) - wanted).max() for each in (pixels.staining, again))
    assert after < before / 2


@dataclass(frozen=True)
class Project:
    """A cohort of three small phantoms, each stained in its way; a model trained with Macenko; the third slide segmented."""

    config: Config
    cases: tuple[Case, ...]
    model: Path
    out: Path

    @property
    def slide(self) -> Slide:
        return open_slide(self.cases[2].slide)

    def job(self, folder: Path) -> SlideJob:
        case = self.cases[2]
        return replace(slide_job(case, self.config), model=self.model, folder=folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    manifest = make_cohort(folder / "cohort", seed=4, slides=3, width=1101, height=903, mpp=1.0)
    content = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    content["output"], content["cohort"]["manifest"] = str(folder), str(manifest)
    content["normalisation"] = {"method": "macenko"}
    content["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 8, "depth": 2}
    content["tiles"]["patch_size"] = 64
    content["training"] = {"epochs": 1, "patches_per_epoch": 32, "batch_size": 8, "learning_rate": 0.01}
    content["segmentation"] = {"tile_size": 96}
    config, cases = parse_config(content, "test"), tuple(read_manifest(manifest))
    cells = pa.concat_tables([tile_case(case, config).cells for case in cases])
    parquet.write_table(cells, folder / "tiles.parquet")
    assert len(list(fit(config, cases[:2], folder / "tiles.parquet", folder / "model", "inputs"))) == 1
    assert segment([cases[2].slide], [str(folder / "model")], folder / "out", None, 96, HERE, EXACT) == 0
    return Project(config, cases, folder / "model", folder / "out" / "slides" / "phantom-03")


def whole_pass(model: Path, pixels: Pixels, base: Slide) -> np.ndarray:
    """Labels of one forward pass over a whole slide."""
    engine = load_engine(model)
    grid = Grid(base.base.at(Mpp.square(engine.spec.mpp)), 64, engine.spec.halo, engine.spec.stride)
    labels: np.ndarray = engine(pixels.read(grid.padded.roi, grid.lattice)[None])[0].argmax(0).astype(np.uint8)
    return labels[: grid.lattice.height, : grid.lattice.width]


def examined(folder: Path) -> np.ndarray:
    canvas = open_canvas(folder / CANVAS)
    return canvas.read_labels(canvas.lattice.roi)


def test_a_model_carries_the_mean_of_its_training_slides(project: Project) -> None:
    slides = [open_slide(case.slide) for case in project.cases if case.split == "train"]
    found = [estimate(slide, find_tissue(slide, project.config.tissue), "macenko") for slide in slides]
    assert checkpoint.load_spec(project.model).normalisation == reference(found, "macenko")


def test_a_training_sees_one_stain_in_all_processes_and_to_its_end(project: Project, tmp_path: Path) -> None:
    """Whatever a process finds by itself, such as one that cannot read a slide for a moment."""
    first = Normalisation("macenko", ((0.61, 0.72, 0.33), (0.09, 0.81, 0.12)))

    class Second(Alone):
        """A process that is told what another one found."""

        def first(self, said: Any) -> Any:
            return first if isinstance(said, Normalisation) else said

    training = project.config.training.model_copy(update={"epochs": 2, "patches_per_epoch": 8})
    cases = [case for case in project.cases if case.split == "train"]
    arguments = cases, project.config.output / "tiles.parquet", tmp_path / "model", "inputs"
    settings = project.config.model_copy(update={"training": training})
    next(fitting._fit(Second(), settings, *arguments))
    assert checkpoint.load_spec(tmp_path / "model").normalisation == first
    assert [record.best for record in fit(settings, *arguments)] == [True, True]
    assert checkpoint.load_run_record(tmp_path / "model")["epoch"] == 2
    assert checkpoint.load_spec(tmp_path / "model").normalisation == first


def test_what_is_segmented_is_what_one_pass_over_the_normalised_slide_gives(project: Project) -> None:
    tissue = find_tissue(project.slide, project.config.tissue)
    labels, wanted = examined(project.out), checkpoint.load_spec(project.model).normalisation
    known = labels != IGNORED
    assert known.mean() > 0.4
    assert (labels == whole_pass(project.model, normalised(project.slide, tissue, wanted), project.slide))[known].all()
    assert (labels != whole_pass(project.model, project.slide, project.slide))[known].any(), "stain makes a difference"
    provenance = json.loads((project.out / "provenance.json").read_text())
    assert provenance["staining"] == estimate(project.slide, tissue, "macenko").to_dict()
    assert provenance["model_spec"]["normalisation"]["method"] == "macenko"


def test_verify_need_not_be_told(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(project.cases[2].slide, str(project.model), None, EXACT, blend=False) == 0
    assert "exact: tiled equals whole" in capsys.readouterr().out


def test_what_goes_on_uses_the_numbers_that_it_began_with(project: Project, tmp_path: Path) -> None:
    job = project.job(tmp_path)
    plan_slide(job)
    kept = tmp_path / CANVAS / "zarr.json"
    content = json.loads(kept.read_text())
    content["attributes"]["fullfield-measured"]["staining"]["dyes"] = []
    kept.write_text(json.dumps(content))
    for block in plan_slide(job).blocks:
        segment_block(job, block)
    labels = examined(tmp_path)
    assert (labels == whole_pass(project.model, project.slide, project.slide))[labels != IGNORED].all()


def test_a_slide_without_stain_is_left_as_it_is_and_its_provenance_says_so(project: Project, tmp_path: Path) -> None:
    write_slide(np.full((400, 500, 3), 243, np.uint8), tmp_path / "glass.tiff", 1.0)
    job = replace(project.job(tmp_path / "out"), slide=tmp_path / "glass.tiff")
    assert not plan_slide(job).blocks
    seal_slide(job, 0.0, {})
    found = json.loads((tmp_path / "out" / "provenance.json").read_text())["staining"]
    assert found["dyes"] == [] and "stained pixels" in found["problem"]


def test_a_training_tells_of_slides_that_are_left_as_scanned(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stained = next(case for case in project.cases if case.split == "train")
    glass = replace(stained, slide_id="glass", patient="none", slide=tmp_path / "glass.tiff")
    base = open_slide(stained.slide).base
    write_slide(np.full((*base.shape, 3), 243, np.uint8), glass.slide, base.mpp.x)
    write_manifest(tmp_path / "cohort.csv", [stained, glass])
    content = project.config.model_dump(mode="json")
    content["output"], content["cohort"]["manifest"] = str(tmp_path / "out"), str(tmp_path / "cohort.csv")
    content["cluster"]["workers"] = 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    for verb in (tile, train):
        assert verb(tmp_path / "config.yaml", ["tiles.min_tissue=0"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "without stain" in line]
    assert told == ["train: used without stain normalisation, since their stain could not be determined: glass"]


def test_a_damaged_slide_whose_stain_cannot_be_told_is_left_as_scanned(project: Project, tmp_path: Path) -> None:
    whole = next(case for case in project.cases if case.split == "train")
    level = open_slide(whole.slide).best_level(Mpp.square(2.0))
    content = bytearray(whole.slide.read_bytes())
    with tifffile.TiffFile(whole.slide) as file:
        page = next(page for page in file.pages if page.shape[:2] == open_slide(whole.slide).levels[level].shape)
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            content[offset : offset + length] = bytes(length)
    (tmp_path / "damaged.tiff").write_bytes(content)
    damaged = replace(whole, slide_id="damaged", slide=tmp_path / "damaged.tiff")
    sources, normalisation = open_sources([whole, damaged], project.config)
    assert left_as_scanned(sources) == ["damaged"]
    alone = {case.slide_id: open_source(case, project.config, normalisation) for case in (whole, damaged)}
    assert {name: one.slide for name, one in alone.items()} == {name: one.slide for name, one in sources.items()}


def test_a_cohort_without_stain_is_not_trained_on(project: Project, tmp_path: Path) -> None:
    write_slide(np.full((1000, 1200, 3), 243, np.uint8), tmp_path / "glass.tiff", 1.0)
    glass = [replace(case, slide=tmp_path / "glass.tiff") for case in project.cases if case.split == "train"]
    with pytest.raises(TrainingError, match="only 0 stained pixels.*normalisation.method=none"):
        open_sources(glass, project.config)
