"""`fullfield reproduce RUN`: the configuration of an earlier run once more, and what has changed since."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import snapshot
from pipeline.addresses import lacks_password
from pipeline.config_file import load_config
from pipeline.errors import CheckpointError
from pipeline.folder import TABLES, alone, write_setup
from pipeline.lineage import FILE, case_facts, case_of, changes, read_lineage
from pipeline.progress import console
from pipeline.store import run_file
from pipeline.workspace import alias_of

_LETTERS = 9  # of a commit


def reproduce(reference: str, output: Path | None) -> int:
    """Write a configuration and a cohort with the same splits, name every difference, and say how to go on."""
    with run_file(reference, FILE) as path:
        lineage = read_lineage(path)
    with run_file(reference, "config.yaml") as path:
        old = load_config(path)
    output = (output or old.output.with_name(f"{old.output.name}-again")).absolute()
    cases = [case_of(facts) for facts in lineage["slides"]]
    cohort = old.cohort.model_copy(update={"manifest": output / "cohort.csv"})
    own = {"alias": alias_of(output.name), "uri": _store(old.tracking.uri)}  # the old run's alias stays with its own model
    tracking = old.tracking.model_copy(update=own)
    new = old.model_copy(update={"output": output, "cohort": cohort, "tracking": tracking})
    with alone(new, cases):
        _check_free(output)
        write_setup(new, cases)
    differences = list(changes(lineage, [case_facts(case) for case in cases]))
    if lineage.get("config_digest", old.digest()) != old.digest():
        differences.append(
            "config.yaml: a later command has written another configuration into the folder, and this is that"
        )
    began, *later = lineage["origins"]
    console.print(f"{reference} was made {_by(began)}")
    for went_on in later:
        console.print(f"gone on with: {_by(went_on)}")
    if not differences:
        console.print("Nothing has changed since: code, packages, machine, slides and annotations are the same.")
    for line in differences:
        console.print(f"changed: {line}")
    for way in filter(None, map(_way, lineage["models"])):
        console.print(f"Its model was trained {way}: another device or format rounds otherwise.")
    command = shlex.join(["fullfield", "run", str(output / "config.yaml")])
    console.print(f"Run it again with\n  {command}")
    return 0


def _check_free(output: Path) -> None:
    """Raise CheckpointError where a folder holds the results of a run."""
    results = (output / "model", snapshot.beside(output / "model.partial"), *map(output.joinpath, TABLES))
    if taken := [path.name for path in results if path.exists()]:
        found, expected = f"the results of another run ({taken[0]})", "a folder without any"
        raise CheckpointError(str(output), found, expected, "Choose another folder (--output).")


def _store(uri: str | None) -> str | None:
    """The store that a configuration names, if it can be opened: MLflow keeps no password, nor is one written down here."""
    if uri is None or not lacks_password(uri):
        return uri
    told = "is null in the new configuration, so that MLFLOW_TRACKING_URI decides"
    console.print(f"tracking.uri was {uri}, of which MLflow keeps no password: it {told}")
    return None


def _way(model: Mapping[str, Any]) -> str:
    """On what a model was trained, in words; empty where it does not say."""
    training = model["ancestry"].get("training", {})
    return f"on {training['device']} in {training['format']}" if "device" in training else ""


def _by(origin: Mapping[str, str]) -> str:
    commit = f" ({origin['commit'][:_LETTERS]})" if "commit" in origin else ""
    return f"{origin['made']} with Fullfield {origin['version']}{commit} on {origin['machine']}"
