"""Two processes train as one does: the same losses, the same scores and the same weights, to rounding."""

import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import yaml

from pipeline import fitting
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, TrainingError
from pipeline.inputs import training_facts
from pipeline.network import ModelSpec
from pipeline.patches import Patch
from pipeline.phantom import make_cohort
from pipeline.snapshot import Record, load
from pipeline.team import Alone, FabricTeam, require_alike
from pipeline.workspace import open_workspace
from workflows.tile import tile_cohort
from workflows.train import fit_arguments

ROOT = Path(__file__).parents[1]
CLASSES = Classes((Class("Other", (255, 255, 255)), Class("Dark", (0, 0, 0))))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms, two of which validate, and patches of which not all is known; three steps an epoch, the last of half
    a batch.
    """
    folder = tmp_path_factory.mktemp("team")
    manifest = make_cohort(folder / "cohort", seed=3, slides=3, width=1001, height=803, mpp=1.0)
    manifest.write_text(manifest.read_text().replace(",test", ",val"))
    content = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    content["output"], content["cohort"] = str(folder / "out"), {"manifest": str(manifest)}
    content["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 8, "depth": 2}
    content["tiles"]["patch_size"] = 64
    weights = {content["classes"][1]["name"]: 2.0}
    content["training"] = {"epochs": 3, "patches_per_epoch": 20, "batch_size": 8, "class_weights": weights}
    content["training"]["precision"] = "exact"  # bf16 rounds too much to tell a wrong sum from a rounded one
    content["normalisation"], content["cluster"] = {"method": "reinhard"}, {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def distance(one: Path, other: Path) -> float:
    """How far the weights of two trainings are from each other."""
    first, second = (load(folder / "training.safetensors")[1] for folder in (one, other))
    names = [name for name in first if name.startswith(("network.", "average.")) and not name.endswith("n_averaged")]
    return float(torch.stack([(first[name].double() - second[name].double()).norm() for name in names]).norm())


def figures(records: list[Record], name: str) -> list[float]:
    return [record.metrics[name] for record in records]


@pytest.mark.usefixtures("one_thread")
def test_two_processes_equal_one(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one process does that gets each batch in another order: sums are rounded otherwise, and no more.

    The two are killed after the second epoch, and one goes on for them.
    """
    pytest.importorskip("lightning_fabric")
    with open_workspace(load_config(path, [])) as workspace:
        tile_cohort(workspace)
        config, cases, tiles, _, inputs = fit_arguments(workspace)

    def fit(name: str, **values: object) -> Iterator[Record]:
        training = config.training.model_copy(update=values)
        folder = tmp_path / name / "model.partial"
        return fitting.fit(config.model_copy(update={"training": training}), cases, tiles, folder, inputs)

    one, two = list(fit("one")), list(islice(fit("two", devices=2), 2))
    gone_on, usual = list(fit("two")), fitting._batches

    def reversed_batches(*arguments: Any) -> Iterator[Patch]:
        for images, masks in usual(*arguments):
            yield np.ascontiguousarray(images[::-1]), np.ascontiguousarray(masks[::-1])

    monkeypatch.setattr(fitting, "_batches", reversed_batches)
    list(fit("reversed"))
    assert gone_on[:2] == two
    assert figures(gone_on, "learning_rate") == figures(one, "learning_rate")
    assert figures(gone_on, "loss") == pytest.approx(figures(one, "loss"), rel=1e-4)
    assert figures(gone_on, "dice") == pytest.approx(figures(one, "dice"), abs=1e-3)
    assert distance(tmp_path / "one", tmp_path / "two") < 10 * distance(tmp_path / "one", tmp_path / "reversed")


def test_validation_that_does_not_fit_into_memory_is_an_error_that_says_what_to_lower(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr("pipeline.fitting.validate", too_large)
    with open_workspace(load_config(path, [])) as workspace:
        tile_cohort(workspace)
        config, cases, tiles, _, inputs = fit_arguments(workspace)
    with pytest.raises(TrainingError, match=r"no memory for validation .*network\.width"):
        list(fitting.fit(config, cases, tiles, tmp_path / "model.partial", inputs))


def test_every_network_on_a_gpu_is_compiled_however_many_a_process_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that counts for the one that takes a compiler and a GPU."""
    calls = list[int]()

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        return lambda *values: [calls.append(1), graph.forward(*values)][1]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)  # as it is after the test, too
    team = Alone()
    team.device = torch.device("cuda")
    for number in range(2):
        spec = ModelSpec(architecture="fcn", classes=CLASSES, mpp=1.0, patch_size=32, width=4 + number, depth=1)
        team.learner(build_network(spec))(torch.zeros(1, 3, 32, 32))
        assert len(calls) == number + 1


def test_what_a_training_depends_on_is_not_who_does_it(path: Path) -> None:
    one, two = load_config(path, []), load_config(path, ["training.devices=2", "training.nodes=2"])
    assert one != two
    assert training_facts(one, []) == training_facts(two, []) and one.digest() == two.digest()
    assert one.digest() != load_config(path, ["training.epochs=5"]).digest()


@pytest.mark.parametrize("override", ["training.batch_size=6", "training.patches_per_epoch=18"])
def test_shares_that_are_not_even_are_refused(path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="multiples of devices x nodes, 4"):
        load_config(path, ["training.devices=4", override])


@pytest.mark.parametrize("kinds", [("cpu", "cpu"), ("cuda", "cpu")])
def test_processes_of_which_some_have_a_gpu_all_say_so(kinds: tuple[str, str]) -> None:
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor() as pool:
        told = [pool.submit(require_alike, store, rank, 2, kind) for rank, kind in enumerate(kinds)]
    for error in (each.exception() for each in told):
        assert (error is None) == (kinds[0] == kinds[1])
        assert error is None or f"cpu on {platform.node()}, cuda on {platform.node()}" in str(error)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(TrainingError, match="distributed"):
        FabricTeam(2, 1, "ddp")
