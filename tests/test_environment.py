"""What is declared, what is locked and what conda is told agree."""

import re
import tomllib
from pathlib import Path

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
