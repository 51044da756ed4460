"""Arguments and options that several verbs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.geometry import MPP_RANGE

if TYPE_CHECKING:
    from pipeline.settings import EngineSettings


def place(told: str) -> Any:
    """An option that names a folder or a file to write, and not by an empty text, which would be the current folder."""
    return typer.Option(help=told, parser=_named, metavar="PATH")


def _named(text: str | Path) -> Path:
    if not str(text):
        raise typer.BadParameter("should name a folder or a file; `.` is the current folder")
    return Path(text)


def scan(metavar: str, told: str) -> Any:
    """An argument that names a file to read; where that cannot be, the command says so, and not the command line."""
    return typer.Argument(metavar=metavar, help=told, readable=False)


Config = Annotated[Path, scan("CONFIG", "YAML file; see `fullfield config example`. OUTPUT is its `output`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Overrides of dotted keys, such as training.epochs=10."),
]
_MODEL = "A model's folder, runs:/ID, models:/NAME/VERSION or models:/NAME@ALIAS."
Model = Annotated[str, typer.Option(help=_MODEL, show_default=False)]
Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        help=f"{_MODEL} Given several times, or the output or run of a cross-validation: the mean of their probabilities.",
        show_default=False,
    ),
]
ScanMpp = Annotated[
    float | None,
    typer.Option(
        help="Micrometres per pixel of slides that state no usable scale. It is not used, and this told, of one that states "
        "its scale: over that, only column `mpp` of a manifest counts.",
        min=MPP_RANGE[0],
        max=MPP_RANGE[1],
    ),
]
TileSize = Annotated[
    int | None,
    typer.Option(help="Pixels of a tile, without its halo; chosen by running a few.", min=32, max=16384, show_default=False),
]
Precision = Annotated[Literal["exact", "fast", "fastest"], typer.Option(help="fp32, half (bf16 or fp16) or int8.")]
Flips = Annotated[
    bool | None,
    typer.Option(help="Mean over mirror images and turns, in eight times the time. Without this: as the model's own run."),
]
Blend = Annotated[
    bool,
    typer.Option("--blend", help="Average overlapping windows; for networks that are not local. The result is not exact."),
]
Backend = Annotated[Literal["auto", "torch", "openvino"], typer.Option(help="What computes; auto: the faster one.")]


def engine(precision: Precision, backend: Backend) -> EngineSettings:
    """The two options of the engine as settings."""
    from pipeline.settings import EngineSettings

    if (precision, backend) == ("fastest", "torch"):
        raise typer.BadParameter("torch computes in no int8: leave it out for `fastest`", param_hint="--backend")
    return EngineSettings(precision=precision, backend=backend)
