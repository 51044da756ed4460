"""The one reader of a table of tiles, which has a row for each cell; what is wrong with the file is told by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import ArrowException, parquet

from pipeline.errors import TrainingError
from pipeline.files import name_file


def read_cells(tiles: Path, columns: Sequence[str] | None = None, split: str | None = None) -> pa.Table:
    """The rows of a table of tiles in their order, all or those of a split, with all columns or some.

    Raises TrainingError where it is damaged, and OSError where it is not there or may not be read.
    """
    with _told(tiles):
        filters = None if split is None else [("split", "=", split)]
        table = parquet.read_table(tiles, columns=None if columns is None else list(columns), filters=filters)
        table.validate(full=True)
    return table


def read_columns(tiles: Path) -> pa.Schema:
    """The columns of a table of tiles, with what it tells of itself. Raises what `read_cells` does."""
    with _told(tiles):
        return parquet.read_schema(tiles)


@contextmanager
def _told(tiles: Path) -> Iterator[None]:
    """Errors of pyarrow's, which name no file, as those of Python or as TrainingError."""
    with tiles.open("rb"):  # Python tells what is missing, is a folder, or may not be read
        pass
    try:
        yield
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            name_file(error, tiles)
            raise
        remedy = "Delete it, and run `fullfield tile`."
        raise TrainingError(str(tiles), "a damaged table", "the cells of slides", remedy) from error
