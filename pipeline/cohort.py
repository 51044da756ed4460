"""Which slides there are, whose they are, and which of them the network may learn from."""

from __future__ import annotations

import csv
import io
import os
import random
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import CohortError
from pipeline.files import csv_text, in_its_place, is_file, write_text
from pipeline.geometry import MPP_RANGE
from pipeline.settings import SPLITS

COLUMNS = ("slide", "slide_id", "annotation", "patient", "split", "mpp")
LONGEST_ID = 240
"""Bytes of a slide_id: files beside the slide's folder are named after it, and file systems allow 255."""


@dataclass(frozen=True)
class Case:
    """One row of a manifest. `split` is empty until patients are dealt out; `mpp` counts before what the scan states."""

    slide_id: str
    patient: str
    slide: Path
    annotation: Path | None = None
    split: str = ""
    mpp: float | None = None


def read_manifest(path: Path) -> tuple[Case, ...]:
    """Read a CSV file with the column `slide` and any of `slide_id, annotation, patient, split, mpp`.

    Values lie between commas, or between semicolons or tabs, as spreadsheets have it in countries of a decimal comma, which
    a scale may have too. Paths are relative to the file. A missing `slide_id` is the slide's stem, a missing `patient` the
    slide_id. Raises CohortError that lists every problem of the file at once.
    """
    if not path.is_file():
        raise CohortError(str(path), in_its_place(path), "a CSV manifest", "Correct the path in `cohort.manifest`.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CohortError(str(path), f"other letters ({error})", "UTF-8", "Save it as CSV UTF-8.") from error
    reader = csv.DictReader(io.StringIO(text), delimiter=separator(text.partition("\n")[0]), skipinitialspace=True)
    columns, cases, problems = list[str](), list[Case](), list[str]()
    try:
        columns += [name.strip() for name in reader.fieldnames or []]
        problems += _column_problems(columns) if columns else ["nothing in the first line, which is to name the columns"]
        if "slide" in columns:
            reader.fieldnames = columns
            for row in reader:
                _add_case(row, path.parent.absolute(), reader.line_num, cases, problems)
    except (csv.Error, ValueError) as error:
        problems.append(f"line {reader.line_num + 1}: {error}; a quote may lack its other half")
    if "slide" in columns:
        problems += _cohort_problems(cases)
    if problems:
        found = "\n  - ".join(["these problems:", *problems])
        raise CohortError(str(path), found, f"rows of {', '.join(COLUMNS)}", "Correct them all, then run again.")
    return tuple(cases)


def deal_out(cases: Sequence[Case], fractions: Mapping[str, float], seed: int) -> tuple[Case, ...]:
    """Give every patient a split, by seed, where the manifest gives none; a manifest that has splits is kept.

    The numbers of annotated patients follow `fractions` (largest remainder), with at least one for each split whose fraction
    is not 0, as far as there are patients: first train, then val, then test. The others, of whom there is nothing to learn,
    all come into the last of these splits, to be segmented.
    """
    if all(case.split for case in cases):
        return tuple(cases)
    annotated = {case.patient for case in cases if case.annotation is not None}
    others = {case.patient for case in cases} - annotated
    last = [split for split in SPLITS if fractions[split] > 0][-1]
    split_of = _dealt(annotated, fractions, seed) | dict.fromkeys(others, last)
    return tuple(replace(case, split=split_of[case.patient]) for case in cases)


def _dealt(patients: Collection[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """The split of each patient."""
    shuffled = sorted(patients)
    random.Random(seed).shuffle(shuffled)
    wanted = [split for split in SPLITS if fractions[split] > 0]
    counts = _apportion(len(shuffled), {split: fractions[split] for split in wanted})
    return dict(zip(shuffled, [split for split in wanted for _ in range(counts[split])], strict=True))


def write_manifest(path: Path, cases: Sequence[Case]) -> None:
    """Write cases as a manifest, as `manifest_text` has them, whole or not at all."""
    write_text(path, manifest_text(cases))


def manifest_text(cases: Sequence[Case]) -> str:
    """Cases as a manifest with every column and absolute paths."""
    rows = [
        {
            "slide": case.slide.absolute(),  # a link's name may matter: parts of MIRAX or DICOM lie beside it
            "slide_id": case.slide_id,
            "annotation": case.annotation.absolute() if case.annotation else None,
            "patient": case.patient,
            "split": case.split,
            "mpp": case.mpp,
        }
        for case in cases
    ]
    return csv_text(COLUMNS, rows)


def separator(columns: str) -> str:
    """What stands between the values of a table, by the line that names its columns."""
    return next((mark for mark in ",;\t" if mark in columns), ",")


def _column_problems(columns: Sequence[str]) -> list[str]:
    named = [name for name in columns if name]  # Excel may write columns that are empty throughout
    if any("\n" in name for name in named):
        return ["line 1: a column with a line break; a quote may lack its other half"]
    problems = [f"unknown column {name!r}" for name in named if name not in COLUMNS]
    problems += [f"column {name!r} stands twice" for name in sorted(set(named)) if named.count(name) > 1]
    return problems if "slide" in columns else [*problems, "no column 'slide'"]


def _add_case(row: Mapping[str, str | None], folder: Path, line: int, cases: list[Case], problems: list[str]) -> None:
    """Add the case of a row, unless the row is empty, and what is wrong with it."""
    if None in row or row.get(""):
        problems.append(f"line {line}: more values than columns")
        return
    values = {name: (value or "").strip() for name, value in row.items()}
    if not any(values.values()):
        return
    if broken := [name for name, value in values.items() if "\n" in value]:
        problems.append(f"line {line}: {', '.join(broken)} with a line break; a quote may lack its other half")
        return
    if not values["slide"]:
        problems.append(f"line {line}: no slide")
        return
    case = _case(values, folder)
    problems += [f"line {line}: {problem}" for problem in _case_problems(case, values.get("mpp", ""))]
    cases.append(case)


def _case(values: Mapping[str, str], folder: Path) -> Case:
    """The case of a row of a manifest that lies in `folder`; without its scale, where that is none."""
    slide, annotation = folder / values["slide"], values.get("annotation", "")
    mpp = values.get("mpp", "").replace(",", ".")
    slide_id = values.get("slide_id") or slide.stem
    return Case(
        slide_id=slide_id,
        patient=values.get("patient") or slide_id,
        slide=slide,
        annotation=folder / annotation if annotation else None,
        split=values.get("split", ""),
        mpp=float(mpp) if _is_scale(mpp) else None,
    )


def _case_problems(case: Case, mpp: str) -> list[str]:
    """What is wrong with a case by itself, whose scale was given as `mpp`."""
    problems = []
    if not is_file(case.slide):
        problems.append(f"no such slide: {case.slide}{_turned(case.slide)}")
    if case.annotation is not None and not is_file(case.annotation):
        problems.append(f"no such annotation: {case.annotation}{_turned(case.annotation)}")
    if case.slide_id in (".", "..") or "/" in case.slide_id or "\\" in case.slide_id:
        problems.append(f"slide_id {case.slide_id!r} cannot name a folder")
    if case.slide_id == "pooled":
        problems.append(f"slide_id {case.slide_id!r} is what metrics call all slides together")
    if len(os.fsencode(case.slide_id)) > LONGEST_ID:
        problems.append(f"slide_id of more than {LONGEST_ID} bytes: {case.slide_id}")
    if case.split not in ("", *SPLITS):
        problems.append(f"split {case.split!r} is none of {', '.join(SPLITS)}")
    if mpp and case.mpp is None:
        problems.append(f"mpp {mpp!r} is no number from {MPP_RANGE[0]} to {MPP_RANGE[1]}")
    return problems


def _turned(path: Path) -> str:
    """Advice where a path is as Windows writes it, and leads to a file once it is not."""
    turned = Path(str(path).replace("\\", "/"))
    return ": write / in place of \\" if turned != path and is_file(turned) else ""


def _file(path: Path) -> Path:
    """The file that a path leads to; the path itself where it leads nowhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # links that lead in a circle, or a name that no file can have
        return path


def _alike(name: str) -> str:
    """What names have in common that people, or some file systems, take for one."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _number(name: str) -> str:
    """A name that is a number as spreadsheets leave it, who write 007 as 7 or as 7.0; any other as it is."""
    plain = name.removesuffix(".0")
    return plain.lstrip("0") or "0" if plain.isdecimal() else name


def _cohort_problems(cases: Sequence[Case]) -> list[str]:
    if not cases:
        return ["no slides"]
    problems = []
    by_id, by_file, by_patient = defaultdict(list), defaultdict(list), defaultdict(list)
    for case in cases:
        by_id[_alike(case.slide_id)].append(case)
        by_file[_file(case.slide)].append(case)
        by_patient[_number(_alike(case.patient))].append(case)
    for file, same in by_file.items():
        if len(same) > 1:
            problems.append(f"slide stands {len(same)} times: {file}")
    for same in by_id.values():
        if len(same) > 1 and len({_file(case.slide) for case in same}) > 1:
            slides = ", ".join(str(case.slide) for case in same)
            problems.append(f"slide_id {same[0].slide_id!r} is shared by {slides}: add a slide_id column")
    for same in by_patient.values():
        patient, names = same[0].patient, sorted({case.patient for case in same})
        if len(names) > 1:
            trifles = "capital letters, spaces, the encoding of accents or zeros alone"
            problems.append(f"patients {', '.join(map(repr, names))} differ in {trifles}: write one patient alike")
        elif len({case.split for case in same}) > 1:
            places = ", ".join(f"{case.slide_id} in {case.split or 'no split'}" for case in same)
            problems.append(f"patient {patient!r} is in two splits: {places}")
    without = [case.slide_id for case in cases if not case.split]
    if without and len(without) < len(cases):
        problems.append(f"no split given for {', '.join(without)}, though others have one")
    return problems


def _apportion(total: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to `total`, in proportion to `fractions`; none is 0, but the last where there are too few."""
    if total < len(fractions):
        return {name: int(number < total) for number, name in enumerate(fractions)}
    exact = {name: total * fraction for name, fraction in fractions.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name in counts:
        largest = max(counts, key=lambda other: counts[other])
        if counts[name] == 0 and counts[largest] > 1:
            counts[name], counts[largest] = 1, counts[largest] - 1
    return counts


def _is_scale(text: str) -> bool:
    try:
        return "_" not in text and MPP_RANGE[0] <= float(text) <= MPP_RANGE[1]  # Python reads 0_1 as 1
    except ValueError:
        return False
