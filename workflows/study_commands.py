"""Commands about several runs: which settings, and which model, are better. Verbs are imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workflows import options

study_app = typer.Typer()


@study_app.command()
def crossval(
    config: options.Config,
    overrides: options.Overrides = None,
    folds: Annotated[int, typer.Option(help="Number of folds.", min=2)] = 5,
) -> None:
    """Cross-validate over patients: one run per fold, each patient examined by a network that never saw it.

    Patients that the manifest names as test are held back. Of the others that are not in a fold, some validate and the rest
    train, by `cohort.fractions`; with val 0 there, the last epoch is kept. Writes OUTPUT/folds.csv before anything is
    trained, then OUTPUT/fold-1 and so on, each of which `fullfield run OUTPUT/fold-1/config.yaml` continues alone, and last
    lineage.json and the figures of all patients that were held out, as `fullfield evaluate` writes them of a run. Folds
    train side by side with cluster.workers=N, or on a scheduler's workers, unless training.devices or training.nodes
    share out each training; else one after the other.

    Example: `fullfield crossval my.yaml output=runs/cv --folds 5`
    """
    from workflows.crossval import crossval as verb

    raise typer.Exit(verb(config, overrides or [], folds))


@study_app.command()
def sweep(
    config: options.Config,
    values: Annotated[list[str], typer.Argument(metavar="key=value,value...", help="Values of dotted keys, by commas.")],
) -> None:
    """Train every combination of values, and score each on the validation slides.

    They train side by side with cluster.workers=N, or on a scheduler's workers; one after the other with one worker, the
    default. A list is one value in brackets; a key with a single value is set for all. Writes OUTPUT/NAME for each
    combination, which `fullfield run OUTPUT/NAME/config.yaml` continues alone, then OUTPUT/sweep.csv, sweep.md,
    sweep.png and lineage.json.

    Example: `fullfield sweep my.yaml output=runs/sweep training.learning_rate=1e-3,3e-4 network.width=16,32`
    """
    from workflows.sweep import sweep as verb

    raise typer.Exit(verb(config, values))


@study_app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Output folders, or MLflow runs (`runs:/ID`).")],
) -> None:
    """Say whether runs differ: the paired difference of Dice over the patients of both, with its 95 % interval.

    Reads each run's confusions.json; each is held against the first. Slides that a run learned from are left out, and so are
    those that chose its epoch, where all runs have test slides in common. Patients without a class in their annotations do
    not count for its Dice: what runs invent of it there is told as an area. Runs on other classes, slides or annotations
    are refused. It is trainings that are compared: two of the same settings, of two seeds, may differ as well, so that only
    several of each (`fullfield sweep my.yaml seed=0,1,2`) tell which settings are better.

    Example: `fullfield compare runs/plain runs/glas`
    """
    from workflows.compare import compare as verb

    raise typer.Exit(verb(runs))


@study_app.command()
def promote(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Output of a run, runs:/ID, models:/NAME/VERSION or models:/NAME@ALIAS.")
    ],
    alias: Annotated[str, typer.Option(help="What the model in use is called.")] = "champion",
    margin: Annotated[
        float, typer.Option(help="A larger loss of Dice, the mean over classes, must be ruled out.", min=0, max=1)
    ] = 0.01,
    config: Annotated[
        Path | None, typer.Option(help="Whose slides decide; else those of the model's own run.", readable=False)
    ] = None,
    output: Annotated[Path, options.place("Where both are examined.")] = Path("promotions"),
) -> None:
    """Give a registered model the alias, if it is shown to be no worse, within `--margin`, than the model that has it.

    Both segment the annotated test slides that neither was trained on, or, where there are none, those for validation, which
    flatters a model whose epoch they chose; the verdict then says so. The alias moves where the 95 % interval of the paired
    difference over patients holds no loss larger than the margin. That is of the mean over classes, in which one that few
    patients have counts for little: so a class that is shown to lose more than the margin refuses, too. Fewer than six
    patients cannot be as sure: then none of them may lose more in the mean, nor all of them in a class. The evidence becomes
    tags of the version, among them the difference of each class, and the SHA-256 of the lineage.json of what was examined,
    which lies below the output. The exit code is 3 where the alias stays, and 1 for an error.

    Example: `fullfield promote runs/mine --margin 0.01`
    """
    from workflows.promote import promote as verb

    raise typer.Exit(verb(model, alias, margin, config, output))


@study_app.command()
def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a run, or its MLflow run (`runs:/ID`).")],
    output: Annotated[Path | None, options.place("Folder of the new run; else the old one's name with `-again`.")] = None,
) -> None:
    """Write the configuration and cohort of an earlier run anew, and say what has changed since.

    Compares code, packages, machine, slides and annotations with the run's lineage.json. Writes config.yaml and
    cohort.csv, and prints the command that runs them.

    Example: `fullfield reproduce runs/glas`
    """
    from workflows.reproduce import reproduce as verb

    raise typer.Exit(verb(run, output))
