"""Runs and models in MLflow.

    OUTPUT/run.json         which run of which store this folder belongs to, so that running again continues it
    OUTPUT/mlflow.db        the store (SQLite), where neither the config nor MLFLOW_TRACKING_URI names another
    OUTPUT/mlartifacts/     its files

Importing this module does not import MLflow; starting a run does, and takes some seconds.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.addresses import chosen_address, is_own, own_address, without_password
from pipeline.errors import TrackingError
from pipeline.files import write_json
from pipeline.mlflow_names import LONGEST_TAG, allowed, flat, in_short, origin_tags
from pipeline.progress import console
from pipeline.registry import log_model
from pipeline.store import EARLIER, PARENT, STAGE, Store, open_store

_ERROR = "fullfield.error"
_MOST_PARAMS, _MOST_METRICS = 100, 1000  # in one call to MLflow
_LONGEST_DIGEST = 36  # letters that MLflow takes
_NO_PATH = re.compile(r"[#?%]")  # which MLflow puts into addresses as they are


@dataclass
class Run:
    """A run of an MLflow store. As a context manager it is RUNNING, then FINISHED, FAILED or (by Ctrl-C or SIGTERM) KILLED.

    Several may be open at once: nothing here touches MLflow's current run, nor its current store. Every method
    raises TrackingError where the store does not do as asked. A `monitored` run records the machine's load.
    """

    store: Store
    experiment_id: str
    run_id: str
    monitored: bool
    _monitor: Any = field(default=None, init=False, repr=False)

    @classmethod
    def start(cls, output: Path, experiment: str, name: str, uri: str | None = None) -> Run:
        """The run that belongs to an output folder: continued if there is one, else begun and called `name`.

        It is continued if its store is the same and still has it. `uri` names the store, else MLFLOW_TRACKING_URI does,
        else it is OUTPUT/mlflow.db. A server that does not answer is an error within seconds.
        """
        output.mkdir(parents=True, exist_ok=True)
        address = chosen_address(uri) or own_address(output)
        store = open_store(address, create=True)
        files = (output / "mlartifacts").resolve() if is_own(address, output) else None
        experiment_id = store.experiment(experiment, files)
        with store.conversation():
            run_id = _recorded(output, store, experiment_id)
            if run_id is None:
                run_id = store.client.create_run(experiment_id, run_name=name).info.run_id
        run = cls(store, experiment_id, run_id, monitored=True)
        _record(output, run)
        run.set_tags(origin_tags())
        return run

    def child(self, stage: str, anew: bool = False) -> Run:
        """The run of one stage, nested in this one: continued if there is one of that name, else begun.

        Where the stage begins `anew`, an earlier run that holds figures is set aside, as `earlier STAGE`: MLflow forgets no
        figure, and would mix those of two attempts.
        """
        tags = {PARENT: self.run_id, STAGE: stage}
        asked = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        client = self.store.client
        with self.store.conversation():
            found = client.search_runs([self.experiment_id], asked, order_by=["attributes.start_time ASC"])
            if anew and found and found[0].data.metrics:
                self._set_aside(found.pop(0), stage)
            run = found[0] if found else client.create_run(self.experiment_id, run_name=stage, tags=tags)
        child = Run(self.store, self.experiment_id, run.info.run_id, monitored=False)
        child.set_tags(origin_tags())
        return child

    def nest(self, output: Path) -> None:
        """Give an output folder a run nested in this one: whoever starts the folder's run, now or later, continues it."""
        if _recorded(output, self.store, self.experiment_id) is None:
            _record(output, self.child(output.name))

    def _set_aside(self, run: Any, stage: str) -> None:
        self.store.client.update_run(run.info.run_id, name=f"{EARLIER}{stage}")
        self.store.client.set_tag(run.info.run_id, STAGE, f"{EARLIER}{stage}")
        if run.info.status == "RUNNING":  # its process was killed
            self.store.client.set_terminated(run.info.run_id, "KILLED")

    def __enter__(self) -> Run:
        with self.store.conversation():
            self.store.client.update_run(self.run_id, status="RUNNING")
            if self.monitored:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                address = self.store.address
                self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=address)
                self._monitor.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            with self.store.conversation():
                if self._monitor is not None:
                    self._monitor.finish()
                if error is not None:
                    text = without_password(f"{type(error).__name__}: {error}")
                    self.store.client.set_tag(self.run_id, _ERROR, text)
                else:
                    self.note(_ERROR, "")
                self.store.client.set_terminated(self.run_id, status)
        except TrackingError as trouble:
            if error is None:
                raise
            error.add_note(f"The MLflow run could not be marked as {status}: {trouble}")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; a tag's earlier value is replaced."""
        from mlflow.entities import RunTag

        with self.store.conversation():
            self.store.client.log_batch(self.run_id, tags=[RunTag(allowed(key), value) for key, value in tags.items()])

    def note(self, tag: str, text: str) -> None:
        """Sets a tag, or deletes it where there is nothing to say."""
        if text:
            self.set_tags({tag: text})
            return
        with self.store.conversation():
            if tag in self.store.client.get_run(self.run_id).data.tags:
                self.store.client.delete_tag(self.run_id, tag)

    def note_names(self, tag: str, names: Collection[str]) -> None:
        """Sets a tag that lists names, or deletes it where there are none.

        Where the list is too long for a tag, that has the number of names and the first few, and the file TAG.txt all, a
        line each.
        """
        listed, file = ", ".join(names), f"{tag}.txt"
        long = len(listed) > LONGEST_TAG
        if long or self._has(file):  # one of an earlier call would tell of names that are gone
            self.log_text(file, "".join(f"{name}\n" for name in names))
        self.note(tag, in_short(names, file) if long else listed)

    def _has(self, file: str) -> bool:
        with self.store.conversation():
            return any(found.path == file for found in self.store.client.list_artifacts(self.run_id))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Logs parameters: nested mappings under dotted names, lists as JSON, no more than 6000 letters each.

        MLflow never changes a parameter. Where a continued run has another value now, the parameter keeps the first one
        and the tag `changed.NAME` holds the present one.
        """
        from mlflow.entities import Param

        client, values = self.store.client, dict(flat(params))
        with self.store.conversation():
            data = client.get_run(self.run_id).data
            new = [Param(key, value) for key, value in values.items() if key not in data.params]
            for start in range(0, len(new), _MOST_PARAMS):
                client.log_batch(self.run_id, params=new[start : start + _MOST_PARAMS])
            for key, value in values.items():
                changed = allowed(f"changed.{key}")
                if data.params.get(key, value) != value:
                    client.set_tag(self.run_id, changed, value)
                elif changed in data.tags:
                    client.delete_tag(self.run_id, changed)

    def log_config(self, text: str, digest: str) -> None:
        """Keeps the configuration, less passwords in addresses, as `config.yaml`; its digest is the tag `config.digest`."""
        self.set_tags({"config.digest": digest})
        self.log_text("config.yaml", without_password(text))

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Logs numbers at a step. Letters that MLflow forbids in names become `_`, and a digest tells such names apart.

        None is passed over, and NaN where the run has a number of that name, since MLflow forgets none.
        """
        from mlflow.entities import Metric

        now, values = time.time_ns() // 1_000_000, {allowed(key): value for key, value in metrics.items()}
        with self.store.conversation():
            known = self.store.client.get_run(self.run_id).data.metrics if None in values.values() else {}
            found = [
                Metric(key, math.nan if value is None else float(value), now, step)
                for key, value in values.items()
                if value is not None or key in known
            ]
            for start in range(0, len(found), _MOST_METRICS):
                self.store.client.log_batch(self.run_id, metrics=found[start : start + _MOST_METRICS])

    def renew_metrics(self, metrics: Mapping[str, float | None], beginnings: Collection[str]) -> None:
        """Logs numbers in the place of all earlier ones whose names begin with one of these words.

        Those that are not given any more become NaN: they are of what is gone, and MLflow forgets none.
        """
        with self.store.conversation():
            known = self.store.client.get_run(self.run_id).data.metrics
        gone = [name for name in known if name.partition(" ")[0] in beginnings]
        self.log_metrics({**dict.fromkeys(gone), **metrics})

    def steps(self, metric: str) -> set[int]:
        """The steps at which a metric has been logged."""
        with self.store.conversation():
            return {entry.step for entry in self.store.client.get_metric_history(self.run_id, allowed(metric))}

    def log_text(self, name: str, text: str) -> None:
        """Keeps text as the file `name`, which may lie in a folder; one of the same name is replaced."""
        with self.store.conversation():
            self.store.client.log_text(self.run_id, text, name)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Copies a file (a picture, say) into `folder` of the run's files; one of the same name is replaced.

        In the folder's name, letters that a server would take for the end of an address become `_`.
        """
        with self.store.conversation():
            self.store.client.log_artifact(self.run_id, str(path), _NO_PATH.sub("_", folder) or None)

    def log_dataset(self, name: str, digest: str, source: str | Path, context: str) -> None:
        """Notes data that the run used: what (`digest`: MLflow keeps 36 letters), from where, and its use ("training")."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = source.resolve().as_uri() if isinstance(source, Path) else source
        data = Dataset(name, digest[:_LONGEST_DIGEST], "local", json.dumps({"uri": place}))
        with self.store.conversation():
            used = DatasetInput(data, [InputTag("mlflow.data.context", context)])
            self.store.client.log_inputs(self.run_id, [used])

    def log_reference(self, name: str, path: Path) -> None:
        """Notes where something large lies, without copying it: `references/NAME.json` has its URI, bytes and files."""
        files = [item for item in path.rglob("*") if item.is_file()] if path.is_dir() else [path]
        size = sum(item.stat().st_size for item in files)
        content = {"uri": path.resolve().as_uri(), "bytes": size, "files": len(files)}
        self.log_text(f"references/{allowed(name)}.json", json.dumps(content, indent=2))

    def log_model(self, checkpoint: Path, classes: Sequence[str], registered: str, alias: str) -> str:
        """Stores a checkpoint's folder as this run's model and registers it: see registry.log_model."""
        return log_model(self.store, self.run_id, checkpoint, classes, registered, alias)

    def open_command(self) -> str:
        """The shell command that shows this run's store in a browser."""
        if self.store.is_server:
            page = f"{self.store.shown.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
            return shlex.join([sys.executable, "-m", "webbrowser", page])
        on_path = shutil.which("mlflow") == str(Path(sys.executable).with_name("mlflow"))
        program = ["mlflow"] if on_path else [sys.executable, "-m", "mlflow"]
        return shlex.join([*program, "ui", "--workers", "1", "--backend-store-uri", self.store.shown])


def _recorded(output: Path, store: Store, experiment_id: str) -> str | None:
    """The run that `run.json` names, if it is in this store and experiment; None where another must be begun."""
    from mlflow.exceptions import MlflowException

    try:
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        run = store.client.get_run(record["run_id"]) if record["store"] == store.shown else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        console.print(f"{output / 'run.json'} is damaged, so that another MLflow run is begun for this folder")
        return None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    alive = run is not None and run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment_id
    return str(run.info.run_id) if run is not None and alive else None


def _record(output: Path, run: Run) -> None:
    write_json(output / "run.json", {"store": run.store.shown, "experiment_id": run.experiment_id, "run_id": run.run_id})
