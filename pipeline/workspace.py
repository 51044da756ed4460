"""The output folder of a run with everything that its stages share: config, cohort, cluster and MLflow run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import snapshot
from pipeline.addresses import chosen_address, own_address
from pipeline.cells import read_cells
from pipeline.cluster import connect
from pipeline.cohort import Case, deal_out, read_manifest
from pipeline.config import Config
from pipeline.folder import alone, check_files, check_owner, write_setup
from pipeline.inputs import check_output
from pipeline.progress import console
from pipeline.settings import ALIAS, RESERVED_ALIAS
from pipeline.slide_job import SlideJob
from pipeline.specs import model_spec
from pipeline.tasks import Cluster
from pipeline.tile_table import TileTable, read_facts
from pipeline.tracking import Run

_LONGEST_ALIAS = 255  # letters that MLflow takes


@dataclass(frozen=True)
class Workspace:
    """What a stage works with. `cases` have their splits; results are below `output`."""

    config: Config
    cases: tuple[Case, ...]
    cluster: Cluster
    run: Run

    @property
    def output(self) -> Path:
        """The folder of results."""
        return self.config.output

    @property
    def tiles(self) -> Path:
        """The table of cells that the tile stage writes."""
        return self.output / "tiles.parquet"

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.output / "model"

    def is_interrupted(self) -> bool:
        """Whether a training was begun here that has not become a model. Raises TrainingError where its state is broken."""
        return snapshot.read_standing(snapshot.beside(self.output / "model.partial")) is not None

    def annotated(self, splits: Sequence[str]) -> list[Case]:
        """The cases of some splits of which something is known."""
        return [case for case in self.cases if case.split in splits and case.annotation is not None]

    def tiled(self, splits: Sequence[str]) -> list[Case]:
        """Those of them that have cells in the table of tiles: slides that cannot be read have none."""
        found = set(read_cells(self.tiles, ["slide_id"])["slide_id"].unique().to_pylist())
        return [case for case in self.annotated(splits) if case.slide_id in found]


@contextmanager
def open_workspace(config: Config, own: str | None = None) -> Iterator[Workspace]:
    """Read the cohort, deal out the splits and write them, then connect to MLflow and to the cluster.

    Nobody else works in the output meanwhile, see `alone`. Raises CohortError, ConfigError, NetworkError or TrackingError
    before anything expensive begins. Raises CheckpointError or TrainingError, before anything is written, where the folder
    holds a model, or an interrupted training, of another configuration, or another kind of work: see `check_owner`, of
    whose `own` this is.
    """
    settings = config.tracking
    with (
        _prepared(config, own) as (config, cases),
        Run.start(config.output, settings.experiment, config.output.name, settings.uri) as run,
        connect(config.cluster) as cluster,
    ):
        console.print(f"Work is done by {cluster.description}")
        yield Workspace(config, cases, cluster, run)


@contextmanager
def open_within(whole: Workspace, config: Config) -> Iterator[Workspace]:
    """A part of a larger work in a folder of its own: on the same cluster, its run nested in that of the whole.

    The folder's configuration names the store of the whole, so that the part can be continued alone; its model has the
    names of both folders as alias, and leaves that of other models where it is. Raises what `open_workspace` does.
    """
    settings = config.tracking
    uri = settings.uri if chosen_address(settings.uri) else own_address(whole.output)
    alias = alias_of(f"{whole.output.name}-{config.output.name}")
    settings = settings.model_copy(update={"uri": uri, "alias": alias})
    with _prepared(config.model_copy(update={"tracking": settings}), None) as (config, cases):
        whole.run.nest(config.output)
        run = Run.start(config.output, settings.experiment, config.output.name, uri)
        with replace(run, monitored=False) as run:  # the whole's run records the machine's load
            yield Workspace(config, cases, whole.cluster, run)


@contextmanager
def _prepared(config: Config, own: str | None) -> Iterator[tuple[Config, tuple[Case, ...]]]:
    """Check, deal out the splits and write both into the output folder, so that it can be called from any other."""
    cohort = config.cohort.model_copy(update={"manifest": config.cohort.manifest.absolute()})
    tracking = config.tracking.model_copy(update={"uri": config.tracking.uri and chosen_address(config.tracking.uri)})
    config = config.model_copy(update={"output": config.output.absolute(), "cohort": cohort, "tracking": tracking})
    model_spec(config)
    cases = dealt_cases(config)
    check_owner(config.output, own)  # a folder that is refused is left without even a lock
    check_files(config, cases)
    with alone(config, cases):
        check_owner(config.output, own)  # again, since a command that was waited for has left its results
        check_output(config, cases)
        write_setup(config, cases)
        yield config, cases


def dealt_cases(config: Config) -> tuple[Case, ...]:
    """The cohort with its splits. Raises CohortError."""
    return deal_out(read_manifest(config.cohort.manifest), config.cohort.fractions.model_dump(), config.seed)


def alias_of(name: str) -> str:
    """The name of a folder as an alias that MLflow takes."""
    alias = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    fits = re.fullmatch(ALIAS, alias) and not re.fullmatch(RESERVED_ALIAS, alias, re.IGNORECASE)
    return (alias if fits else f"run-{alias}")[:_LONGEST_ALIAS]


def log_inputs(workspace: Workspace) -> None:
    """Let the MLflow run say what it depends on: configuration, parameters and cohort."""
    config = workspace.config
    workspace.run.log_config(config.to_yaml(), config.digest())
    workspace.run.log_params(config.model_dump(mode="json", exclude={"classes"}))
    workspace.run.log_file(config.output / "cohort.csv")


def slide_job(case: Case, config: Config) -> SlideJob:
    """What it takes to segment a case with the run's own model."""
    folder, model = config.output / "slides" / case.slide_id, config.output / "model"
    return SlideJob(case.slide_id, case.slide, case.mpp, model, folder, config.segmentation, config.tissue, config.engine)


def adopt_tiles(workspace: Workspace, whole: Workspace) -> None:
    """Take what the table of tiles of a whole has of these slides, in whatever splits, as if they had been counted here.

    Nothing is written where it has none that counts here, or the workspace has its own table of these slides already.
    """
    config, cases = workspace.config, workspace.cases
    own, adopted = read_facts(workspace.tiles), TileTable(whole.tiles, config, cases)
    if adopted.facts.counted and not (own and own.is_of(config, cases)):
        adopted.write(workspace.tiles)
