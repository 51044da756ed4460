"""Differences between two examinations of the same patients, and the counts that they are taken from."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.comparison import Difference, in_words, paired_difference
from pipeline.errors import CohortError, TrackingError
from pipeline.metrics import SlideConfusion
from pipeline.tally import Tally, find_tally, paired_means, read_tally, shared_patients, write_tally
from pipeline.tracking import Run
from workflows.compare import compare


def test_a_difference_that_each_patient_shows_is_certain_and_what_patients_have_of_their_own_does_not_count() -> None:
    first = {"easy": 0.95, "hard": 0.40, "middling": 0.70, "only here": 0.1}
    second = {name: dice + 0.02 for name, dice in first.items() if name != "only here"}
    found = paired_difference(first, second)
    assert found.patients == ("easy", "hard", "middling")
    assert found.low is not None and found.high is not None
    np.testing.assert_allclose([found.mean, found.low, found.high], 0.02)


def share_of_flips(differences: np.ndarray, centre: float) -> float:
    """Of all ways to flip the signs of differences from a centre, how many have as large a sum: one-sided p."""
    found = [np.dot(signs, differences - centre) for signs in itertools.product((1, -1), repeat=len(differences))]
    return float(np.mean(np.array(found) >= (differences - centre).sum() - 1e-12))


def test_the_interval_holds_what_flipping_signs_does_not_refuse() -> None:
    differences = np.random.default_rng(5).normal(0.05, 0.1, 7)
    first = {str(number): 0.5 for number in range(7)}
    found = paired_difference(first, {str(number): 0.5 + value for number, value in enumerate(differences)})
    assert found.low is not None and found.high is not None and 0.95 < found.confidence < 0.96
    assert share_of_flips(differences, found.low - 1e-9) <= 0.025 < share_of_flips(differences, found.low + 1e-9)
    assert share_of_flips(-differences, -found.high - 1e-9) <= 0.025 < share_of_flips(-differences, -found.high + 1e-9)


@pytest.mark.parametrize("patients", [3, 6, 9, 20])
def test_equal_models_are_told_apart_no_more_than_once_in_twenty_times(patients: int) -> None:
    rng, told = np.random.default_rng(0), 0
    for differences in rng.standard_t(3, (600, patients)) * 0.03:
        second = {str(number): 0.5 + value for number, value in enumerate(differences)}
        told += "No difference" not in in_words(paired_difference(dict.fromkeys(second, 0.5), second), "A", "B", "Dice")
    assert (told / 600 < 0.07) if patients >= 6 else not told


def test_a_patient_who_gains_most_hides_not_that_all_gain() -> None:
    gains = (0.02, 0.03, 0.01, 0.04, 0.02, 0.03, 0.02, 0.7)
    second = {str(number): 0.2 + gain for number, gain in enumerate(gains)}
    found = paired_difference(dict.fromkeys(second, 0.2), second)
    assert found.low is not None and found.low > 0


def test_of_few_patients_the_interval_is_their_range_and_less_sure() -> None:
    found = paired_difference({"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 0.3, "b": 0.35, "c": 0.7})
    assert (found.low, found.high) == pytest.approx((0.05, 0.2))
    assert found.confidence == 0.75


def counts_of(patient: str, *rows: list[int]) -> SlideConfusion:
    return SlideConfusion(f"slide of {patient}", patient, "test", np.array(rows))


def test_invented_pixels_of_those_who_lack_a_class_decide_nothing_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    has = [counts_of(f"ill {number}", [10**6, 0, 0], [20, 80, 0]) for number in range(6)]
    runs = []
    for name, invented in (("noisy", 1), ("lavish", 5000), ("sparing", 0)):
        healthy = [counts_of(f"healthy {number}", [10**6 - invented, invented, 0], [0, 0, 0]) for number in range(8)]
        unknown = counts_of("unknown", [0, 0, 0], [0, 0, 0])
        runs.append(folder_of(tmp_path / name, Tally(("Rest", "Gland"), 0, 2.0, (*has, *healthy, unknown))))
    noisy, lavish, sparing = runs
    assert compare([sparing, noisy, lavish]) == 0
    said = capsys.readouterr().out
    for run, area in ((noisy, "less than 0.001 mm2"), (lavish, "0.160 mm2")):  # 8 x 5000 px of 4 um2
        even = f"No difference can be told between {sparing} and {run} by Dice for Gland: it is +0.000 for {run}"
        assert f"{even} (95 % interval 0.000 to 0.000, 6 patients)." in said
        assert f"On 8 patients without Gland: {sparing} invents none, {run} {area}." in said
    assert "healthy 1 " not in said[said.index("Dice, Gland") :]
    assert compare([sparing, folder_of(tmp_path / "as sparing", find_tally(sparing))]) == 0
    assert "invents" not in capsys.readouterr().out


def test_what_was_not_examined_is_invented_of_the_background_alone() -> None:
    tally = Tally(("Rest", "Gland"), 0, 1000.0, (counts_of("a", [0, 0, 0], [1, 2, 3]), counts_of("b", [4, 5, 6], [0, 0, 0])))
    assert (tally.invented("Rest"), tally.invented("Gland")) == ({"a": 4.0}, {"b": 5.0})
    assert replace(tally, rest=None).invented("Rest") == {"a": 1.0}


def test_a_class_that_the_truth_has_at_one_scale_alone_favours_nobody() -> None:
    fine = Tally(
        ("Rest", "Tumour"), 0, 1.0, (counts_of("a", [39994, 0, 0], [1, 5, 0]), counts_of("b", [99, 1, 0], [50, 50, 0]))
    )
    coarse = Tally(
        ("Rest", "Tumour"), 0, 4.0, (counts_of("a", [2500, 0, 0], [0, 0, 0]), counts_of("b", [7, 0, 0], [3, 3, 0]))
    )
    assert fine.dice("Tumour").keys() & coarse.dice("Tumour").keys() == {"b"}
    assert not fine.invented("Tumour").keys() & coarse.invented("Tumour").keys()
    ours, theirs = paired_means(fine, coarse)
    assert ours["a"] == pytest.approx(2 * 39994 / (2 * 39994 + 1))  # of the rest alone, as the coarse one
    assert theirs["a"] == 1.0


def test_one_patient_has_no_interval_and_none_is_an_error() -> None:
    found = paired_difference({"a": 0.5}, {"a": 0.75})
    assert (found.mean, found.low, found.high) == (0.25, None, None)
    with pytest.raises(ValueError, match="share no patient"):
        paired_difference({"a": 0.5}, {"b": 0.5})


def test_a_tally_comes_back_and_sums_the_slides_of_a_patient(tmp_path: Path) -> None:
    one, two = np.array([[6, 2, 0], [1, 3, 1]]), np.array([[9, 0, 1], [0, 0, 0]])
    rows = (
        SlideConfusion("s1", "p", "val", one, "a digest"),
        SlideConfusion("s2", "p", "val", two),
        SlideConfusion("s3", "q", "val", two),
    )
    write_tally(tmp_path / "confusions.json", Tally(("Rest", "Gland"), 0, 0.5, rows))
    found = read_tally(tmp_path / "confusions.json")
    assert (found.classes, found.rest, found.mpp) == (("Rest", "Gland"), 0, 0.5)
    assert [(row.slide_id, row.patient, row.split, row.truth) for row in found.rows] == [
        ("s1", "p", "val", "a digest"),
        ("s2", "p", "val", ""),
        ("s3", "q", "val", ""),
    ]
    assert found.dice("Gland") == {"p": 2 * 3 / (2 * 3 + 2 + 2)}  # q has no gland at all
    assert found.dice("Rest")["q"] == 1.0  # what was not examined counts as background


def test_a_damaged_tally_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "confusions.json").write_text('{"classes": ["a"]')
    with pytest.raises(CohortError, match="broken JSON.*fullfield run"):
        read_tally(tmp_path / "confusions.json")


def a_tally(dice: dict[str, float], split: str = "test", mpp: float = 1.0) -> Tally:
    """Two classes; of each patient 1000 px of gland in 3000, and as many px right and wrong as give this Dice of gland."""
    rows = []
    for patient, value in dice.items():
        right = round(1000 * value)  # as many called so as there are, so Dice is the share that is right
        counts = np.array([[1000 + right, 1000 - right, 0], [1000 - right, right, 0]])
        rows.append(SlideConfusion(f"slide of {patient}", patient, split, counts))
    return Tally(("Rest", "Gland"), 0, mpp, tuple(rows))


BASE = {"a": 0.5, "b": 0.8, "c": 0.9, "d": 0.6, "e": 0.7, "f": 0.85}


def folder_of(path: Path, tally: Tally) -> str:
    write_tally(path / "confusions.json", tally)
    return str(path)


def test_compare_says_in_a_sentence_what_was_made_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = folder_of(tmp_path / "first", a_tally(BASE | {"left out": 0.1}))
    better = folder_of(tmp_path / "better", a_tally({name: dice + 0.05 for name, dice in BASE.items()}, split="val"))
    mixed = folder_of(tmp_path / "mixed", a_tally(BASE | {"a": 0.6, "b": 0.7}))
    assert compare([first, better, mixed]) == 0
    said = capsys.readouterr().out
    assert f"{better} is better than {first} by 0.050 Dice for Gland (95 % interval 0.050 to 0.050, 6 patients)." in said
    assert f"No difference can be told between {first} and {mixed} by Dice for Gland: it is +0.000" in said
    assert "left out, as only one has them: left out" in said
    assert f"{first}, {better}: a, b, c, d, e, f chose the epoch of {better} alone, which flatters it" in said
    assert said.count("flatters") == 1
    assert said.count("of these trainings") == 1
    assert compare([better, first]) == 0
    assert f"{first} is worse than {better} by 0.050 Dice for Gland" in capsys.readouterr().out


def test_compare_says_whom_its_patients_flatter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the six of `test` the second is better by 0.05; on those that validate, which chose the epochs, it is worse."""
    better, worse = ({name: dice + gain for name, dice in BASE.items()} for gain in (0.05, -0.2))
    validating = {f"val {name}": dice for name, dice in BASE.items()}
    runs = []
    for name, tested, validated in (("a", BASE, BASE), ("b", better, worse)):
        chosen = a_tally(dict(zip(validating, validated.values(), strict=True)), split="val")
        for kind, rows in (("both", (*a_tally(tested).rows, *chosen.rows)), ("val", chosen.rows)):
            runs.append(folder_of(tmp_path / f"{name} {kind}", replace(chosen, rows=rows)))
    a, a_val, b, b_val = runs
    assert compare([a, b]) == 0
    said = capsys.readouterr().out
    assert "Compared on test slides alone" in said and "epochs of both" not in said
    assert f"{b} is better than {a} by 0.050 Dice for Gland (95 % interval 0.050 to 0.050, 6 patients)." in said
    assert compare([a_val, b_val]) == 0
    said = capsys.readouterr().out
    assert f"{', '.join(validating)} chose the epochs of both, which flatters both" in said
    assert "Compared on test slides" not in said
    assert f"{b_val} is worse than {a_val} by 0.200 Dice for Gland" in said


