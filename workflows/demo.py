"""`fullfield demo`: the whole job on phantoms, from nothing."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline.config_file import parse_config
from pipeline.phantom import make_cohort
from pipeline.progress import console
from workflows.run import run_config

_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def demo(output: Path) -> int:
    """Make a phantom cohort below `output`, then run on it; the exit code is 1 where a slide failed."""
    console.print("Phantom slides are drawn; each is kept for the next time.")
    manifest = make_cohort(output / "cohort", seed=7)
    content = yaml.safe_load(_CONFIG.read_text(encoding="utf-8"))
    content |= {"output": str(output), "cohort": {"manifest": str(manifest)}}
    return run_config(parse_config(content, str(_CONFIG)))
