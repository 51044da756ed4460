"""What is declared, what is locked and what conda is told agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_satisfies_every_declared_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(item for names in extras.values() for item in names)]:
        requirement = Requirement(text)
        assert canonical(requirement.name) in locked(), requirement.name
        assert requirement.specifier.contains(locked()[canonical(requirement.name)]), text


def test_the_lock_has_exact_versions_and_no_vision_library() -> None:
    assert locked()["torch"] == "2.13.0"
    assert "torchvision" not in locked()
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in locked().values())


def test_conda_gets_the_same_python_and_the_same_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert PROJECT["requires-python"] == f">={python.removeprefix('python=')},<3.12"
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip[0] == f"torch=={locked()['torch']}"
    assert "--constraint requirements.lock" in pip


def test_make_installs_with_the_lock() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint requirements.lock" in line for line in installs)


@pytest.mark.parametrize("own", [False, True])
def test_make_makes_anew_what_it_left_half_made_but_nobody_else_s(tmp_path: Path, own: bool) -> None:
    """By a Python whose environments have no pip, as where a distribution left it out. Nothing is ever installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" --without-pip\n')
    (tmp_path / "python").chmod(0o755)
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    subprocess.run([tmp_path / "python", "-m", "venv", tmp_path / ".venv"], check=True)
    for name in ("mark", ".torch", ".demo", *([".begun"] if own else [])):  # those after the mark are make's own
        (tmp_path / ".venv" / name).touch()
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_REQUIRE_VIRTUALENV": "1"}
    command = ["make", "demo", "PYTHON=./python"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(".venv is no environment of Python 3.11 with pip: remove it")
    assert (tmp_path / ".venv" / "mark").exists() != own


def test_what_the_caller_s_pip_and_python_are_told_does_not_reach_make_s(tmp_path: Path) -> None:
    (tmp_path / "show").write_text("show:\n\t@env\n")
    told = dict.fromkeys(("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONPATH", "PYTHONHOME"), "/elsewhere")
    command = ["make", "-f", ROOT / "Makefile", "-f", tmp_path / "show", "show"]
    found = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=True).stdout
    assert "PIP_USER=0\n" in found
    assert "elsewhere" not in found
