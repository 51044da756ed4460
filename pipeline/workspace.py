"""The output folder of a run with everything that its stages share: config, cohort, cluster and MLflow run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pyarrow import parquet

from pipeline import snapshot
from pipeline.ahead import ahead
from pipeline.annotations import open_truth, with_glass
from pipeline.cluster import connect
from pipeline.cohort import Case, deal_out, manifest_text, read_manifest, write_manifest
from pipeline.config import ALIAS, RESERVED_ALIAS, Config, NetworkSettings, TileSettings
from pipeline.config_file import asked, load_config
from pipeline.errors import CheckpointError, CohortError, ConfigError, NetworkError, TrainingError
from pipeline.files import as_unicode, locked, replacing, write_text
from pipeline.geometry import Mpp
from pipeline.inputs import TILE_COMPLETE, TILE_STAMP, TILED, check_at_work, check_output, read_stamp, tile_inputs
from pipeline.machine import threads
from pipeline.network import ModelSpec
from pipeline.normalised import NormalisedSlide, estimate, normalised
from pipeline.patches import Source
from pipeline.progress import console
from pipeline.slide import open_slide
from pipeline.slide_job import SlideJob
from pipeline.staining import Normalisation, Staining
from pipeline.stains import reference
from pipeline.store import chosen_address, own_address
from pipeline.tasks import Cluster
from pipeline.tissue import find_tissue
from pipeline.tracking import Run
from pipeline.truth import ClassMap, Truth

TABLES = {"folds.csv": "crossval", "sweep.csv": "sweep"}
"""What works of many runs leave in their outputs, and the verbs that do."""

_WRITTEN = "# Written by Fullfield, which replaces it: what you want to keep belongs into a file of another name.\n"
_LONGEST_ALIAS = 255  # letters that MLflow takes
_RESULTS = ("slides.csv", "metrics.csv", "calibration.csv", *TABLES)


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
        found = set(parquet.read_table(self.tiles, columns=["slide_id"])["slide_id"].to_pylist())
        return [case for case in self.annotated(splits) if case.slide_id in found]


@contextmanager
def open_workspace(config: Config, own: str | None = None) -> Iterator[Workspace]:
    """Read the cohort, deal out the splits and write them, then connect to MLflow and to the cluster.

    Nobody else works in the output meanwhile, see `alone`. Raises CohortError, ConfigError, NetworkError or TrackingError
    before anything expensive begins, and CheckpointError, before anything is written, where the folder holds a model of
    another configuration, a table of a work of many runs, unless it is the caller's `own`, or, for one who has such a table,
    a model.
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
    """Check, deal out the splits and write both into the output folder; the configuration then has it absolute."""
    config = config.model_copy(update={"output": config.output.absolute()})
    model_spec(config)
    cases = dealt_cases(config)
    _check_owner(config.output, own)  # a folder that is refused is left without even a lock
    _check_files(config, cases)
    with alone(config, cases):
        _check_owner(config.output, own)  # again, since a command that was waited for has left its results
        check_output(config, cases)
        write_setup(config, cases)
        yield config, cases


@contextmanager
def alone(config: Config, cases: Sequence[Case]) -> Iterator[None]:
    """Have the output to oneself while the block lasts: what another command is at is not replaced under its hands.

    One of the same cohort and configuration is waited for, with a word; for another, raises CheckpointError at once.
    """
    with ExitStack() as held:
        if not held.enter_context(locked(config.output / "model", wait=False)):
            check_at_work(config, cases)
            console.print(f"Waits for another command in {config.output}")
            held.enter_context(locked(config.output / "model"))
        yield


def write_setup(config: Config, cases: Sequence[Case]) -> None:
    """Write a configuration, and the cohort with its splits, into its output.

    Raises CohortError where files are there that Fullfield did not write, and would replace.
    """
    _check_files(config, cases)
    config.output.mkdir(parents=True, exist_ok=True)
    write_text(config.output / "config.yaml", _WRITTEN + config.to_yaml())  # first: it says whose the other one is
    write_manifest(config.output / "cohort.csv", cases)


