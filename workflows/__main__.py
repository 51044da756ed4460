"""The command line: `fullfield --help`. Each verb's module is imported only when it is called."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.errors import FullfieldError, refusal
from pipeline.forking import ended_as_by_ctrl_c
from pipeline.machine import settle_user_name
from workflows import options
from workflows.config_commands import config_app
from workflows.study_commands import study_app

_OBJECTS = 100_000  # about as many come with what a command imports, and none of them is garbage to be looked for

app = typer.Typer(
    name="fullfield",
    help="Segments whole microscope slides: trained on patches, exact on gigapixels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(study_app)
app.add_typer(config_app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fullfield {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


@app.command()
def demo(output: Annotated[Path, options.place("Folder for everything it makes.")] = Path("runs/demo")) -> None:
    """Make phantom slides, train on them, segment one that was never seen, and log it all.

    Writes the phantom cohort and every result below OUTPUT.

    Example: `fullfield demo --output runs/demo`
    """
    from workflows.demo import demo as verb

    raise typer.Exit(verb(output))


@app.command()
def run(config: options.Config, overrides: options.Overrides = None) -> None:
    """Tile, train, segment and evaluate, as one MLflow run; continue where an earlier call stopped.

    Reads CONFIG and the cohort that it names; writes all results below its `output`. The exit code is 1 where a slide could
    not be tiled, segmented or evaluated.

    Example: `fullfield run workflows/configs/glas.yaml cohort.manifest=glas/cohort.csv training.epochs=10`
    """
    from workflows.run import run as verb

    raise typer.Exit(verb(config, overrides or []))


@app.command()
def tile(config: options.Config, overrides: options.Overrides = None) -> None:
    """Divide slides into cells and count what there is to learn from.

    Reads slides and annotations; writes OUTPUT/cohort.csv (the splits) and OUTPUT/tiles.parquet (one row per cell).
    The exit code is 1 where a slide could not be read, and was left out.

    Example: `fullfield tile workflows/configs/glas.yaml`
    """
    from workflows.tile import tile as verb

    raise typer.Exit(verb(config, overrides or []))


@app.command()
def train(config: options.Config, overrides: options.Overrides = None) -> None:
    """Train the network on patches of the training slides.

    Reads OUTPUT/tiles.parquet; writes OUTPUT/model (model.yaml, network.json and weights.safetensors). Killed and called
    again, it goes on after the last whole epoch (OUTPUT/training.safetensors), to the same weights, unless
    training.max_minutes has the clock decide how many epochs there are.

    Example: `fullfield train workflows/configs/glas.yaml training.max_minutes=15`
    """
    from workflows.train import train as verb

    raise typer.Exit(verb(config, overrides or []))


@app.command()
def segment(
    slides: Annotated[list[Path], options.scan("SLIDE...", "Whole-slide scans of any OpenSlide format.")],
    model: options.Models,
    output: Annotated[Path, options.place("Folder for the results.")],
    mpp: options.ScanMpp = None,
    tile_size: options.TileSize = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0 for this process.", min=0)] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler, instead of local workers.")] = None,
    precision: options.Precision = "exact",
    backend: options.Backend = "auto",
    flips: options.Flips = None,
    blend: options.Blend = False,
) -> None:
    """Segment slides with a trained model. What is done is skipped; what was interrupted is finished.

    A precision below exact must have been approved by `fullfield run CONFIG engine.precision=...`, on validation tissue.
    Writes OUTPUT/slides/SLIDE_ID/ (OME-Zarr, OME-TIFF, GeoJSON, CSV, pictures) and OUTPUT/slides.csv; of several models
    also OUTPUT/ensemble, which serves as a model as long as they stay where they are, and an entropy map of each slide. The
    exit code is 1 where a slide failed.

    Example: `fullfield segment a.svs b.ndpi --model runs/demo/model --output results`
    """
    if workers is not None and scheduler is not None:
        raise typer.BadParameter("workers are the scheduler's own where one is named", param_hint="--workers")
    if workers != 0 and scheduler is None:
        _expect_workers(*slides, *(Path(one) for one in model if ":" not in one))
    from pipeline.settings import ClusterSettings
    from workflows.segment import segment as verb

    where = ClusterSettings(workers=workers, scheduler=scheduler)
    raise typer.Exit(verb(slides, model, output, mpp, tile_size, where, options.engine(precision, backend), blend, flips))


@app.command()
def plan(
    slide: Annotated[Path, options.scan("SLIDE", "A whole-slide scan.")],
    model: options.Model,
    mpp: options.ScanMpp = None,
    tile_size: options.TileSize = None,
    precision: options.Precision = "exact",
    backend: options.Backend = "auto",
    flips: options.Flips = None,
    blend: options.Blend = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what segmenting a slide will take, without doing it: tile size, cost of the halo, seconds, memory, disk.

    Reads the slide's tissue and runs a few tiles of it in a worker; keeps nothing but what speeds up the next call. Peak
    memory is that of a whole worker; the output is the OME-Zarr with its pyramid, at the rate at which those tiles were
    compressed.

    Example: `fullfield plan slide.svs --model runs/demo/model`
    """
    _expect_workers(slide, *([] if ":" in model else [Path(model)]))
    from workflows.plan import plan as verb

    verb(slide, model, mpp, tile_size, options.engine(precision, backend), blend, flips, as_json)