@pytest.mark.parametrize(
    ("mean", "low", "high", "said"),
    [
        (
            0.02,
            -0.01,
            0.05,
            "No difference can be told between A and B by Dice: it is +0.020 for B (95 % interval -0.010 to 0.050",
        ),
        (
            -0.02,
            -0.05,
            0.01,
            "No difference can be told between A and B by Dice: it is -0.020 for B (95 % interval -0.050 to 0.010",
        ),
        (0.02, 0.01, 0.04, "B is better than A by 0.020 Dice (95 % interval 0.010 to 0.040, 6 patients)."),
        (-0.02, -0.04, -0.01, "B is worse than A by 0.020 Dice (95 % interval 0.010 to 0.040, 6 patients)."),
        (-2e-4, -4e-4, -1e-4, "B is worse than A by less than 0.001 Dice (95 % interval 0.000 to 0.000, 6 patients)."),
    ],
)
def test_one_is_better_where_the_interval_leaves_out_none(mean: float, low: float, high: float, said: str) -> None:
    assert in_words(Difference(tuple("abcdef"), mean, low, high, 0.97), "A", "B", "Dice").startswith(said)


def test_one_patient_tells_nothing() -> None:
    said = in_words(Difference(("a",), 0.2, None, None, 0.0), "A", "B", "Dice")
    assert said == "No difference can be told between A and B by Dice: it is +0.200 for B, on 1 patient."


