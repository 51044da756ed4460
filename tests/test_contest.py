"""What decides a promotion, and whose slides may: with random networks, and what they are said to have learned from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml

from pipeline import __version__
from pipeline.architectures import build_network
from pipeline.checkpoint import save
from pipeline.classes import Classes
from pipeline.cohort import read_manifest, write_manifest
from pipeline.comparison import Difference
from pipeline.contest import Contest
from pipeline.errors import CheckpointError, CohortError, TrackingError
from pipeline.files import file_digest
from pipeline.histology import GLASS
from pipeline.lineage import Seen
from pipeline.metrics import SlideConfusion
from pipeline.network import ModelSpec
from pipeline.origin import origin
from pipeline.phantom import PHANTOM_CLASSES, make_cohort
from pipeline.slide import open_slide
from pipeline.store import open_store
from pipeline.tally import Tally
from pipeline.versions import Version, decide, find_version
from workflows.promote import _flattered, _strangers, _tags, promote

pytestmark = pytest.mark.usefixtures("one_thread")
DEMO = Path(__file__).parents[1] / "workflows" / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotated test slides of P0, P1 and P2, their configuration `config.yaml`, and a store."""
    folder = tmp_path_factory.mktemp("contest")
    manifest = make_cohort(folder, seed=7, slides=3, width=401, height=303, mpp=2.0)
    cases = read_manifest(manifest)
    write_manifest(manifest, [replace(case, patient=f"P{number}", split="test") for number, case in enumerate(cases)])
    content = {**yaml.safe_load(DEMO.read_text()), "cohort": {"manifest": str(manifest)}, "cluster": {"workers": 0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def store(home: Path) -> Iterator[mlflow.MlflowClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/store.db")
        client = open_store(f"sqlite:///{home}/store.db", create=True).client
        client.create_registered_model("tissue")
        yield client


@pytest.fixture(scope="module")
def register(home: Path, store: mlflow.MlflowClient) -> Callable[..., str]:
    """Makes a version of a random network, which `saw` other slides of some patients, each (patient, split).

    One with an alias is of other weights than one without.
    """
    numbers, run = count(), store.create_run(store.create_experiment("contest", f"{home.as_uri()}/runs"))

    def registered(
        alias: str | None = None, classes: Classes = PHANTOM_CLASSES, mpp: float = 4.0, saw: tuple[tuple[str, str], ...] = ()
    ) -> str:
        torch.manual_seed(0 if alias else 1)
        spec = ModelSpec(
            architecture="fcn", classes=classes, mpp=mpp, patch_size=32, width=4, depth=2, stride=4, halo=16, rest=GLASS
        )
        slides = [{"slide_digest": f"of {patient}", "patient": patient, "split": split} for patient, split in saw]
        folder = home / f"model-{next(numbers)}"
        save(folder, spec, build_network(spec), ancestry={"slides": slides})
        number = str(store.create_model_version("tissue", folder.as_uri(), run.info.run_id).version)
        if alias:
            store.set_registered_model_alias("tissue", alias, number)
        return number

    return registered


def test_the_lower_bound_of_the_mean_and_the_upper_one_of_a_class_decide(
    home: Path, store: mlflow.MlflowClient, register: Callable[..., str]
) -> None:
    champion, challenger = register("best"), register()

    def holder(margin: float) -> str:
        promote(f"models:/tissue/{challenger}", "best", margin, home / "config.yaml", home / "out")
        return str(store.get_registered_model("tissue").aliases["best"])

    assert holder(-1.0) == champion  # nobody wins by so much
    tags = store.get_model_version("tissue", challenger).tags
    mean, low = (float(tags[f"fullfield.best.{name}"]) for name in ("difference", "low"))
    shown = [-found["high"] for found in json.loads(tags["fullfield.best.classes"]).values()]
    least = max(-low, *shown)
    assert low < mean and holder(least - 0.001) == champion
    assert holder(least) == challenger


def tally_of(tumour: tuple[float, ...], others: float) -> Tally:
    """Forty patients with 1000 px of gland, the first of whom have as many of tumour: of each, such a share is found."""
    rows = []
    for number in range(40):
        found = [0, round(1000 * others), round(1000 * tumour[number]) if number < len(tumour) else 0]
        counts = np.diag(found) + np.array([[10**6, 0, 0], [1000 - found[1], 0, 0], [0, 0, 0]])
        counts[2, 0] = (1000 - found[2]) * (number < len(tumour))
        rows.append(SlideConfusion(f"s{number}", f"P{number:02}", "test", np.pad(counts, ((0, 0), (0, 1)))))
    return Tally(("Rest", "Gland", "Tumour"), 0, 1.0, tuple(rows))


def test_a_class_that_is_shown_to_lose_more_than_the_margin_refuses() -> None:
    """Though few patients have it, so that the mean over classes and patients hardly loses."""
    champion, well = tally_of((0.80, 0.82, 0.84, 0.78, 0.81, 0.79), 0.9), (0.81, 0.80, 0.85, 0.77, 0.82, 0.78)
    for tumour, takes in ((well, True), (tuple(share - 0.1 for share in well), False)):
        contest = Contest.between(champion, tally_of(tumour, 0.9))
        assert contest is not None and contest.mean.low is not None and contest.mean.low > -0.01
        assert contest.takes(0.01) is takes and list(contest.worse(0.01)) == ([] if takes else ["Tumour"])
        assert contest.takes(0.2)
        assert contest.classes["Tumour"].patients == tuple(f"P{number:02}" for number in range(6))
        told, said = contest.by_class()["Tumour"], contest.verdict("models:/tissue/1", 0.01)
        if takes:
            assert said.startswith("taken: mean Dice") and said.endswith("leaves out a loss of more than 0.01")
        else:
            interval = f"95 % interval {told['low']:+.3f} to {told['high']:+.3f}, 6 patients"
            assert said.endswith(f"but more than 0.01 is lost for Tumour, {told['difference']:+.3f} ({interval})")
    assert (few := Contest.between(champion, tally_of((0.1,), 0.9))) is not None and few.takes(0.05)  # of one patient
    unsure = Contest(0.5, 0.5, Difference(tuple("abcdef"), -0.01, -0.03, 0.01, 0.97), {})
    assert unsure.takes(0.03) and not unsure.takes(0.029)
    assert "does not leave out a loss of more than 0.01" in unsure.verdict("another", 0.01)


def test_a_verdict_counts_only_against_who_still_has_the_alias(
    store: mlflow.MlflowClient, home: Path, register: Callable[..., str]
) -> None:
    """Two may be promoted at once, and each be better than who had the alias as they began."""
    place = open_store(f"sqlite:///{home}/store.db", create=False)
    first, second, third = (Version("tissue", register(), "run", home) for _ in range(3))
    decide(place, first, "raced", None, True, {"verdict": "taken"})
    for holder in (None, first):
        if holder == first:
            decide(place, second, "raced", first, True, {"verdict": "taken"})
        with pytest.raises(TrackingError, match="has moved meanwhile.*Call again"):
            decide(place, third, "raced", holder, True, {"verdict": "taken"})
    assert store.get_registered_model("tissue").aliases["raced"] == int(second.number)
    assert not store.get_model_version("tissue", third.number).tags


def test_patients_that_either_has_seen_do_not_decide(
    home: Path, store: mlflow.MlflowClient, register: Callable[..., str]
) -> None:
    register("known", saw=(("P0", "val"),))
    challenger = register(saw=(("P1", "train"),))
    promote(f"models:/tissue/{challenger}", "known", 0.01, home / "config.yaml", home / "out")
    tags = store.get_model_version("tissue", challenger).tags
    assert json.loads(tags["fullfield.known.patients"]) == ["P2"]
    check_basis(home, challenger, tags)


def check_basis(home: Path, challenger: str, tags: dict[str, str]) -> None:
    """The verdict rests on slides, annotations, models and code that are told by digest, in a file that has one itself."""
    (path,) = (home / "out").glob(f"tissue-{challenger}-*/known/lineage.json")
    found, case = json.loads(path.read_text()), read_manifest(home / "cohort.csv")[2]
    (slide,) = found["slides"]
    assert (slide["patient"], slide["slide_digest"]) == ("P2", open_slide(case.slide).digest())
    assert slide["annotation_digest"] == file_digest(case.annotation)
    assert [model["ancestry"]["slides"][0]["patient"] for model in found["contestants"]] == ["P0", "P1"]
    assert path.parent.parent.name.endswith(found["contestants"][1]["digest"][:8])
    assert tags["fullfield.known.lineage"] == file_digest(path)
    assert (tags["fullfield.known.version"], tags["fullfield.known.code"]) == (__version__, origin()["code"])


def test_whom_patients_flatter_is_told_by_whose_epoch_they_chose(
    store: mlflow.MlflowClient, register: Callable[..., str]
) -> None:
    champion, challenger, stranger = (
        find_version(f"models:/tissue/{register(saw=((patient, split),))}")[1]
        for patient, split in (("P0", "val"), ("P1", "val"), ("P0", "train"))
    )
    slides = [{"slide_digest": f"of P{number}"} for number in range(3)]
    assert _flattered(slides, champion, challenger) == "which flatters both: their epochs were chosen by them"
    assert _flattered(slides[:1], champion, challenger) == "which flatters the champion: its epoch was chosen by them"
    assert _flattered(slides[1:], champion, challenger) == "which flatters the challenger: its epoch was chosen by them"
    assert _flattered(slides[2:], champion, challenger) == _flattered(slides, stranger, stranger) == ""


def test_patients_that_are_too_many_for_a_tag_are_told_in_short(
    store: mlflow.MlflowClient, home: Path, register: Callable[..., str]
) -> None:
    """MLflow would refuse the verdict; their names are in the promotion's lineage."""
    patients = tuple(f"patient {number:020}" for number in range(4000))
    place, version = open_store(f"sqlite:///{home}/store.db", create=False), Version("tissue", register(), "run", home)
    for some, told in ((3, None), (4000, "4000, all of them in lineage.json: patient 0")):
        equal = Difference(patients[:some], 0.0, 0.0, 0.0, 1.0)
        contest = Contest(0.5, 0.5, equal, dict.fromkeys(patients[:some], equal))  # as many classes
        decide(place, version, "crowd", None, False, _tags(contest))
        tags = store.get_model_version("tissue", version.number).tags
        for tag in (tags["fullfield.crowd.patients"], tags["fullfield.crowd.classes"]):
            assert len(tag) < 8000 and (tag.startswith(told) if told else list(json.loads(tag)) == list(patients[:3]))


def facts_of(slide_id: str, patient: str) -> dict[str, str]:
    return {"slide_id": slide_id, "patient": patient, "slide_digest": f"digest {slide_id}"}


def test_a_name_is_told_from_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    """Who shares a slide with the training is that patient, all slides; of a name alone nobody knows."""
    slides = [facts_of("old", "1"), facts_of("new", "1"), facts_of("abroad", "2"), facts_of("free", "3")]
    seen = {"A": Seen(frozenset({"digest old"}), frozenset({"P1"})), "B": Seen(frozenset({"other"}), frozenset({"2"}))}
    assert _strangers(slides, seen) == (slides[-1:], True)
    old, new, abroad = capsys.readouterr().out.splitlines()
    assert old == "left out old: A was trained on that patient" and new == "left out new: A was trained on that patient"
    assert abroad.startswith("left out abroad: B was trained on a patient of the same name, 2, but on other slides")
    assert _strangers(slides[:2], seen) == ([], False)


def test_a_cohort_whose_patients_are_called_alike_is_refused_with_what_to_do(
    home: Path, register: Callable[..., str]
) -> None:
    register("namesakes", saw=tuple((f"P{number}", "train") for number in range(3)))
    with pytest.raises(CohortError, match="Rename patients in the manifest that are other people"):
        promote(f"models:/tissue/{register()}", "namesakes", 0.01, home / "config.yaml", home / "out")


def test_a_champion_with_other_classes_is_no_rival(home: Path, register: Callable[..., str]) -> None:
    register("other", classes=Classes((*PHANTOM_CLASSES,)[::-1]))
    with pytest.raises(CheckpointError, match="Choose another alias"):
        promote(f"models:/tissue/{register()}", "other", 0.01, home / "config.yaml", home / "out")


def test_scales_at_which_the_truth_differs_are_refused(home: Path, tmp_path: Path, register: Callable[..., str]) -> None:
    """Stripes of 4 um every 16 um: at 16 um/px no pixel's centre lies in one."""
    stripes = [[[[x, 0], [x + 2, 0], [x + 2, 303], [x, 303], [x, 0]]] for x in range(0, 401, 8)]
    kind = {"classification": {"name": "Gland"}}
    outline = {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": stripes}, "properties": kind}
    (tmp_path / "stripes.geojson").write_text(json.dumps(outline))
    case, *_ = read_manifest(home / "cohort.csv")
    write_manifest(tmp_path / "cohort.csv", [replace(case, annotation=tmp_path / "stripes.geojson")])
    content = yaml.safe_load((home / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "cohort": {"manifest": str(tmp_path / "cohort.csv")}}))
    register("coarse", mpp=16.0)
    with pytest.raises(CohortError, match="another truth"):
        promote(f"models:/tissue/{register()}", "coarse", 0.01, tmp_path / "config.yaml", tmp_path / "out")
