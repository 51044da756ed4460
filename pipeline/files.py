"""Files and folders that are written whole or not at all, where one process works at a time, and what a cache forgets."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

_KEPT, _KEPT_SECONDS = 16, 86400.0  # folders of one kind in a cache, and for how long after its last use any one stays

Stamp = tuple[int, int, int]
"""What `file_stamp` tells of a file."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, so that no reader ever sees a part of it.

    The file takes its own name as the block ends; where that ends in an error, it is dropped, and an older one stays.
    Several writers of one file write one after the other, and what a killed one left is written over. Where the file system
    knows no locks, each has a name of its own instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as partial:
        try:
            yield partial
            partial.replace(path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                name_file(error, path)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A name beside `path` to make a folder under, so that no reader ever sees a part of it.

    The folder, if the block makes it, takes its own name as that ends; raises OSError if one that holds anything has it by
    then. Where the block ends in an error, the folder is dropped. Of several writers, and of what a killed one left, see
    `replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as partial:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            yield partial
            if partial.exists():
                partial.rename(path)
        except OSError as error:
            name_file(error, path)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The name under which one writer at a time makes what is to be at `path`."""
    with _alone(path.with_name(f".{path.name}.partial.lock")) as alone:
        own = "" if alone else f".{uuid.uuid4().hex}"
        yield path.with_name(f"{path.name}{own}.partial")


def name_file(error: OSError, path: Path) -> None:
    """Let an error say which file it is about, as one of a full disk does not."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def is_file(path: Path) -> bool:
    """Whether a path leads to an ordinary file, as far as one is let to look."""
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long, or a folder that may not be read
        return False


def in_its_place(path: Path) -> str:
    """What there is where a path leads to no file, in words."""
    if path.is_dir():
        return "a folder"
    return "no ordinary file, but a pipe or a device" if path.exists() else "no such file"


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Wait until no other process or thread is here; the file that tells them of each other is gone afterwards.

    Yields whether the file system can tell.
    """
    file, alone = _held(lock)
    with file:
        try:
            yield alone
        finally:
            lock.unlink(missing_ok=True)


def _held(lock: Path) -> tuple[BinaryIO, bool]:
    """The lock's file, open and locked, as soon as nobody else has it; False where the file system knows no locks."""
    while True:
        file = lock.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file, False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):  # else who had it has unlinked it meanwhile
                return file, True
        file.close()


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all, `as_unicode`."""
    with replacing(path) as partial:
        partial.write_text(as_unicode(text), encoding="utf-8")


def as_unicode(text: str) -> str:
    """The text with `\\udcff` and the like for what is not Unicode in it, as in some file names."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, content: object) -> None:
    """Write what JSON can hold, indented, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def put_aside(path: Path) -> Path:
    """Rename a file, if it is there, to NAME.old, and return that: nobody takes it for what it no longer is."""
    aside = path.with_name(f"{path.name}.old")
    with suppress(FileNotFoundError):
        path.replace(aside)
    return aside


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits, for which a process reads an unchanged file but once.

    Raises OSError where it cannot be read.
    """
    return _stamped_digest(path, *file_stamp(path))


def file_stamp(path: Path) -> Stamp:
    """What tells a file from an earlier one in its place without reading it: size, time of the last change in ns, inode."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@cache  # some 200 bytes a file: of fewer than a cohort has, none would be there when its turn comes again
def _stamped_digest(path: Path, *stamp: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as CSV, as `csv_text` has them, whole or not at all."""
    write_text(path, csv_text(columns, rows))


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV with a header; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on `path` for the block, and wait for whoever has it; several may hold a `shared` one at once.

    Yields True; with `wait` False, yields False at once where another process has it.

    The lock is on an empty file beside it, `.NAME.lock`, which stays. A process that ends, in whatever way, lets go of it.
    Where the file system knows no locks, nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a+") as file:  # network file systems lock by what may be read
        free = True
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free


def keep_in_cache(folder: Path) -> Path:
    """Mark a folder of a cache, which need not be there yet, as used now, and return it.

    If it is new, neighbours unused for a day are deleted, except the sixteen used last. So whoever reads it within a day
    loses nothing. Where the cache may not be written, nothing is done.
    """
    with suppress(OSError), locked(folder.parent):
        if folder.exists():
            os.utime(folder)
        else:
            _forget_oldest(folder.parent)
    return folder


def _forget_oldest(cache: Path) -> None:
    """Remove what has gone unused for the longest; whole, since half of a folder would be taken for a damaged one."""
    last_used = {folder: folder.stat().st_mtime for folder in cache.iterdir() if folder.is_dir()}
    for folder in sorted(last_used, key=last_used.__getitem__)[:-_KEPT]:
        if time.time() - last_used[folder] > _KEPT_SECONDS:
            going = folder.with_name(f"{folder.name}.going")
            shutil.rmtree(going, ignore_errors=True)  # of one that was killed meanwhile
            folder.rename(going)
            shutil.rmtree(going, ignore_errors=True)
