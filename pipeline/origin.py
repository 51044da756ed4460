"""With which code, with which other packages and on which machine something is made."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from pipeline import __version__

_PACKAGE = Path(__file__).resolve().parent


@cache
def origin() -> dict[str, str]:
    """By name: version, code (a SHA-256 over its sources), python, machine and lock (a SHA-256 over `packages`).

    In a git checkout also commit, and changed_since_commit, `yes` or `no`.
    """
    listed = "\n".join(f"{name}=={number}" for name, number in packages().items())
    found = {
        "version": __version__,
        "code": source_digest(),
        "python": platform.python_version(),
        "machine": ", ".join([platform.node(), platform.platform(), _processor(), f"{os.cpu_count()} cores"]),
        "lock": hashlib.sha256(listed.encode()).hexdigest(),
    }
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", Path(__file__).name) else None
    if commit:
        changed = "no" if _git("diff", "--quiet", "HEAD") is not None else "yes"
        found |= {"commit": commit, "changed_since_commit": changed}
    return found


@cache
def packages() -> dict[str, str]:
    """The version of every package that is installed here, by name, in the order of names."""
    found = dict[str, str]()
    for item in distributions():  # in the order in which Python looks for them: what comes later is never imported
        with suppress(FileNotFoundError, AttributeError):  # an interrupted installation leaves one without a name
            told = item.metadata  # reads a file each time that it is asked for
            found.setdefault(told["Name"].lower().replace("_", "-"), told["Version"])
    return dict(sorted(found.items()))


@cache
def source_digest() -> str:
    """A SHA-256 over the sources of Fullfield, as this process first found them."""
    total = hashlib.sha256()
    for folder in (_PACKAGE, _PACKAGE.with_name("workflows")):
        for path in sorted(folder.glob("*.py")):
            total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _processor() -> str:
    """The processor's model, where Linux tells it; else its kind."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.machine()


def _git(*words: str) -> str | None:
    """What git says about the folder of this code; None where it says no, or is not there."""
    command = ["git", "-C", str(_PACKAGE), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
