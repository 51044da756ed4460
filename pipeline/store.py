"""MLflow stores: which one is meant, how it is opened, and how its failures are told.

MLflow itself is imported when the first store is opened, which takes some seconds; never by importing this module.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.addresses import SQLITE, chosen_address, sqlite_path, without_password
from pipeline.database import IN_USE, LOCKED, check_sqlite
from pipeline.errors import NO_ROOM, TrackingError, refused
from pipeline.files import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE = "fullfield.stage"
"""The tag that says which stage a run below another is, or which fold or combination, which is a whole run by itself."""

PARENT = "mlflow.parentRunId"
"""MLflow's own tag of a run below another: the identifier of that one."""

EARLIER = "earlier "
"""Begins the tag of a stage whose figures are those of an attempt before."""

_STAGES = ("tile", "train", "segment", "evaluate")

_SERVERS = ("http://", "https://")

_ECHOES = ("mlflow.store.db.utils", "mlflow.system_metrics")
"""Loggers of MLflow that tell, at length, of failures which our own calls to the store raise as well."""

_FULL = re.compile("disk is full|readonly database|disk I/O error|No space left on device")  # as SQLite and copies say it

_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True)
class Store:
    """An open store: its address, and MLflow's client to it."""

    address: str
    client: MlflowClient

    @property
    def shown(self) -> str:
        """The address without a password, for people and files."""
        return without_password(self.address)

    @property
    def is_server(self) -> bool:
        """Whether the address can be opened in a browser."""
        return self.address.startswith(_SERVERS)

    @contextmanager
    def conversation(self, subject: str = "") -> Iterator[None]:
        """Keeps MLflow's notes off the terminal, and turns its failures into TrackingError (on `subject`, if given)."""
        with _conversation(self.address, subject):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a SQLite store's lock for the block, and wait for whoever has it; a server has none."""
        path = sqlite_path(self.address)
        with ExitStack() as held:
            if path is not None:
                with suppress(PermissionError):  # another user's lock
                    held.enter_context(locked(path))
            yield

    def experiment(self, name: str, files: Path | None) -> str:
        """The identifier of the experiment called `name`, made where there is none.

        `files` is where a local store of our own keeps files; None leaves that to the store. An experiment that keeps
        them elsewhere, because its folder was moved or copied, is set aside under another name: its runs would write
        into the old place.
        """
        place = None if files is None else files.as_uri()
        with self.conversation():
            found = self.client.get_experiment_by_name(name)
            if found is not None and place is not None and found.artifact_location != place:
                self.client.rename_experiment(
                    found.experiment_id, f"{name} until {datetime.now().isoformat(timespec='seconds')}"
                )
                found = None
            if found is None:
                with unless_there():
                    return str(self.client.create_experiment(name, artifact_location=place or self._shared_files()))
                found = self.client.get_experiment_by_name(name)
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

    def fetch(self, run_id: str, name: str, folder: Path, reference: str) -> Path:
        """A copy, in `folder`, of a file of a run or of one of its stages, any of which may be named.

        Raises TrackingError, on the `reference` by which the user named it, where none has the file.
        """
        with self.conversation(reference):
            run = self.client.get_run(run_id)
            if run.data.tags.get(STAGE) in _STAGES:
                run = self.client.get_run(run.data.tags[PARENT])
            own = (stage for stage in self.below(run) if stage.data.tags.get(STAGE) in _STAGES)
            for found in (run, *own):
                if any(file.path == name for file in self.client.list_artifacts(found.info.run_id)):
                    return Path(self.client.download_artifacts(found.info.run_id, name, str(folder)))
        remedy = "Call `fullfield run` with its configuration again; of a cross-validation or sweep, name one run of it."
        raise TrackingError(reference, f"no {name} in MLflow run {run_id}", "the run of a configuration", remedy)

    def below(self, run: Any) -> list[Any]:
        """The runs that are nested in one: its stages, folds or combinations."""
        return list(self.client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run.info.run_id}'"))

    def parts(self, run: Any) -> dict[str, str]:
        """The whole runs that are nested in one, a cross-validation's folds or a sweep's combinations: names and IDs."""
        names = {each.info.run_id: each.data.tags.get(STAGE, "") for each in self.below(run)}
        return {name: str(run_id) for run_id, name in names.items() if name.removeprefix(EARLIER) not in _STAGES}

    def _shared_files(self) -> str | None:
        """Where a SQLite store that is shared by outputs keeps files: beside it. Other stores know it themselves."""
        path = sqlite_path(self.address)
        return None if path is None else (path.parent / "mlartifacts").as_uri()


