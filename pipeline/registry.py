"""Models in MLflow: stored with their run, registered under a name, found again by a reference.

    models:/fullfield@newest --> version 3 of `fullfield` --> the model of run 8f0c...
                                                                |-- MLmodel, served.py, code/pipeline/
                                                                `-- artifacts/checkpoint/   model.yaml, network.json, weights

A stored model holds the code that reads it and no pickle. Only the checkpoint is ever taken out again: what else lies in
a stored model is not executed by Fullfield.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import yaml

from pipeline import checkpoint
from pipeline.errors import TrackingError
from pipeline.files import new_folder
from pipeline.machine import cache_folder
from pipeline.settings import ALIAS, RESERVED_ALIAS
from pipeline.store import Store, store_for, unless_there

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

_PACKAGE = Path(__file__).resolve().parent
_SERVED_WITH = ("google-crc32c", "mlflow", "monai", "numpy", "PyYAML", "safetensors", "torch")
_FOLD = re.compile(r"fold-\d+")
_MODEL, _CHECKPOINT = "model", "checkpoint"

DIGEST = "fullfield.checkpoint"
"""Tag of a version: the digest of its checkpoint."""


def log_model(store: Store, run_id: str, folder: Path, classes: Sequence[str], registered: str, alias: str) -> str:
    """Stores a checkpoint's folder as a run's model, registers it and moves the alias to it.

    The model is a pyfunc from code (served.py), with the signature (N, H, W, 3) uint8 to (N, classes, h, w) float32, and the
    parameter `staining`.
    A checkpoint of this run that is registered already is not stored again, and the alias stays with another run's where
    later versions are there.
    Returns `models:/NAME/VERSION`.
    Raises CheckpointError where the folder holds no checkpoint, TrackingError for an alias that MLflow keeps to itself.
    """
    check_alias(alias)
    client, tags = store.client, {DIGEST: checkpoint.digest(folder)}
    with store.conversation():
        known = client.search_registered_models(f"name = '{registered}'")
        if not known:
            with unless_there():
                client.create_registered_model(registered)
        before = sorted(client.search_model_versions(f"name = '{registered}'"), key=lambda each: int(each.version))
        own = [each for each in before if each.run_id == run_id and tags.items() <= each.tags.items()]
        theirs = [str(each.version) for each in before if each.run_id != run_id]
        if own and own[-1] is not before[-1] and str(known[0].aliases.get(alias)) in theirs:
            return f"models:/{registered}/{own[-1].version}"
        number = own[-1].version if own else _register(store, run_id, folder, classes, registered, tags)
        client.set_registered_model_alias(registered, alias, number)
    return f"models:/{registered}/{number}"


def check_alias(alias: str) -> None:
    """Raises TrackingError for an alias that MLflow does not take, or keeps to itself."""
    if not re.fullmatch(ALIAS, alias):
        expected = "letters, digits, _ and -, and a letter first"
        raise TrackingError(f"alias {alias!r}", "other characters", expected, "Say `champion`, perhaps.")
    if re.fullmatch(RESERVED_ALIAS, alias, re.IGNORECASE):
        raise TrackingError(f"alias {alias!r}", "a word that MLflow keeps to itself", "another", "Say `newest`, perhaps.")


def resolve_model(reference: str, uri: str | None = None) -> Path:
    """The checkpoint's folder that a reference means.

    A folder is taken as it is. `runs:/ID`, `runs:/ID/PATH`, `models:/NAME@ALIAS` and `models:/NAME/VERSION` are looked up
    in the store `uri`, else MLFLOW_TRACKING_URI; what lies on this machine is not copied, the rest is downloaded into this
    user's cache, by its digest, where ensembles and workers find it again.
    Raises TrackingError where there is no such model, and CheckpointError where a file is given in place of its folder.
    """
    if not reference.startswith(("runs:/", "models:/")):
        if reference and Path(reference).is_dir():
            return _checkpoint_in(Path(reference))
        if Path(reference).is_file():
            checkpoint.check_files(Path(reference))  # which says what it is instead
        expected = "a model's folder, runs:/ID, models:/NAME@ALIAS or models:/NAME/VERSION"
        raise TrackingError(reference or "--model", "no such folder", expected, "Train a model, or correct the path.")
    store = store_for(reference, uri)
    with store.conversation(reference):
        from mlflow.artifacts import download_artifacts

        place = _of_run(store, reference) if reference.startswith("runs:/") else _of_registry(store, reference)
        if urlsplit(place).scheme in ("", "file"):
            _require_there(reference, place)
            return _checkpoint_in(Path(download_artifacts(place, tracking_uri=store.address)))
        with TemporaryDirectory() as scratch:
            return _kept(_checkpoint_in(Path(download_artifacts(place, dst_path=scratch, tracking_uri=store.address))))


def _require_there(reference: str, place: str) -> None:
    """Raise TrackingError where the folder of this machine is gone, path or URI, in which MLflow keeps a model."""
    folder = Path(url2pathname(urlsplit(place).path))
    if not folder.exists():
        remedy = "Move its output back, or give another version the alias, on MLflow's page."
        raise TrackingError(reference, f"a model that lay in {folder}, which is gone", "the model in its place", remedy)


def fold_references(reference: str) -> list[str]:
    """Each fold's `runs:/ID`, where a reference is that of a cross-validation; else the reference itself.

    Raises TrackingError where there is no such run, and where some fold of it has not been begun.
    """
    run_id, path = _run_parts(reference)
    if not reference.startswith("runs:/") or path:
        return [reference]
    store = store_for(reference)
    with store.conversation(reference):
        parts = store.parts(store.client.get_run(run_id))
    if not any(map(_FOLD.fullmatch, parts)):
        return [reference]
    with TemporaryDirectory() as scratch:
        dealt = store.fetch(run_id, "folds.csv", Path(scratch), reference).read_text(encoding="utf-8")
    folds = sorted({int(row["fold"]) for row in csv.DictReader(dealt.splitlines())})
    if missing := [f"fold-{number}" for number in folds if f"fold-{number}" not in parts]:
        remedy = "Run the cross-validation to its end, or name the runs of its folds one by one."
        raise TrackingError(reference, f"no {', '.join(missing)}", "a model of every fold", remedy)
    return [f"runs:/{parts[f'fold-{number}']}" for number in folds]


def _run_parts(reference: str) -> tuple[str, str]:
    """ID and PATH of `runs:/ID/PATH`; PATH is empty where there is none."""
    run_id, _, path = reference.removeprefix("runs:/").strip("/").partition("/")
    return run_id, path


def _kept(folder: Path) -> Path:
    """A copy of a checkpoint that stays: ensembles name it by its path."""
    kept = cache_folder() / "models" / checkpoint.digest(folder)
    if kept.exists():
        return kept
    try:
        with new_folder(kept) as partial:
            if not kept.exists():  # whoever was waited for may have made it
                shutil.copytree(folder, partial)
    except OSError:
        if not kept.exists():  # else another process was faster, where file systems know no locks
            raise
    return kept


def _register(store: Store, run_id: str, folder: Path, classes: Sequence[str], registered: str, tags: dict[str, str]) -> str:
    """Store a checkpoint as a run's model and make it a version of a registered one; returns the version's number."""
    model = _store_model(store, run_id, folder, classes)
    made = store.client.create_model_version(registered, model.artifact_location, run_id, tags, model_id=model.model_id)
    return str(made.version)


def _store_model(store: Store, run_id: str, folder: Path, classes: Sequence[str]) -> LoggedModel:
    """Writes the model's folder, and gives it to the store as an output of the run."""
    from mlflow import pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    client = store.client
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    probabilities = Schema([TensorSpec(np.dtype(np.float32), (-1, len(classes), -1, -1))])
    model = client.create_logged_model(client.get_run(run_id).info.experiment_id, _MODEL, run_id)
    with TemporaryDirectory() as scratch:
        pyfunc.save_model(
            f"{scratch}/{_MODEL}",
            mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
            python_model=str(_PACKAGE / "served.py"),
            code_paths=[str(_PACKAGE)],
            artifacts={_CHECKPOINT: str(folder)},
            signature=ModelSignature(images, probabilities, ParamSchema([ParamSpec("staining", "string", "")])),
            input_example=np.full((1, 16, 24, 3), 255, np.uint8),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _SERVED_WITH],
            metadata={"classes": list(classes)},
        )
        client.log_model_artifacts(model.model_id, f"{scratch}/{_MODEL}")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.finalize_logged_model(model.model_id, "READY")