@app.command()
def evaluate(config: options.Config, overrides: options.Overrides = None) -> None:
    """Hold the segmented slides of a run against their annotations.

    Reads OUTPUT/slides; writes metrics.json, metrics.csv, confusions.json, assessments.json, calibration.csv and
    reliability.png into OUTPUT, and truth.png and assessment.json into the folder of each slide; called again, it counts
    only on those that have changed, or whose annotations have. The exit code is 1 where a slide could not be evaluated, or
    none is annotated.

    Example: `fullfield evaluate workflows/configs/glas.yaml`
    """
    from workflows.evaluate import evaluate as verb

    raise typer.Exit(verb(config, overrides or []))


@app.command()
def inspect(
    slide: Annotated[Path, options.scan("SLIDE", "A whole-slide scan.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[Path | None, options.place("Write a thumbnail with the tissue outlined (PNG).")] = None,
    mpp: options.ScanMpp = None,
) -> None:
    """Say what a slide is: vendor, size, levels, micrometres per pixel, objective, area of tissue.

    Example: `fullfield inspect slide.svs --picture slide.png`
    """
    from workflows.inspect import inspect as verb

    verb(slide, as_json, picture, mpp)


@app.command()
def verify(
    slide: Annotated[Path | None, options.scan("[SLIDE]", "Your slide; without one, a phantom.")] = None,
    *,
    model: options.Model,
    mpp: options.ScanMpp = None,
    precision: options.Precision = "exact",
    backend: options.Backend = "auto",
    flips: options.Flips = None,
    blend: options.Blend = False,
) -> None:
    """Prove on your own slide that tiles, stitched, are what one forward pass over the whole gives.

    Prints the largest and the mean difference of probability and the number of labels that differ. The exit code is 1 where
    a difference is above 1e-5: so it is with --blend, which tells how far off blending is. For a network that is not local,
    one forward pass is over the whole of a small slide, or over windows of a large one.

    Example: `fullfield verify slide.svs --model runs/demo/model`
    """
    from workflows.verify import verify as verb

    raise typer.Exit(verb(slide, model, mpp, options.engine(precision, backend), blend, flips))


def _flowing(text: str) -> str:
    """A docstring whose paragraphs have no line breaks of their own: where lines end, the terminal's width decides."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _command in (*app.registered_commands, *study_app.registered_commands):
    _command.help = _flowing(getattr(_command.callback, "__doc__", None) or "")


def _expect_workers(*needed: Path) -> None:
    """Begin to import what workers need, meanwhile; not where a file is missing, since the command will only say so."""
    from pipeline.forking import start_forking
    from pipeline.machine import worker_environment

    if all(path.exists() for path in needed):
        start_forking(worker_environment(1))


def main() -> None:
    """Run the command line; an expected error is one message and exit code 1, and so is what a disk or a folder refuses."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be Unicode
    settle_user_name()
    if not os.environ.get("COLUMNS", "").strip("0"):  # which leaves no room for a letter: the terminal knows better
        os.environ.pop("COLUMNS", None)
    gc.set_threshold(_OBJECTS)
    atexit.register(gc.freeze)  # else Python looks at all of them once more before it ends, for a third of a second
    try:
        with ended_as_by_ctrl_c():
            app()
    except FullfieldError as error:
        print(f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        told = refusal(error, "a file")
        if told is None:
            raise
        print(told, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
