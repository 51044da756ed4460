"""`fullfield config`: what a configuration file may say."""

from __future__ import annotations

from pathlib import Path

import typer

config_app = typer.Typer(help="Shows what a configuration file may say.", no_args_is_help=True)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration file."""
    import json

    from pipeline.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("example")
def config_example() -> None:
    """Print a complete configuration with comments. Example: `fullfield config example > my.yaml`"""
    typer.echo((Path(__file__).parent / "configs" / "example.yaml").read_text(encoding="utf-8"), nl=False)
