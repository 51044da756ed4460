from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cohort import Case, deal_out, read_manifest, write_manifest
from pipeline.errors import CohortError


def manifest(folder: Path, text: str, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    path = folder / "cohort.csv"
    path.write_text(text)
    return path


def test_columns_have_defaults_and_paths_are_relative(tmp_path: Path) -> None:
    path = manifest(tmp_path, "slide,mpp\nscans/a.svs,\nscans/b.svs,0.25\n", "scans/a.svs", "scans/b.svs")
    a, b = read_manifest(path)
    assert a == Case("a", "a", tmp_path / "scans/a.svs")
    assert b.mpp == 0.25


@pytest.mark.parametrize(
    ("one", "other"),
    [("P1", "p1"), ("P 1", "P\u00a01"), ("M\u00fcller", "Mu\u0308ller"), ("007", "7"), ("07", "7.0")],
    ids=["capitals", "spaces", "accents", "zeros", "fraction"],
)
def test_a_patient_is_written_alike(tmp_path: Path, one: str, other: str) -> None:
    text = f"slide,patient,split\na.svs,{one},train\nb.svs,{other},val\n"
    with pytest.raises(CohortError, match="differ in capital letters, spaces, the encoding of accents or zeros alone"):
        read_manifest(manifest(tmp_path, text, "a.svs", "b.svs"))


def test_a_scan_under_two_names_is_one_scan(tmp_path: Path) -> None:
    path = manifest(tmp_path, "slide,patient,split\na.svs,P1,train\nb.svs,P2,test\n", "a.svs")
    (tmp_path / "b.svs").symlink_to("a.svs")
    with pytest.raises(CohortError, match=r"slide stands 2 times: .*a\.svs"):
        read_manifest(path)


def test_slides_are_no_patients_and_may_differ_in_zeros(tmp_path: Path) -> None:
    path = manifest(tmp_path, "slide,patient\n01.svs,P1\n1.svs,P2\n", "01.svs", "1.svs")
    assert [case.slide_id for case in read_manifest(path)] == ["01", "1"]


def test_a_link_keeps_its_name_in_what_is_written(tmp_path: Path) -> None:
    """What belongs to a slide of many files lies beside the link, not beside the file that it leads to."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "5f3a").write_bytes(b"")
    (tmp_path / "a.mrxs").symlink_to("store/5f3a")
    write_manifest(tmp_path / "written.csv", read_manifest(manifest(tmp_path, "slide\na.mrxs\n")))
    (case,) = read_manifest(tmp_path / "written.csv")
    assert case.slide == tmp_path / "a.mrxs"


def test_ids_that_differ_in_capitals_alone_are_one_folder_on_some_disks(tmp_path: Path) -> None:
    text = "slide,slide_id,patient\na.svs,Left,P1\nb.svs,left,P2\n"
    with pytest.raises(CohortError, match=r"slide_id 'Left' is shared by .*a\.svs, .*b\.svs"):
        read_manifest(manifest(tmp_path, text, "a.svs", "b.svs"))


def test_empty_columns_of_a_spreadsheet_count_for_nothing(tmp_path: Path) -> None:
    path = manifest(tmp_path, "slide,patient,,\na.svs,P1,,\n,,,\n", "a.svs")
    assert read_manifest(path) == (Case("a", "P1", tmp_path / "a.svs"),)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_spreadsheet_may_write_decimal_commas_and_other_marks_between_values(tmp_path: Path, mark: str) -> None:
    text = "slide;patient;mpp\r\na, b.svs;Müller;0,25\r\n".replace(";", mark)
    path = manifest(tmp_path, text, "a, b.svs")
    assert read_manifest(path) == (Case("a, b", "Müller", tmp_path / "a, b.svs", mpp=0.25),)


def test_a_path_as_windows_writes_it_is_told_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.svs").touch()
    with pytest.raises(CohortError, match=r"a\.svs: write / in place of \\"):
        read_manifest(manifest(tmp_path, "slide\nscans\\a.svs\n"))


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    rows = ["a.svs,P1,train,,", "b.svs,P1,val,,", "c.svs,P2,trian,x.xml,no", "a.svs,P1,train,,", ",,train,,"]
    text = "\n".join(["slide,patient,split,annotation,mpp", *rows])
    with pytest.raises(CohortError) as caught:
        read_manifest(manifest(tmp_path, text, "a.svs", "b.svs"))
    message = str(caught.value)
    for part in (
        "'P1' is in two splits",
        "b in val",
        "'trian'",
        "no such slide",
        "x.xml",
        "'no'",
        "stands 2 times",
        "no slide",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("slide,stain\na.svs,HE\n", "unknown column 'stain'"),
        ("slide,stain\nz.svs,HE\n", "unknown column 'stain'(.|\n)*no such slide"),
        ("patient\nP1\n", "no column 'slide'"),
        ("slide\n", "no slides"),
        ("", "nothing in the first line"),
        ("\nslide\na.svs\n", "nothing in the first line"),
        ("slide,slide_id\na.svs,pooled\n", "what metrics call all slides together"),
        ("slide,mpp\na.svs,0_1\n", "'0_1'"),
        ("slide,slide_id\na.svs,../b\n", "cannot name a folder"),
        (f"slide,slide_id\na.svs,{'é' * 120}x\n", "more than 240 bytes"),
        ("slide,mpp\na.svs,352\n", "'352'"),
        ("slide\na.svs\nb/a.svs\n", "slide_id 'a' is shared"),
        ("slide,split\na.svs,train\nb/a.svs,\n", "no split given"),
        ('slide\n"a.svs\n' + "b/a.svs\n" * 99, "a quote may lack its other half"),
        ('slide,slide_id,patient\na.svs,a,"P1\nb/a.svs,b,P2\n', "line 3: patient with a line break"),
        ("slide;mpp\na.svs;0,2,5\n", "'0,2,5' is no number"),
        ("slide,patient,\na.svs,P1,P2\n", "line 2: more values than columns"),
        ("slide,slide_id\nloop.svs,a\nno\0file.svs,b\n", "line 2: no such slide(.|\n)*line 3: no such slide"),
        ('slide\n"a.svs\n' + "b/a.svs\n" * 20_000, "line 2: field larger .* a quote may lack its other half"),
        ('"slide,patient\n' + "a.svs,P1\n" * 20_000, "line 1: field larger .* a quote may lack its other half"),
        ('slide,"patient\n' + "a.svs,P1\n" * 99, "line 1: a column with a line break; a quote may lack its other half"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    with pytest.raises(CohortError, match=part):
        read_manifest(manifest(tmp_path, text, "a.svs", "b/a.svs"))


def cohort(patients: int, slides: int = 2) -> list[Case]:
    return [Case(f"{p}-{s}", f"P{p}", Path(f"{p}-{s}.svs"), Path("a")) for p in range(patients) for s in range(slides)]


@pytest.mark.parametrize(
    ("patients", "sizes"), [(20, (14, 3, 3)), (10, (7, 2, 1)), (3, (1, 1, 1)), (2, (1, 1, 0)), (1, (1, 0, 0))]
)
def test_patients_are_dealt_out_by_fractions(patients: int, sizes: tuple[int, ...]) -> None:
    dealt = deal_out(cohort(patients), {"train": 0.7, "val": 0.15, "test": 0.15}, seed=3)
    found = [len({case.patient for case in dealt if case.split == split}) for split in ("train", "val", "test")]
    assert tuple(found) == sizes
    assert all(len({case.split for case in dealt if case.patient == f"P{p}"}) == 1 for p in range(patients))


@pytest.mark.parametrize("shares", [(0.1, 0.1, 0.8), (0.5, 0.1, 0.4), (0.2, 0.4, 0.4), (0.34, 0.33, 0.33)])
def test_too_few_patients_train_then_validate_whatever_the_fractions(shares: tuple[float, ...]) -> None:
    for patients, splits in ((1, {"train"}), (2, {"train", "val"}), (3, {"train", "val", "test"})):
        dealt = deal_out(cohort(patients), dict(zip(("train", "val", "test"), shares, strict=True)), seed=0)
        assert {case.split for case in dealt} == splits


def test_a_seed_decides_the_splits() -> None:
    fractions = {"train": 0.5, "val": 0.5, "test": 0.0}
    first = deal_out(cohort(12), fractions, seed=1)
    assert first == deal_out(cohort(12), fractions, seed=1)
    assert first != deal_out(cohort(12), fractions, seed=2)
    # In every process: sets of names are in another order in each.
    assert {case.patient for case in first if case.split == "train"} == {"P0", "P3", "P4", "P5", "P6", "P9"}
    assert not [case for case in first if case.split == "test"]


def test_given_splits_are_kept() -> None:
    cases = [Case("a", "a", Path("a"), split="test"), Case("b", "b", Path("b"), split="train")]
    assert deal_out(cases, {"train": 1.0, "val": 0.0, "test": 0.0}, seed=0) == tuple(cases)


def test_a_written_manifest_reads_back(tmp_path: Path) -> None:
    manifest(tmp_path, "", "a.svs", "b.svs", "b.xml")
    cases = (
        Case("a", "P1", tmp_path / "a.svs", None, "train", 0.25237),
        Case("b", "P2", tmp_path / "b.svs", tmp_path / "b.xml", "val"),
    )
    write_manifest(tmp_path / "out" / "cohort.csv", cases)
    assert read_manifest(tmp_path / "out" / "cohort.csv") == cases


def test_every_split_has_annotated_patients_where_there_are_enough() -> None:
    """A network that nothing validates, or that is examined on nothing, would be of no use."""
    cases = [case if case.patient in ("P0", "P5", "P7") else replace(case, annotation=None) for case in cohort(12)]
    for seed in range(20):
        dealt = deal_out(cases, {"train": 0.7, "val": 0.15, "test": 0.15}, seed)
        assert {case.split for case in dealt if case.annotation} == {"train", "val", "test"}
        assert {case.split for case in dealt if not case.annotation} == {"test"}


def test_patients_without_annotation_are_segmented_where_nothing_is_tested() -> None:
    cases = [case if case.patient == "P0" else replace(case, annotation=None) for case in cohort(4)]
    dealt = deal_out(cases, {"train": 0.8, "val": 0.2, "test": 0.0}, seed=0)
    assert {case.patient: case.split for case in dealt} == {"P0": "train", "P1": "val", "P2": "val", "P3": "val"}