def _of_run(store: Store, reference: str) -> str:
    """Where the files lie of `runs:/ID` (its or its stages' newest model), `runs:/ID/MODEL` or `runs:/ID/PATH`."""
    run_id, path = _run_parts(reference)
    run = store.client.get_run(run_id)
    outputs = [output for each in (run, *store.below(run)) if each.outputs for output in each.outputs.model_outputs]
    models = [store.client.get_logged_model(output.model_id) for output in outputs]
    named = [model for model in models if path in ("", model.name)]
    if named:
        return str(max(named, key=lambda model: model.creation_timestamp).artifact_location)
    if not path:
        found, remedy = f"a run ({run.info.run_name}) without a model", "Finish it, or name another run, or runs:/ID/PATH."
        if parts := sorted(store.parts(run).items()):
            remedy = f"Name one of the runs below it, such as runs:/{parts[0][1]} ({parts[0][0]})."
        raise TrackingError(reference, found, "a run that logged one", remedy)
    return f"{run.info.artifact_uri}/{path}"


def _of_registry(store: Store, reference: str) -> str:
    """Where the files of `models:/NAME@ALIAS` or `models:/NAME/VERSION` lie."""
    name, mark, wanted = reference_parts(reference)
    client = store.client
    known = client.search_registered_models(f"name = '{name}'")
    if not known:
        names = ", ".join(model.name for model in client.search_registered_models()) or "no models"
        raise TrackingError(reference, f"{names} in {store.shown}", f"a model called {name!r}", "Correct the name.")
    if mark == "@" and wanted not in known[0].aliases:
        aliases = ", ".join(known[0].aliases) or "none"
        raise TrackingError(reference, f"the aliases {aliases}", f"the alias {wanted!r}", "Correct the alias.")
    number = str(known[0].aliases[wanted]) if mark == "@" else wanted
    found = client.get_model_version(name, number)
    if found.model_id:
        return str(client.get_logged_model(found.model_id).artifact_location)
    return str(client.get_model_version_download_uri(name, number))


def reference_parts(reference: str) -> tuple[str, str, str]:
    """NAME, @ or /, and ALIAS or VERSION of a `models:/` reference. Raises TrackingError where it is none."""
    for mark in ("@", "/"):
        name, found, wanted = reference.removeprefix("models:/").strip("/").partition(mark)
        if found and name and wanted and (mark == "@" or wanted.isdecimal()):
            return name, mark, wanted
    expected = "models:/NAME@ALIAS or models:/NAME/VERSION"
    raise TrackingError(reference, "neither an alias nor a version", expected, "Correct the reference.")


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint within an MLflow model's folder; any other folder itself."""
    description = folder / "MLmodel"
    if not description.is_file():
        return folder
    try:
        flavors = yaml.safe_load(description.read_text(encoding="utf-8"))["flavors"]
        path: str = flavors["python_function"]["artifacts"][_CHECKPOINT]["path"]
        return folder / path
    except (ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        found = f"an MLflow model of another kind, or a damaged one ({error})"
        raise TrackingError(str(description), found, "one that Fullfield stored", "Name another.") from error