def test_five_patients_tell_nothing_either() -> None:
    said = in_words(paired_difference(dict.fromkeys("abcde", 0.5), dict.fromkeys("abcde", 0.75)), "A", "B", "Dice")
    untold = "No difference can be told between A and B by Dice: it is +0.250 for B"
    assert said == f"{untold} (0.250 to 0.250 on 5 patients; 6 or more can tell)."


def test_what_a_run_learned_from_is_not_compared(tmp_path: Path) -> None:
    seen = folder_of(tmp_path / "seen", a_tally(BASE, split="train"))
    with pytest.raises(CohortError, match="no patient is shared"):
        compare([seen, folder_of(tmp_path / "other", a_tally(BASE))])


def test_unlike_runs_are_refused_and_what_they_share_is_named() -> None:
    ours = a_tally(BASE)
    assert shared_patients(ours, a_tally({"b": 0.1, "c": 0.2, "new": 0.3})) == {"b", "c"}
    with pytest.raises(CohortError, match="another background"):
        shared_patients(ours, replace(ours, classes=("Rest", "Tumour")))
    with pytest.raises(CohortError, match="another background"):
        shared_patients(ours, replace(ours, rest=None))
    other = replace(
        ours, rows=(*ours.rows[1:], replace(ours.rows[0], confusion=ours.rows[0].confusion + np.eye(2, 3, dtype=int)))
    )
    with pytest.raises(CohortError, match="shared patients a, b, c, d, e, f, but another truth for slide of a"):
        shared_patients(ours, other)
    noted, moved = (replace(ours, rows=(replace(ours.rows[0], truth=truth), *ours.rows[1:])) for truth in ("one", "two"))
    with pytest.raises(CohortError, match="another truth for slide of a"):  # of the same areas
        shared_patients(noted, moved)
    assert shared_patients(noted, ours) == shared_patients(noted, noted) == set(BASE)
    failed = replace(ours, rows=(*ours.rows, replace(ours.rows[0], slide_id="a second slide")))
    for pair, name in (((ours, failed), "runs/x"), ((failed, ours), "runs/y")):
        with pytest.raises(CohortError, match=f"but {name} lacks a second slide.*call `fullfield run` with"):
            shared_patients(*pair, ("runs/x", "runs/y"))


