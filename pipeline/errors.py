"""The exceptions that Fullfield raises on purpose.

FullfieldError
|-- ConfigError          a configuration file or an override
|-- CohortError          a manifest, its rows, its splits, runs and slides that do not go together, or an output that is none
|-- SlideError           a slide that cannot be opened or read
|   `-- ScaleError       a slide whose micrometres per pixel are missing or absurd
|-- AnnotationError      an outline file or a label image
|-- NetworkError         a network that cannot be built, or is not local
|-- CheckpointError      a trained model that cannot be loaded, or whose folder another one has
|-- EngineError          a forward pass that cannot be run here, or that strays too far from the exact one
|-- CanvasError          an output that does not belong to this run
|-- TrainingError        nothing to learn from, or a loss that is not finite
|-- ClusterError         a Dask scheduler that does not answer, or workers too few or too small
|   |-- WorkerError      a task that its worker does not survive
|   `-- CodeError        a worker that has other code than the command
`-- TrackingError        MLflow does not answer as expected, or what should name a run or a model names none
"""

import errno
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

NO_ROOM = ("a place to read and write", "Make room or give access.")
"""What is expected of a disk or a folder, and what to do where it refuses."""


def refusal(error: OSError, place: object) -> str | None:
    """What a disk or a folder refused, in words; None where neither is to blame, as where a connection is lost.

    `place` is named where the error itself names no file.
    """
    parts = refused(error, place)
    return None if parts is None else str(FullfieldError(*parts))


def refused(error: OSError, place: object) -> tuple[str, str, str, str] | None:
    """The same in the four parts of a FullfieldError."""
    if error.filename is None and error.errno not in _FULL:
        return None
    subject = str(error.filename2 or error.filename or place)  # a copy tells first what it copies
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return _in_the_way(subject), "a file", "a folder", "Choose another name."
    if error.errno == errno.EISDIR:
        return subject, "a folder", "a file", "Choose another name, or move the folder away."
    return subject, repr(error.strerror or str(error)), *NO_ROOM


def _in_the_way(subject: str) -> str:
    """Of a path that leads through a file: that file."""
    path = Path(subject)
    return str(next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path))


def why(error: BaseException, place: object) -> str:
    """Why a task came to nothing, in words; `place` is named where a disk refused something and names no file."""
    if isinstance(error, OSError) and (told := refusal(error, place)):
        return told
    return str(error) if isinstance(error, FullfieldError) else f"{type(error).__name__}: {error}"


def unread(error: Exception) -> str:
    """What is wrong with a file of JSON that cannot be read, in words."""
    if isinstance(error, OSError):
        told = {errno.ENOENT: "no such file", errno.EISDIR: "a folder"}
        return told.get(error.errno or 0, str(error.strerror))
    return f"{'broken JSON' if isinstance(error, ValueError) else 'other values'} ({error})"


class FullfieldError(Exception):
    """Says which thing is wrong, what was found, what was expected and what to do.

    The four parts are plain strings, so that the error survives the trip from a worker process.
    """

    def __init__(self, subject: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(subject, found, expected, remedy)
        self.subject, self.found, self.expected, self.remedy = subject, found, expected, remedy

    def __str__(self) -> str:
        gap = "\n" if "\n" in self.found else " "  # a list ends on a line of its own
        return f"{self.subject}: found {self.found};{gap}expected {self.expected}. {self.remedy}"


class ConfigError(FullfieldError):
    """A configuration file or an override is wrong."""


class CohortError(FullfieldError):
    """A manifest, one of its rows or its splits is wrong, runs and slides do not go together, or an output is none."""


class SlideError(FullfieldError):
    """A slide cannot be opened or read."""


class ScaleError(SlideError):
    """A slide's micrometres per pixel are missing or absurd."""


class AnnotationError(FullfieldError):
    """An outline file or a label image cannot be used."""


class NetworkError(FullfieldError):
    """A network cannot be built, or is not local."""


class CheckpointError(FullfieldError):
    """A trained model cannot be loaded, or another one has its folder."""


class EngineError(FullfieldError):
    """A forward pass cannot be run here in that way, or strays too far from the exact one."""


class CanvasError(FullfieldError):
    """An output on disk does not belong to this run."""


class OtherWayError(CanvasError):
    """An output on disk is of the same slide by the same model, but computed with other settings."""


class TrainingError(FullfieldError):
    """There is nothing to learn from, or the loss is not finite."""


class ClusterError(FullfieldError):
    """A Dask scheduler does not answer, or its workers are too few or too small."""


class WorkerError(ClusterError):
    """Each worker that was given a task died of it."""


class CodeError(ClusterError):
    """A worker has other code of Fullfield than the command."""


class TrackingError(FullfieldError):
    """MLflow does not answer as expected, or what should name a run or a model names none."""