@contextmanager
def unless_there() -> Iterator[None]:
    """Passes over MLflow's refusal of what another process has just made under the same name."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def run_file(reference: str, name: str) -> Iterator[Path]:
    """A file that a run left, while the block lasts: in its output folder, or in MLflow (`runs:/ID` or its bare ID).

    An MLflow run is looked up in the store that MLFLOW_TRACKING_URI names; its stages are looked through as well. In a
    folder the file need not be there. Raises TrackingError where there is no such run or it has no such file.
    """
    if Path(reference).is_dir():
        yield Path(reference) / name
        return
    run_id = reference.removeprefix("runs:/")
    if not re.fullmatch("[0-9a-f]{32}", run_id):
        expected = "an output folder, runs:/ID or the ID of an MLflow run"
        raise TrackingError(reference, "neither a folder nor a run", expected, "Correct it.")
    with TemporaryDirectory() as scratch:
        yield store_for(reference).fetch(run_id, name, Path(scratch), reference)


def store_for(reference: str, uri: str | None = None) -> Store:
    """The store in which a run or a model of MLflow is looked up: `uri`, else MLFLOW_TRACKING_URI.

    Raises TrackingError where neither is given, or the store cannot be opened.
    """
    address = chosen_address(uri)
    if address is None:
        remedy = "Set MLFLOW_TRACKING_URI to its store, for instance sqlite:////home/me/runs/demo/mlflow.db."
        raise TrackingError(reference, "no store to look it up in", "MLFLOW_TRACKING_URI", remedy)
    return open_store(address, create=False)


def open_store(address: str, create: bool) -> Store:
    """Opens the store at an address; a SQLite store that does not exist is made, if `create` allows it.

    Raises TrackingError where it cannot be opened; for a server that does not answer, within seconds. MLflow's
    telemetry, its progress bars and its links on standard output are switched off, unless the environment says otherwise;
    so are, of a database, its tracebacks of failures that our own calls raise as well.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    path = sqlite_path(address)
    if path is not None:
        check_sqlite(path, create)
    if not address.startswith(_SERVERS):
        for name in _ECHOES:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with _conversation(address), _impatience(), ExitStack() as alone:
        if path is not None and create:  # two that make its tables at once would both fail
            with suppress(PermissionError):  # another user's lock, who has made them
                alone.enter_context(locked(path))
            if not path.stat().st_size:
                _make(path)
        from mlflow import MlflowClient

        client = MlflowClient(address)
        client.search_experiments(max_results=1)
    return Store(address, client)


def _make(path: Path) -> None:
    """Make a SQLite store, whole or not at all: MLflow takes seconds for its tables, and cannot go on if it was killed."""
    from mlflow import MlflowClient

    for left in path.parent.glob(f"{path.name}.*.partial*"):  # of one that was killed, with SQLite's journal
        left.unlink()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # MLflow keeps stores by name while a process lasts
    try:
        with _unsynchronised():
            MlflowClient(SQLITE + partial.as_posix()).search_experiments(max_results=1)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        for left in path.parent.glob(f"{partial.name}*"):
            left.unlink()
        raise


@contextmanager
def _unsynchronised() -> Iterator[None]:
    """Lets SQLite write without waiting for the disk, as it does after each of the many steps that make MLflow's tables."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    try:
        yield
    finally:
        event.remove(Engine, "connect", hurry)


@contextmanager
def _conversation(address: str, subject: str = "") -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise TrackingError(*_trouble(error, address, subject)) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trouble(error: Exception, address: str, subject: str) -> tuple[str, str, str, str]:
    """What a store's failure is, in the parts of an error: a disk that refuses, or a store that may be the wrong one."""
    shown = without_password(address)
    if isinstance(error, OSError) and (parts := refused(error, shown)):
        return parts
    if full := _FULL.search(str(error)):
        return shown, repr(full[0]), *NO_ROOM
    if LOCKED in str(error):
        return shown, *IN_USE
    found = " ".join(str(error).replace(address, shown).split())
    remedy = f"Check that this is the right store ({shown}): MLFLOW_TRACKING_URI or the config's `tracking.uri` names it."
    return subject or shown, found, "an MLflow store that does as asked", remedy


@contextmanager
def _impatience() -> Iterator[None]:
    """Lets a server fail within seconds instead of minutes, unless the environment asks for patience."""
    mine = {key: value for key, value in _IMPATIENCE.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del os.environ[key]