def test_two_scales_may_differ_by_what_a_border_takes() -> None:
    fine = a_tally(BASE, mpp=1.0)
    rows = tuple(replace(row, confusion=row.confusion // 4) for row in fine.rows)
    assert shared_patients(fine, replace(fine, mpp=2.0, rows=rows)) == set(BASE)
    with pytest.raises(CohortError, match="another truth"):
        shared_patients(fine, replace(fine, mpp=2.3, rows=rows))
    other = tuple(replace(row, confusion=row.confusion[::-1]) for row in rows)  # as much of the slide is known
    with pytest.raises(CohortError, match="another truth"):
        shared_patients(fine, replace(fine, mpp=2.0, rows=other))


def test_a_small_class_may_differ_by_thirty_pixels_of_the_coarser_scale() -> None:
    fine = Tally(("Rest", "Gland"), 0, 1.0, (counts_of("a", [160_000, 0, 0], [0, 100, 0]),))
    coarse, wrong = (
        Tally(("Rest", "Gland"), 0, 4.0, (counts_of("a", [10_000, 0, 0], [0, gland, 0]),)) for gland in (20, 40)
    )
    assert shared_patients(fine, coarse) == shared_patients(coarse, fine) == {"a"}
    with pytest.raises(CohortError, match="another truth"):
        shared_patients(fine, wrong)


def test_a_run_of_mlflow_is_found_with_the_counts_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.start(tmp_path / "out", "fullfield", "one") as run, run.child("evaluate") as stage:
        write_tally(tmp_path / "confusions.json", a_tally(BASE))
        stage.log_file(tmp_path / "confusions.json")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.store.address)
    for reference in (run.run_id, f"runs:/{run.run_id}", f"runs:/{stage.run_id}"):
        assert find_tally(reference).dice("Gland") == pytest.approx(BASE)
    with pytest.raises(TrackingError, match="neither a folder nor a run"):
        find_tally("runs/nowhere")
