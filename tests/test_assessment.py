"""A whole slide's assessment against scores of its whole arrays; fields; reports with intervals."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from pipeline import assessment, fields
from pipeline.annotations import open_truth
from pipeline.assessment import SHAPE_SCORES, Rules, SlideAssessment, assess, extended, overall_error
from pipeline.assessment_file import read_assessment, read_assessments, write_assessment, write_assessments
from pipeline.boundaries import hd95, measure_boundaries, surface_dice
from pipeline.canvas import create_canvas
from pipeline.classes import IGNORED, Class, Classes
from pipeline.config_file import load_config
from pipeline.errors import CohortError
from pipeline.fields import KnownMap
from pipeline.geometry import Lattice, Mpp
from pipeline.histology import GLASS
from pipeline.metrics import POOLED, few_patients, report, table
from pipeline.objects import CALLED_COUNT, MATCHED, TRUE_COUNT, delivered, object_scores, object_sums
from pipeline.phantom import PHANTOM_CLASSES, make_phantom
from pipeline.pyramid import build_pyramid
from pipeline.truth import ClassMap
from workflows.evaluate import _rules

PAIR = Classes((Class("rest", (0, 0, 0)), Class("gland", (255, 0, 0))))
ONCE = np.ones((1, 1), np.int64)


@dataclass(frozen=True)
class ArrayTruth:
    """A truth held in memory; coarser lattices take the pixel under each centre."""

    pixels: np.ndarray

    def read(self, roi, lattice):
        step = round(lattice.mpp.x)
        rows, columns = (np.arange(a, b) * step + step // 2 for a, b in ((roi.y, roi.bottom), (roi.x, roi.right)))
        padded = np.pad(self.pixels, ((0, 2 * step), (0, 2 * step)), constant_values=IGNORED)
        return padded[np.ix_(rows, columns)]


def canvas_of(path, labels, classes, sure=0.8):
    """A finished canvas of 1 um/px with these labels; IGNORED tiles are not written."""
    canvas = create_canvas(path, Lattice(labels.shape[1], labels.shape[0], Mpp(1.0, 1.0)), classes, 128, {})
    others = (1 - sure) / (len(classes) - 1)
    for row, column in np.ndindex(-(-labels.shape[0] // 128), -(-labels.shape[1] // 128)):
        roi = canvas.tile_roi((row, column))
        part = labels[roi.slices()]
        if (part != IGNORED).all():
            hot = np.stack([np.where(part == index, sure, others) for index in range(len(classes))])
            canvas.write(roi, hot.astype(np.float32))
    build_pyramid(canvas)
    return canvas


def discs(shape, *places):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    hit = [(rows - row) ** 2 + (columns - column) ** 2 <= radius**2 for row, column, radius in places]
    return np.any(hit, axis=0).astype(np.uint8)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(assessment, "BLOCK", 256)


def test_blocks_give_what_the_whole_gives(tmp_path, small_blocks):
    """Glands that cross many blocks and tiles, one unknown corner, one tile not examined."""
    shape = (500, 700)
    truth = discs(shape, (250, 250, 90), (130, 520, 60), (400, 600, 80))
    labels = discs(shape, (255, 262, 84), (120, 520, 66), (60, 60, 20))
    truth[:60, 600:] = IGNORED
    labels[384:500, 512:640] = IGNORED
    canvas = canvas_of(tmp_path / "c", labels, PAIR)
    known = truth != IGNORED
    true, called = truth == 1, (labels == 1) & known
    mpp, least = Mpp(1.0, 1.0), 2000.0  # more than the smallest disc has
    for tolerance_um, expected in ((None, 2.0), (7.0, 7.0)):
        found = assess(canvas, ArrayTruth(truth), Rules(0, least, tolerance_um))
        whole = measure_boundaries(true, called, known, mpp, expected)
        assert hd95([found.boundaries[1]], ONCE) == hd95([whole], ONCE)
        assert surface_dice([found.boundaries[1]], ONCE) == surface_dice([whole], ONCE)
        assert found.tolerance_um == expected
    large = delivered(called, called & ndimage.binary_dilation(~known, np.ones((3, 3))), mpp, least)
    np.testing.assert_allclose(found.objects[1], object_sums(true, large, mpp))
    assert found.confusion.sum() == known.sum()
    assert found.reliability[..., 0].sum() == (known & (labels != IGNORED)).sum()
    assert found.coarsest_um == 1.0
    assert not found.objects[0].any()
    moved = np.roll(truth, 1, axis=1)  # as much of each class
    digests = {assess(canvas, ArrayTruth(pixels), Rules(0, least)).truth for pixels in (truth, moved)}
    assert found.truth in digests and len(digests) == 2


def test_fields_are_the_known_parts_and_do_not_see_each_other(tmp_path):
    shape = (300, 520)
    truth = np.full(shape, IGNORED, np.uint8)
    truth[20:140, 30:200], truth[20:140, 202:400], truth[150:290, 60:500] = 0, 1, 0
    canvas = canvas_of(tmp_path / "c", np.ones(shape, np.uint8), PAIR)
    known = KnownMap(canvas)
    known.add(canvas.lattice.roi, truth != IGNORED)
    parts = list(known.fields(ArrayTruth(truth)))
    assert [part.truth.shape for part in parts] == [(120, 170), (120, 198), (140, 440)]
    assert all((part.prediction == 1).all() for part in parts)


def test_what_lies_between_two_fields_is_in_neither(tmp_path):
    truth = np.full((200, 300), IGNORED, np.uint8)
    truth[10:190, 10:40], truth[160:190, 10:250], truth[20:90, 100:260] = 0, 0, 1
    canvas = canvas_of(tmp_path / "c", np.ones((200, 300), np.uint8), PAIR)
    known = KnownMap(canvas)
    known.add(canvas.lattice.roi, truth != IGNORED)
    bent, block = known.fields(ArrayTruth(truth))
    assert bent.truth.shape == (180, 240) and not (bent.truth == 1).any()  # its box covers part of the other field
    assert (block.truth == 1).all()


def test_a_field_holds_all_that_is_known_and_what_touches_by_a_corner(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "CELLS", 128)  # cells of 2 x 2 pixels
    truth = np.full((130, 170), IGNORED, np.uint8)
    truth[11:52, 21:72], truth[52:93, 72:121] = 0, 1
    canvas = canvas_of(tmp_path / "c", np.ones(truth.shape, np.uint8), PAIR)
    known = KnownMap(canvas)
    known.add(canvas.lattice.roi, truth != IGNORED)
    (field,) = known.fields(ArrayTruth(truth))
    assert [(field.truth == index).sum() for index in (0, 1)] == [41 * 51, 41 * 49]


def test_what_the_edge_of_a_field_cuts_counts_in_truth_and_prediction_alike(tmp_path):
    """Nuclei of 81 um2, the first and last of which a field's edge cuts to less than 50; the slide's top cuts two."""
    shape = (120, 300)
    labels = discs(shape, *((60, column, 5) for column in range(40, 280, 20)), (-1, 100, 5), (-1, 140, 5))
    truth = np.full(shape, IGNORED, np.uint8)
    truth[:90, 42:259] = labels[:90, 42:259]
    canvas = canvas_of(tmp_path / "c", labels, PAIR)
    found = assess(canvas, ArrayTruth(truth), Rules(0, 50.0)).objects[1]
    assert (found[TRUE_COUNT], found[CALLED_COUNT], found[MATCHED]) == (14, 12, 12)  # at the top they are not delivered
    truth[:, :] = labels
    assert assess(canvas, ArrayTruth(truth), Rules(0, 50.0)).objects[1][CALLED_COUNT] == 12
    truth[60, 60] = IGNORED  # known all around it
    assert assess(canvas, ArrayTruth(truth), Rules(0, 81.0)).objects[1][CALLED_COUNT] == 12


def test_large_fields_are_read_from_a_coarser_level(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "CELLS", 256)
    shape = (900, 1300)
    truth, labels = discs(shape, (400, 500, 250)), discs(shape, (410, 520, 240))
    found = assess(canvas_of(tmp_path / "c", labels, PAIR), ArrayTruth(truth), Rules(0, 50.0))
    assert found.coarsest_um == 4.0  # 900 x 1300 is above 512 x 512, and so is a quarter of it
    fine = object_scores(object_sums(truth == 1, labels == 1, Mpp(1.0, 1.0)))
    coarse = object_scores(found.objects[1])
    assert coarse["object_dice"] == pytest.approx(fine["object_dice"], abs=0.01)
    moved_um = 2 * found.coarsest_um  # of two boundaries each is off by a pixel of the coarser level at most
    assert coarse["object_hausdorff_um"] == pytest.approx(fine["object_hausdorff_um"], abs=moved_um)
    whole = measure_boundaries(truth == 1, labels == 1, truth < 9, Mpp(1.0, 1.0), 2.0)
    assert found.boundaries[1].length == pytest.approx(whole.length, rel=0.05)


def test_a_large_field_predicted_perfectly_has_a_perfect_surface(tmp_path, monkeypatch):
    """From a coarser level truth and labels differ by a pixel of it, though the finest are the same."""
    monkeypatch.setattr(fields, "CELLS", 256)
    labels = discs((900, 1300), (400, 500, 250), (300, 900, 150))
    canvas = canvas_of(tmp_path / "c", labels, PAIR)
    for tolerance_um in (None, 1.5):
        found = assess(canvas, ArrayTruth(labels), Rules(0, 50.0, tolerance_um))
        assert (found.coarsest_um, found.tolerance_um) == (4.0, 8.0)
        assert surface_dice([found.boundaries[1]], np.ones((1, 1), int)) == 1


def test_a_phantom_predicted_perfectly(tmp_path):
    phantom = make_phantom(tmp_path / "p.tiff", seed=3, width=801, height=643, mpp=1.0)
    canvas = canvas_of(tmp_path / "c", phantom.truth, PHANTOM_CLASSES, sure=1.0)
    names = {name: index for index, name in enumerate(PHANTOM_CLASSES.names)}
    truth = open_truth(phantom.annotation, canvas.lattice, ClassMap(PHANTOM_CLASSES, names, rest=GLASS), None)
    found = assess(canvas, truth, Rules(GLASS, 0.0, lesions=(names["Tumour"],)))
    row = SlideAssessment("p", "P1", "test", found)
    scores = extended(report([row.pixels], PHANTOM_CLASSES, Mpp(1.0, 1.0), GLASS), [row], PHANTOM_CLASSES, GLASS)
    pooled = scores["test"]["pooled"]
    seen = [name for name in ("Stroma", "Gland", "Fat") if pooled[name]["pixels"] > 500]
    assert "Stroma" in seen
    for name in seen:
        figures = [pooled[name][score] for score in SHAPE_SCORES if score != "froc"]
        assert figures == [1, 1, 0, 0, 1, 0]
        assert pooled[name]["objects"] == pooled[name]["objects_matched"] > 0
    assert pooled["Glass"]["object_f1"] is None and pooled["Glass"]["ece"] == 0
    assert pooled["Stroma"]["lesions"] is None


def extended_by(row):
    """The report of a slide alone."""
    return extended(report([row.pixels], PAIR, Mpp(1.0, 1.0), 0), [row], PAIR, 0)


def test_lesions_need_a_slide_of_which_all_that_was_examined_is_known(tmp_path):
    shape = (600, 800)
    truth, labels = discs(shape, (200, 250, 150)), discs(shape, (210, 250, 140), (500, 700, 60))
    canvas = canvas_of(tmp_path / "c", labels, PAIR)
    rules = Rules(0, 50.0, lesions=(1,))
    whole = assess(canvas, ArrayTruth(truth), rules)
    found = whole.detections
    assert found[0] is None
    assert found[1].false == found[1].lesions == pytest.approx((204 / 255,))
    truth[:100, 500:] = IGNORED
    unknown = assess(canvas, ArrayTruth(truth), rules)
    assert unknown.detections == (None, None)
    rows = [SlideAssessment(name, name, "test", each) for name, each in (("a", whole), ("b", unknown))]
    pixels = [row.pixels for row in rows]
    scores = extended(report(pixels, PAIR, Mpp(1.0, 1.0), 0), rows, PAIR, 0)["test"]
    assert [scores[name]["gland"]["froc_slides"] for name in ("a", "b", POOLED)] == [1, None, 1]
    assert [scores[name]["gland"]["froc_patients"] for name in ("a", "b", POOLED)] == [1, None, 1]
    more = [replace(row, slide_id=f"{row.slide_id}{number}", patient=str(number)) for number in range(2) for row in rows]
    two = extended(report([row.pixels for row in more], PAIR, Mpp(1.0, 1.0), 0), more, PAIR, 0)
    assert few_patients(two)[0].endswith("gland (2: 50 % at best), lesions of gland (2: 50 % at best)")
    write_assessments(tmp_path / "assessments.json", rows)
    again = read_assessments(tmp_path / "assessments.json", pixels)
    assert extended(report(pixels, PAIR, Mpp(1.0, 1.0), 0), again, PAIR, 0)["test"] == scores
    assert overall_error(again, 99, 0) == overall_error(rows, 99, 0)
    for row in rows:
        write_assessment(tmp_path / "assessment.json", row.found, {"rules": "these"})
        one = read_assessment(tmp_path / "assessment.json", {"rules": "these"})
        assert one is not None and one.truth == row.found.truth
        assert extended_by(SlideAssessment(row.slide_id, row.slide_id, "test", one)) == extended_by(row)
        assert read_assessment(tmp_path / "assessment.json", {"rules": "others"}) is None
    (tmp_path / "assessment.json").write_text('{"made_from": {"rules": "these"}}')
    assert read_assessment(tmp_path / "assessment.json", {"rules": "these"}) is None
    (tmp_path / "assessments.json").write_text('{"slides": {"a": {}}}')
    for counted in (pixels, pixels[1:]):
        with pytest.raises(CohortError, match=r"assessments\.json.*Call `fullfield evaluate`"):
            read_assessments(tmp_path / "assessments.json", counted)


def test_lesions_are_looked_at_on_the_level_of_8_um_per_pixel(tmp_path):
    labels = np.zeros((100, 4200), np.uint8)
    for side in (1, 2, 4, 8, 16):
        labels[32 : 32 + side, 256 * side : 257 * side] = 1  # gone from where a pixel is more than `side` um wide
    canvas, nothing = canvas_of(tmp_path / "c", labels, PAIR), ArrayTruth(np.zeros_like(labels))
    assert canvas.levels[-1].mpp.x == 16
    for least, count in ((0.0, 2), (65.0, 1)):
        assert len(assess(canvas, nothing, Rules(0, least, lesions=(1,))).detections[1].false) == count


def test_pooled_scores_have_intervals_over_patients_and_are_json(tmp_path):
    shape = (200, 260)
    truth = discs(shape, (90, 100, 50))
    rows = []
    for number, grow in enumerate([0, 3, 8, 14]):
        canvas = canvas_of(tmp_path / str(number), discs(shape, (90, 100, 50 - grow)), PAIR)
        found = assess(canvas, ArrayTruth(truth), Rules(0, 50.0))
        rows.append(SlideAssessment(f"s{number}", f"P{max(number, 1)}", "val", found))
    pixels = report([row.pixels for row in rows], PAIR, Mpp(1.0, 1.0), 0)
    scores = extended(pixels, rows, PAIR, 0, samples=200, seed=1)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    gland = scores["val"]["pooled"]["gland"]
    alone = [scores["val"][f"s{number}"]["gland"] for number in range(4)]
    for name in ("object_dice", "object_hausdorff_um", "hd95_um", "nsd", "ece"):
        values = [part[name] for part in alone]
        ordered = [min(values), gland[f"{name}_low"], gland[name], gland[f"{name}_high"], max(values)]
        np.testing.assert_allclose(ordered, sorted(ordered), rtol=1e-9)
        assert gland[f"{name}_low"] < gland[f"{name}_high"]
        assert alone[0][f"{name}_low"] is None
    assert (gland["shape_um"], gland["tolerance_um"]) == (1.0, 2.0)
    assert (gland["objects"], gland["objects_predicted"], gland["objects_matched"]) == (4, 4, 4)
    assert gland["dice"] == pixels["val"]["pooled"]["gland"]["dice"]
    assert len({tuple(row) for row in table(scores)}) == 1  # every row has the same columns
    error = overall_error(rows, 200, 1)
    assert error["ece_low"] <= error["ece"] <= error["ece_high"]
    assert overall_error(rows[:1], 200, 1)["ece_low"] is None


@pytest.mark.parametrize("invented", [0, 6])
def test_a_class_that_one_patient_has_has_no_interval_whatever_is_invented_on_others(tmp_path, invented):
    shape = (200, 260)
    gland, none = discs(shape, (90, 100, 50)), np.zeros(shape, np.uint8)
    rows = []
    for number, truth in enumerate((gland, none, none)):
        labels = discs(shape, (93, 100, 47)) if number == 0 else discs(shape, (60, 60, invented)) if invented else none
        found = assess(canvas_of(tmp_path / str(number), labels, PAIR), ArrayTruth(truth), Rules(0, 50.0))
        rows.append(SlideAssessment(f"s{number}", f"P{number}", "val", found))
    scores = extended(report([row.pixels for row in rows], PAIR, Mpp(1.0, 1.0), 0), rows, PAIR, 0, samples=200, seed=1)
    pooled = scores["val"]["pooled"]["gland"]
    for name in ("dice", "object_dice", "object_f1", "object_hausdorff_um", "hd95_um", "nsd"):
        assert pooled[name] is not None and pooled[f"{name}_low"] is pooled[f"{name}_high"] is None
    assert overall_error(rows, 200, 1)["ece_low"] < overall_error(rows, 200, 1)["ece_high"]


def test_the_calibration_of_several_networks_is_the_mean_of_their_own(tmp_path):
    """One that is not sure enough, where it is right, and one that is too sure, where it is wrong, do not make up for it."""
    shape, rows = (200, 260), []
    gland = discs(shape, (90, 100, 50))
    for number, labels in enumerate((gland, gland, 1 - gland, discs(shape, (90, 100, 40)))):
        found = assess(canvas_of(tmp_path / str(number), labels, PAIR), ArrayTruth(gland), Rules(0, 50.0))
        rows.append(SlideAssessment(f"s{number}", f"P{number}", "val", found))
    pairs = [[replace(row, network=name) for row in rows[2 * n : 2 * n + 2]] for n, name in enumerate(("one", "two"))]
    own, both, pooled = ([overall_error(some, 300, 0) for some in group] for group in (pairs, [pairs[0] + pairs[1]], [rows]))
    assert both[0]["ece"] == pytest.approx(np.mean([error["ece"] for error in own]))  # each has examined as many pixels
    assert pooled[0]["ece"] < both[0]["ece"] and pooled[0]["ece_low"] < both[0]["ece_low"] <= both[0]["ece"]
    scores = extended(report([row.pixels for row in rows], PAIR, Mpp(1.0, 1.0), 0), pairs[0] + pairs[1], PAIR, 0)["val"]
    called = [sum(row.found.reliability[1, :, 0].sum() for row in pair) for pair in pairs]
    alone = [extended_by_patients(pair)["ece"] for pair in pairs]
    assert scores[POOLED]["gland"]["ece"] == pytest.approx(np.average(alone, weights=called))


def extended_by_patients(rows):
    """Pooled figures of gland."""
    return extended(report([row.pixels for row in rows], PAIR, Mpp(1.0, 1.0), 0), rows, PAIR, 0)["val"][POOLED]["gland"]


def test_slides_of_a_patient_are_summed_and_those_of_other_splits_left_out(tmp_path):
    """One patient's two slides score as one slide would on which both lie."""
    shape = (200, 260)
    gland, gap = discs(shape, (90, 100, 50)), np.full((200, 4), IGNORED, np.uint8)
    labels = [discs(shape, (90, 100 + shift, 50 - shift)) for shift in (2, 9, 5, 14)]
    slides = [(gland, called) for called in labels]
    slides.append((np.hstack([gland, gap, gland]), np.hstack([labels[0], 0 * gap, labels[1]])))
    one, two, third, other, both = (
        assess(canvas_of(tmp_path / str(number), called, PAIR), ArrayTruth(truth), Rules(0, 50.0))
        for number, (truth, called) in enumerate(slides)
    )
    alone, elsewhere = SlideAssessment("third", "P2", "val", third), SlideAssessment("other", "P3", "test", other)
    apart = [SlideAssessment("one", "P1", "val", one), SlideAssessment("two", "P1", "val", two), alone]
    as_one = [SlideAssessment("both", "P1", "val", both), alone]
    scores, expected = (
        extended(report([row.pixels for row in rows], PAIR, Mpp(1.0, 1.0), 0), rows, PAIR, 0, samples=200)["val"][POOLED]
        for rows in ([*apart, elsewhere], as_one)
    )
    assert scores == expected
    assert overall_error(apart, 200, 0) == overall_error(as_one, 200, 0)


def test_a_configuration_says_how_slides_are_assessed():
    path = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"
    asked = ["annotations.rest=Stroma", "segmentation.min_region_um2=70"]
    assert _rules(load_config(path, asked)) == Rules(1, 70.0, None, ())
    asked += ["evaluation.boundary_tolerance_um=3.5", "evaluation.lesions=[Tumour, Gland]"]
    assert _rules(load_config(path, asked)) == Rules(1, 70.0, 3.5, (3, 2))
