"""Whether the file of a SQLite store can be opened, and what to do where it cannot."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pipeline.errors import NO_ROOM, TrackingError, refused

LOCKED = "database is locked"  # as SQLite says it
IN_USE = ("a database that is locked", "one that can be used", "Another program has it: wait for that, then call again.")
"""What is found, what is expected and what to do where another program keeps a SQLite store to itself."""


def check_sqlite(path: Path, create: bool) -> None:
    """Ask the file itself, because MLflow would ask it again and again for two minutes.

    Raises TrackingError where it cannot be opened; where it is not there, unless `create` allows to make it.
    """
    if not create and not path.is_file():
        remedy = "Give the address of the store that the model was trained in: MLFLOW_TRACKING_URI=sqlite:///DIR/mlflow.db"
        raise TrackingError(str(path), "no such file", "an MLflow store", remedy)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(*_trouble(error, path)) from error


def _trouble(error: Exception, path: Path) -> tuple[str, str, str, str]:
    """The parts of an error: what somebody is writing, or may not be reached, is not to be moved away."""
    if isinstance(error, OSError) and (parts := refused(error, path)):
        return parts
    if LOCKED in str(error):
        return str(path), *IN_USE
    if "unable to open" in str(error) and not path.is_dir():
        return str(path), repr(str(error)), *NO_ROOM
    remedy = "Move it away, or choose another store: `tracking.uri` or MLFLOW_TRACKING_URI names it, else `output`."
    found = "a folder" if path.is_dir() else str(error)
    return str(path), found, "a SQLite database that can be opened", remedy
