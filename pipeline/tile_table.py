"""The table of tiles: a row for each cell of every slide, and what it tells of itself, so that nothing is counted twice.

It tells by digests how its rows were counted and of what, and which slides it leaves out. Rows of slides that are still the
same serve again, in whatever splits these are now; a table that was cut short is completed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import compute, parquet

from pipeline import __version__
from pipeline.cells import read_cells, read_columns
from pipeline.cohort import Case
from pipeline.config import Config
from pipeline.errors import SlideError, TrainingError, WorkerError
from pipeline.files import Stamp, file_stamp, replacing
from pipeline.inputs import TILED, content_stamp, digest_of
from pipeline.settings import TILE_COLUMNS

_FACTS = b"fullfield.facts"  # key of the metadata


@dataclass(frozen=True)
class LeftOut:
    """Why a slide has no rows, and what told it from others by then; nothing where it is to be tried again in any case."""

    why: str
    stamp: str


@dataclass(frozen=True)
class TileFacts:
    """What a table tells of itself: how its rows were counted, how patients were dealt out, and, by slide_id, what the rows
    of a slide were counted from and which slides have none. `way`, `dealt` and the values of `counted` are digests.
    """

    way: str
    dealt: str
    counted: Mapping[str, str]
    left_out: Mapping[str, LeftOut]

    def is_of(self, config: Config, cases: Sequence[Case]) -> bool:
        """Whether it was counted so, of these cases as they are dealt out and of no others, but for those left out."""
        alike = (self.way, self.dealt) == (_way(config), _dealt(cases))
        return alike and all(case.slide_id in self.left_out or self._has(case) for case in cases)

    def to_count(self, cases: Sequence[Case]) -> list[Case]:
        """Those that have neither rows nor a reason to have none, or have changed since."""
        return [case for case in cases if not (self._has(case) or self._leaves_out(case))]

    def _has(self, case: Case) -> bool:
        return case.slide_id in self.counted and self.counted[case.slide_id] == content_stamp(case)

    def _leaves_out(self, case: Case) -> bool:
        return case.slide_id in self.left_out and self.left_out[case.slide_id].stamp == _standing(case)


def read_facts(tiles: Path) -> TileFacts | None:
    """What a table of tiles tells of itself; None where there is no table, or a damaged one."""
    try:
        metadata = read_columns(tiles).metadata or {}
    except (FileNotFoundError, TrainingError):
        return None
    try:
        told = json.loads(metadata[_FACTS])
        left_out = {name: LeftOut(**slide) for name, slide in told["left_out"].items()}
        return TileFacts(str(told["way"]), str(told["dealt"]), dict(told["counted"]), left_out)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


class TileTable:
    """The rows of a cohort's slides as they come together, beginning with those that the table in `tiles` has already."""

    def __init__(self, tiles: Path, config: Config, cases: Sequence[Case]) -> None:
        self._schema, self._way, self._dealt = columns(config), _way(config), _dealt(cases)
        self._stamps = {case.slide_id: content_stamp(case) for case in cases}  # before they are read
        self._rows, self._counted, self._left_out = list[pa.Table](), dict[str, str](), dict[str, LeftOut]()
        found = read_facts(tiles)
        if found is not None and found.way == self._way:
            with suppress(TrainingError):  # of a damaged table nothing serves
                self._take(read_cells(tiles), found, cases)

    def _take(self, rows: pa.Table, found: TileFacts, cases: Sequence[Case]) -> None:
        """Begin with the rows of those cases that have not changed since another table counted them."""
        changed = {case.slide_id for case in found.to_count(cases)}
        same = [case for case in cases if case.slide_id not in changed]
        self._counted = {case.slide_id: found.counted[case.slide_id] for case in same if case.slide_id in found.counted}
        self._left_out = {case.slide_id: found.left_out[case.slide_id] for case in same if case.slide_id in found.left_out}
        kept = [case for case in same if case.slide_id in self._counted]
        self._rows = [_of_cases(rows, kept, self._schema)]

    @property
    def facts(self) -> TileFacts:
        """What the table tells of itself."""
        return TileFacts(self._way, self._dealt, self._counted, self._left_out)

    def add(self, case: Case, rows: pa.Table) -> None:
        """Take the rows of a slide, in `columns`."""
        self._rows.append(rows)
        self._counted[case.slide_id] = self._stamps[case.slide_id]

    def leave_out(self, case: Case, error: SlideError | WorkerError) -> None:
        """Note why a slide has no rows. One whose worker died is to be tried again: memory may suffice another time."""
        self._left_out[case.slide_id] = LeftOut(str(error), _standing(case) if isinstance(error, SlideError) else "")

    def write(self, tiles: Path) -> None:
        """Write what has come together, sorted by slide_id, y and x."""
        table = pa.concat_tables([self._schema.empty_table(), *self._rows])
        table = table.sort_by([(name, "ascending") for name in ("slide_id", "y", "x")])
        with replacing(tiles) as partial:
            parquet.write_table(table.replace_schema_metadata({_FACTS: json.dumps(asdict(self.facts))}), partial)


def _of_cases(table: pa.Table, cases: Sequence[Case], schema: pa.Schema) -> pa.Table:
    """The rows of these cases, with their patients and splits as they are now."""
    ids = pa.array([case.slide_id for case in cases], pa.string())
    table = table.filter(compute.is_in(table["slide_id"], ids))
    place = compute.index_in(table["slide_id"], ids)
    for name in ("patient", "split"):
        values = pa.array([getattr(case, name) for case in cases], pa.string()).take(place)
        table = table.set_column(schema.get_field_index(name), schema.field(name), values)
    return table.replace_schema_metadata(None)


def columns(config: Config) -> pa.Schema:
    """The columns of a table of tiles."""
    kinds = {"slide_id": pa.string(), "patient": pa.string(), "split": pa.string(), "x": pa.int64(), "y": pa.int64()}
    names = (*TILE_COLUMNS, *config.class_list.names)
    return pa.schema([pa.field(name, kinds.get(name, pa.float64())) for name in names])


def _way(config: Config) -> str:
    """A digest of how cells are counted, and by which Fullfield."""
    return digest_of([__version__, config.model_dump(mode="json", include=set(TILED)), config.network.mpp])


def _dealt(cases: Sequence[Case]) -> str:
    """A digest of who is in which split, in whatever order."""
    return digest_of(sorted([case.slide_id, case.patient, case.split] for case in cases))


def _standing(case: Case) -> str:
    """What tells a slide that cannot be read from another that takes its place, without reading it."""
    file: Stamp | None = None
    with suppress(OSError):
        file = file_stamp(case.slide)
    return digest_of([file, case.mpp])
