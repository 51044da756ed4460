"""Addresses of MLflow stores: the one that was asked for, an output folder's own, and how one is shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import TrackingError

SQLITE = "sqlite:///"
"""Begins the address of a store that is a file."""

_LEFT_OUT = "***@"  # in place of a name and a password


def own_address(output: Path) -> str:
    """The address of an output folder's own store. Raises TrackingError for a path that an address cannot hold."""
    path = _own_database(output)
    if re.search("[%?#]", path):
        raise TrackingError(str(output), "one of %, ? and # in its path", "a path without", "Choose another folder.")
    return SQLITE + path


def is_own(address: str, output: Path) -> bool:
    """Whether an address is that of an output folder's own store."""
    return address == SQLITE + _own_database(output)


def _own_database(output: Path) -> str:
    return (output / "mlflow.db").resolve().as_posix()


def chosen_address(uri: str | None) -> str | None:
    """The store that was asked for: `uri`, else MLFLOW_TRACKING_URI; None where neither is given."""
    address = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        return None
    path = sqlite_path(address)
    return address.rstrip("/") if path is None else SQLITE + path.as_posix()


def without_password(text: str) -> str:
    """The text with `***` for what stands before the @ in an address: a name, and often a password."""
    return re.sub(r"(?<=://)[^/@\s]*@", _LEFT_OUT, text)


def with_password(address: str) -> str:
    """An address of `without_password` as MLFLOW_TRACKING_URI gives it, if that leads to the same store; else as it is."""
    chosen = chosen_address(None) or address
    return chosen if without_password(chosen) == address.rstrip("/") else address


def lacks_password(address: str) -> bool:
    """Whether an address cannot be opened, since `without_password` has been at it."""
    return f"://{_LEFT_OUT}" in address


def sqlite_path(address: str) -> Path | None:
    """The file of a SQLite store; None for other stores."""
    return Path(address.removeprefix(SQLITE)).resolve() if address.startswith(SQLITE) else None