def _check_files(config: Config, cases: Sequence[Case]) -> None:
    """Raise CohortError where files are in the output that Fullfield did not write, and would replace."""
    own, dealt, manifest = config.output / "config.yaml", config.output / "cohort.csv", config.cohort.manifest
    written = own.is_file() and own.read_bytes().startswith(_WRITTEN.encode())
    theirs = [own] if own.exists() and not written else []
    if (not written or _is_same(dealt, manifest)) and not _may_hold(dealt, manifest_text(cases)):
        theirs.append(dealt)
    theirs += [path for path in map(config.output.joinpath, _RESULTS) if _is_same(path, manifest)]
    if theirs:
        found = f"a file that Fullfield did not write, where it writes {theirs[0].name}"
        remedy = "Call it otherwise, or choose another `output`, for instance output=runs/mine."
        raise CohortError(str(theirs[0]), found, "no file of that name, or Fullfield's own", remedy)


def _may_hold(path: Path, text: str) -> bool:
    """Whether nothing is lost by writing this text into a file, which is not there or holds it already."""
    return not path.exists() or path.read_bytes() == as_unicode(text).encode()


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths, or links, lead to one file that is there."""
    return path.exists() and other.exists() and path.samefile(other)


def _check_owner(output: Path, own: str | None) -> None:
    """Raise CheckpointError where an output is that of another kind of work, whose results would be replaced.

    `own` is the table that one of many runs leaves; None for a single run.
    """
    others = {name: verb for name, verb in TABLES.items() if name != own} | ({"model": "run"} if own else {})
    for name, verb in others.items():
        if (output / name).exists():
            remedy = "Choose another `output`, for instance output=runs/mine."
            raise CheckpointError(str(output), f"the results of `fullfield {verb}`", "a folder of its own", remedy)


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


def require_output(config: Config, verb: str) -> None:
    """Raise CohortError where the output, which an earlier stage makes, is not there: its name may be misspelt."""
    if not config.output.is_dir():
        raise CohortError(str(config.output), "no such folder", "an output", f"Run `fullfield {verb}` first.")


def adopt_tiles(workspace: Workspace, tiles: Path, whole: Config) -> None:
    """Write the table of tiles as the tile stage would, from one of the same slides with other splits, where there is one.

    `whole` is the configuration with which `tiles` was made; nothing is written where it divides slides otherwise, or where
    slides are missing from it, or where the workspace has its own table already.
    """
    config, found = workspace.config, read_stamp(tiles)
    same = all(getattr(config, name) == getattr(whole, name) for name in TILED) and config.network.mpp == whole.network.mpp
    if workspace.tiles.exists() or not same or found is None or not found[1]:
        return
    table, splits = parquet.read_table(tiles), {case.slide_id: case.split for case in workspace.cases}
    table = table.filter([name in splits for name in table["slide_id"].to_pylist()])
    column = [splits[name] for name in table["slide_id"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("split"), table.schema.field("split"), [column])
    metadata = {TILE_STAMP: tile_inputs(config, workspace.cases), TILE_COMPLETE: "True"}
    with replacing(workspace.tiles) as partial:
        parquet.write_table(table.replace_schema_metadata(metadata), partial)


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """What `load_config` reads, of a network that can be built. Raises ConfigError that names the key at fault."""
    config = load_config(path, overrides)
    try:
        model_spec(config)
    except NetworkError as error:
        found = f"{_dotted(error.subject.removeprefix('model spec, '))}: {error.found}"
        raise ConfigError(asked(str(path), overrides), found, error.expected, _dotted(error.remedy)) from error
    return config


def _dotted(text: str) -> str:
    """A text with the keys of a model spec as a configuration has them."""
    keys = {key: f"network.{key}" for key in NetworkSettings.model_fields}
    keys |= {key: f"tiles.{key}" for key in TileSettings.model_fields}
    return re.sub(r"`(\w+)`", lambda key: f"`{keys.get(key[1], key[1])}`", text)


def model_spec(config: Config) -> ModelSpec:
    """The model that a configuration describes, before its footprint is measured. Raises NetworkError."""
    network = config.network
    return ModelSpec(
        architecture=network.architecture,
        classes=config.class_list,
        mpp=network.mpp,
        patch_size=config.tiles.patch_size,
        width=network.width,
        depth=network.depth,
        downsample=network.downsample,
        upsample=network.upsample,
        encoder=network.encoder,
        residual_units=network.residual_units,
        norm=network.norm,
        halo=None if network.norm == "instance" else 0,
        rest=rest_index(config),
    )


def open_source(case: Case, config: Config, normalisation: Normalisation | None = None) -> Source:
    """The slide and the truth of an annotated case, on the lattice of the model, as one of that normalisation sees it."""
    slide = open_slide(case.slide, case.mpp)
    source = Source(slide, case_truth(case, config), slide.base.at(Mpp.square(config.network.mpp)))
    if normalisation is None:
        return source
    return replace(source, slide=normalised(slide, find_tissue(slide, config.tissue), normalisation))


def open_sources(cases: Sequence[Case], config: Config) -> tuple[dict[str, Source], Normalisation | None]:
    """Annotated cases as a model that is to be trained on them will see them, and that model's normalisation.

    It leads to the mean of the training slides; each slide is estimated once. Training slides also teach what glass is, see
    `with_glass`. Raises TrainingError where the stain of no training slide can be told.
    """
    method, opened = config.normalisation.method, ahead(partial(_taught, config=config), cases, 2 * threads(), threads())
    sources, stainings = dict[str, Source](), dict[str, Staining]()
    for case, (source, staining) in opened:
        sources[case.slide_id] = source
        if staining is not None:
            stainings[case.slide_id] = staining
    if method == "none":
        return sources, None
    trained = [stainings[case.slide_id] for case in cases if case.split == "train"]
    normalisation = reference(trained, method)
    if normalisation is None:
        problems = "; ".join(sorted({item.problem for item in trained}))
        remedy = "Say normalisation.method=none."
        raise TrainingError(f"normalisation.method {method}", problems, "a training slide whose stain can be told", remedy)
    alike = {
        name: replace(source, slide=NormalisedSlide(source.slide, stainings[name], normalisation))
        for name, source in sources.items()
    }
    return alike, normalisation


def left_as_scanned(sources: Mapping[str, Source]) -> list[str]:
    """Those of the sources, by slide_id, that should have been normalised, but whose stain cannot be told."""
    slides = ((name, source.slide) for name, source in sources.items())
    return [name for name, slide in slides if isinstance(slide, NormalisedSlide) and slide.staining.problem]


def _taught(case: Case, config: Config) -> tuple[Source, Staining | None]:
    """A case as training sees it, and how its slide is stained where that counts.

    On what a network is validated, only what was outlined counts, and no glass.
    """
    source, method = open_source(case, config), config.normalisation.method
    teaches_glass = case.split == "train" and bool(config.annotations.known)
    if not teaches_glass and method == "none":
        return source, None
    slide = open_slide(case.slide, case.mpp)
    tissue = find_tissue(slide, config.tissue)
    taught = replace(source, truth=with_glass(source.truth, tissue)) if teaches_glass else source
    return taught, None if method == "none" else estimate(slide, tissue, method)


def slide_job(case: Case, config: Config) -> SlideJob:
    """What it takes to segment a case with the run's own model."""
    folder, model = config.output / "slides" / case.slide_id, config.output / "model"
    return SlideJob(case.slide_id, case.slide, case.mpp, model, folder, config.segmentation, config.tissue, config.engine)


def case_truth(case: Case, config: Config) -> Truth:
    """What is known of a case. Raises AnnotationError."""
    if case.annotation is None:
        raise ValueError(f"case {case.slide_id} has no annotation")
    slide = open_slide(case.slide, case.mpp)
    return open_truth(case.annotation, slide.base, class_map(config), config.annotations.label_mpp, slide.shown)


def class_map(config: Config) -> ClassMap:
    """How names in annotation files, and values in label images, become classes."""
    settings, classes = config.annotations, config.class_list
    return ClassMap(
        classes=classes,
        names={name: index for index, item in enumerate(config.classes) for name in item.annotations or (item.name,)},
        values={value: index for index, item in enumerate(config.classes) for value in item.values},
        known=settings.known,
        ignored=settings.ignored,
        rest=None if settings.rest is None else classes.index(settings.rest),
        unnamed=None if settings.unnamed is None else classes.index(settings.unnamed),
    )


def rest_index(config: Config) -> int | None:
    """The index of the class of known pixels under no outline, or None."""
    rest = config.annotations.rest
    return None if rest is None else config.class_list.index(rest)
