"""`fullfield demo`: the whole job on phantoms, from nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import load_config
from pipeline.phantom import make_cohort
from pipeline.progress import console
from workflows.run import run_config

_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def demo(output: Path) -> int:
    """Make a phantom cohort below `output`, then run on it; the exit code is 1 where a slide failed."""
    console.print("Phantom slides are drawn; each is kept for the next time.")
    manifest = make_cohort(output / "cohort", seed=7)
    return run_config(load_config(_CONFIG, [f"output={output}", f"cohort.manifest={manifest}"]))
