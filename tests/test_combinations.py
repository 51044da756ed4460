"""The combinations of a sweep, and the table that ranks them."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.combinations import combine
from pipeline.errors import ConfigError
from pipeline.scoreboard import Entry, ranked, write_scoreboard


def test_the_product_of_all_values_with_names_for_folders() -> None:
    fixed, found = combine(["training.learning_rate=1e-3,3e-4", "training.epochs=2", "network.width=16,32"])
    assert fixed == ["training.epochs=2"]
    assert [combination.name for combination in found] == [
        "learning_rate=0.001,width=16",
        "learning_rate=0.001,width=32",
        "learning_rate=0.0003,width=16",
        "learning_rate=0.0003,width=32",
    ]
    assert found[1].values == {"training.learning_rate": 0.001, "network.width": 32}
    assert found[1].overrides == ["training.learning_rate=0.001", "network.width=32"]


def test_words_are_told_as_they_were_written() -> None:
    fixed, (first, _) = combine(["output=Läufe/sw", "network.architecture=unet,fcn"])
    assert fixed == ['output="Läufe/sw"'] and first.overrides == ['network.architecture="unet"']


def test_lists_words_and_keys_with_the_same_last_word() -> None:
    _, found = combine(["a.mpp=2,4", "b.mpp=[1, 2],[3]", "normalisation.method=none,reinhard"])
    assert len(found) == 8
    assert found[0].values == {"a.mpp": 2, "b.mpp": [1, 2], "normalisation.method": "none"}
    assert found[0].name == "a.mpp=2,b.mpp=_1,_2_,method=none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epochs=3"], "two values or more"),
        (["training.epochs"], "no `=`"),
        (["training.epochs="], "nothing beside it"),
        (["training.epochs=1,2", "training.epochs=3"], "given twice"),
        (["training.epochs=1,2,1"], "several combinations"),
        (["output=a,b"], "one for a whole sweep"),
        (["cohort.manifest=a.csv,b.csv"], "one for a whole sweep"),
        (["training.epochs=1,["], "broken YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combine(overrides)


def scored(name: str, first: float | None, second: float | None) -> Entry:
    scores = {
        label: {
            "dice": dice,
            "pixels": 9,
            "dice_low": None if dice is None else dice - 0.1,
            "dice_high": None if dice is None else dice + 0.1,
        }
        for label, dice in (("Rest", first), ("Gland", second))
    }
    return Entry(name, {"network.width": 8}, scores)


def test_the_best_stands_first_and_a_failure_last_with_its_reason(tmp_path: Path) -> None:
    entries = [
        Entry("broken", {"network.width": 4}, {}, "the loss | is nan"),
        replace(scored("part", 1.0, 1.0), reason="scored on a part of the validation slides"),
        scored("good", 0.9, None),
        scored("fair", 0.9, 0.5),
    ]
    assert [entry.name for entry in ranked(entries)] == ["good", "fair", "part", "broken"]
    write_scoreboard(tmp_path, ranked(entries))
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["dice"], row["status"]) for row in rows] == [
        ("good", "0.9", "done"),
        ("fair", "0.7", "done"),
        ("part", "1.0", "incomplete"),
        ("broken", "", "failed"),
    ]
    assert rows[3]["reason"] == "the loss | is nan"
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert "| 0.900 (0.800 to 1.000) |" in table[2]
    assert r"the loss \| is nan" in table[5]
    assert Image.open(tmp_path / "sweep.png").width > 100


def test_a_class_may_be_called_like_a_bound_of_another(tmp_path: Path) -> None:
    scores = {
        "Tumour": {"dice": 0.9, "dice_low": 0.8, "dice_high": 1.0, "pixels": 9},
        "Tumour low": {"dice": 0.4, "dice_low": None, "dice_high": None, "pixels": 9},
    }
    write_scoreboard(tmp_path, [Entry("one", {}, scores)])
    with (tmp_path / "sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["dice Tumour"], row["dice_low Tumour"], row["dice Tumour low"]) == ("0.9", "0.8", "0.4")
    head, _, line = (tmp_path / "sweep.md").read_text().splitlines()
    assert head.split(" | ")[1:4] == ["dice", "dice Tumour", "dice Tumour low"]
    assert line.split(" | ")[1:4] == ["0.650", "0.900 (0.800 to 1.000)", "0.400"]


def test_a_class_that_the_truth_does_not_have_has_no_part_in_the_mean() -> None:
    entry = scored("one", 0.8, 0.0)
    assert entry.dice == 0.4
    assert replace(entry, scores={**entry.scores, "Gland": {**entry.scores["Gland"], "pixels": 0}}).dice == 0.8


def test_a_picture_of_an_earlier_sweep_does_not_stay(tmp_path: Path) -> None:
    write_scoreboard(tmp_path, [scored("good", 0.9, None)])
    write_scoreboard(tmp_path, [Entry("broken", {}, {}, "the loss is nan")])
    assert not (tmp_path / "sweep.png").exists()


def test_a_date_is_a_name_like_any_other() -> None:
    fixed, found = combine(["output=2026-11-29", "network.width=8,16"])
    assert fixed == ['output="2026-11-29"']
    assert len(found) == 2
