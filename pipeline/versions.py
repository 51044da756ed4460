"""Versions of registered models: found by reference or by output folder, and the alias that says which is in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import checkpoint
from pipeline.addresses import with_password
from pipeline.errors import TrackingError, unread
from pipeline.registry import DIGEST, reference_parts, resolve_model
from pipeline.store import PARENT, Store, open_store, store_for


@dataclass(frozen=True)
class Version:
    """A registered model's version: its name and number, the run that it belongs to, its checkpoint's folder."""

    name: str
    number: str
    run_id: str
    checkpoint: Path

    @property
    def reference(self) -> str:
        """How MLflow calls it."""
        return f"models:/{self.name}/{self.number}"


def find_version(reference: str) -> tuple[Store, Version]:
    """The version that `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `runs:/ID` or a folder means, and the store it is in.

    A folder is a run's output, or the model in it; it stands for the newest version of that model in the store of its run.
    All else is looked up in the store that MLFLOW_TRACKING_URI names. Raises TrackingError where there is none,
    CheckpointError for a folder without a model.
    """
    if reference.startswith("models:/"):
        store = store_for(reference)
        folder = resolve_model(reference)  # tells what is wrong with the reference
        name, number = _named(store, reference)
        return store, _version(store, name, number, folder)
    if reference.startswith("runs:/"):
        store, folder = store_for(reference), resolve_model(reference)
    else:
        given = Path(reference).absolute()
        output = given.parent if (given / "model.yaml").is_file() else given
        store, folder = _store_of(output), output / "model"
    digest = checkpoint.digest(folder)
    with store.conversation(reference):
        found = store.client.search_model_versions(f"tags.`{DIGEST}` = '{digest}'")
    if not found:
        remedy = "Finish it: call `fullfield run` with its configuration again."
        raise TrackingError(reference, f"no version of it in {store.shown}", "a registered model", remedy)
    newest = max(found, key=lambda version: int(version.creation_timestamp))
    return store, _version(store, newest.name, str(newest.version), folder)


def version_with(store: Store, name: str, alias: str) -> Version | None:
    """The version of a registered model that an alias points to; None where it points to none."""
    with store.conversation(name):
        number = store.client.get_registered_model(name).aliases.get(alias)
    if number is None:
        return None
    return _version(store, name, str(number), resolve_model(f"models:/{name}/{number}", store.address))


def decide(
    store: Store, version: Version, alias: str, holder: Version | None, takes: bool, evidence: Mapping[str, object]
) -> None:
    """Keep the evidence as tags of a version, in place of any before, and then, if it `takes` the alias, point it there.

    The evidence is against the `holder` of the alias: where that has it no more, raises TrackingError and changes nothing.
    """
    mark, client = f"fullfield.{alias}.", store.client
    tags = {f"{mark}{key}": value if isinstance(value, str) else json.dumps(value) for key, value in evidence.items()}
    with store.alone(), store.conversation(version.reference):
        _check_holder(store, version.name, alias, holder)
        for tag in client.get_model_version(version.name, version.number).tags:
            if tag.startswith(mark) and tag not in tags:
                client.delete_model_version_tag(version.name, version.number, tag)
        for tag, text in tags.items():
            client.set_model_version_tag(version.name, version.number, tag, text)
        if takes:
            client.set_registered_model_alias(version.name, alias, version.number)


def _check_holder(store: Store, name: str, alias: str, holder: Version | None) -> None:
    """Raise TrackingError where an alias points to another version than the holder, or, for None, to any."""
    number = store.client.get_registered_model(name).aliases.get(alias)
    if (None if number is None else str(number)) != (None if holder is None else holder.number):
        found = "nobody" if number is None else f"models:/{name}/{number}"
        expected = "nobody" if holder is None else holder.reference
        told = f"{found} with it, since it has moved meanwhile"
        raise TrackingError(f"alias {alias}", told, f"{expected}, as when this began", "Call again.")


def _version(store: Store, name: str, number: str, folder: Path) -> Version:
    """The run is that of the whole, not of its stage."""
    with store.conversation(name):
        run_id = str(store.client.get_model_version(name, number).run_id)
        run_id = store.client.get_run(run_id).data.tags.get(PARENT, run_id)
    return Version(name, number, run_id, folder)


def _named(store: Store, reference: str) -> tuple[str, str]:
    """The name of the registered model and the number of its version."""
    name, mark, wanted = reference_parts(reference)
    if mark == "/":
        return name, wanted
    with store.conversation(reference):
        return name, str(store.client.get_registered_model(name).aliases[wanted])


def _store_of(output: Path) -> Store:
    """The store of an output folder's run: the one that it names, but for a name and a password that it leaves out."""
    record = output / "run.json"
    try:
        address = json.loads(record.read_text(encoding="utf-8"))["store"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        expected = "the output folder of a run, or models:/NAME/VERSION, models:/NAME@ALIAS or runs:/ID"
        raise TrackingError(str(record), unread(error), expected, "Name one of these.") from error
    try:
        return open_store(with_password(address), create=False)
    except TrackingError as error:
        error.add_note(
            f"{record} names this store. MLFLOW_TRACKING_URI gives it with a password; of a folder that was moved, "
            "`fullfield run` with its configuration registers the model anew."
        )
        raise
