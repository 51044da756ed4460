"""What was measured, kept as JSON as it is measured: a bench that is interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import write_text
from pipeline.machine import cores

RESULTS = Path(__file__).parent / "results"

_ROOT = Path(__file__).parents[1]
_LIBRARIES = ("torch", "monai", "openvino", "nncf", "openslide-bin", "zarr", "numpy")
_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Key:
    """What is run on what: a slide of `size` pixels a side of which `share` is tissue; `workers` 0: as many as usual."""

    size: int
    share: float
    network: str
    contender: str
    workers: int = 0


@dataclass(frozen=True)
class Run:
    """One run. Of a contender that failed there is an `error`, and the rest is 0.

    `whole` is seconds of the whole process; `seconds` those after start-up; `tiles` those from the first tile's planning
    to the last tile on disk, of Fullfield alone. `megapixels` counts what was segmented; `differ` is the share of labels,
    0 to 1, that are not one forward pass's.
    """

    key: Key
    whole: float = 0.0
    seconds: float = 0.0
    tiles: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    megapixels: float = 0.0
    tile_size: int = 0
    differ: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """What `fullfield plan` foresaw for a slide: see `pipeline.tiling.Estimate`."""

    size: int
    share: float
    network: str
    tile_size: int
    halo_cost: float
    seconds: float
    peak_bytes: int


class Record:
    """The runs of one section, in a file; those of another machine, other versions or other code are dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.conditions = path, conditions()
        self.plans, self.runs, self.remarks = list[Plan](), list[Run](), list[str]()
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if {**found["conditions"], "date": ""} == {**self.conditions, "date": ""}:
                self._take(found)

    @classmethod
    def read(cls, path: Path) -> Record:
        """A record as it is on disk, whatever machine it is of."""
        record, found = cls(path), json.loads(path.read_text(encoding="utf-8"))
        record.conditions = found["conditions"]
        record._take(found)
        return record

    def of(self, key: Key) -> list[Run]:
        """The runs of one key."""
        return [run for run in self.runs if run.key == key]

    def add(self, *items: Run | Plan | str) -> None:
        """Keep runs, plans or remarks."""
        for item in items:
            kept: dict[type, list[Any]] = {Run: self.runs, Plan: self.plans, str: self.remarks}
            kept[type(item)].append(item)
        parts = {"plans": [asdict(plan) for plan in self.plans], "runs": [asdict(run) for run in self.runs]}
        write_text(self.path, json.dumps({"conditions": self.conditions, **parts, "remarks": self.remarks}, indent=1) + "\n")

    def _take(self, found: dict[str, Any]) -> None:
        self.conditions = found["conditions"]
        self.plans = [Plan(**plan) for plan in found["plans"]]
        self.runs = [Run(**{**run, "key": Key(**run["key"])}) for run in found["runs"]]
        self.remarks = found["remarks"]


def conditions() -> dict[str, str]:
    """The machine, the versions and the code that is measured."""
    return {
        "processor": f"{_processor('model name') or platform.processor()}, {cores()} cores",
        "instructions": ", ".join(name for name in _INSTRUCTIONS if name in _processor("flags").split()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES),
        "code": _code()[:16],
        "date": str(date.today()),
    }


def _processor(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def _code() -> str:
    """A SHA-256 over the code that is measured and that which measures, but not that which draws, as hexadecimal digits."""
    total = hashlib.sha256()
    for folder in ("pipeline", "workflows", "benchmarks"):
        for path in sorted((_ROOT / folder).glob("*.py")):
            if path.stem != "report":
                total.update(path.read_bytes())
    return total.hexdigest()
