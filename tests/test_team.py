"""Two processes train as one does: the same losses, the same masks and the same weights, to rounding."""

from itertools import islice
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.config_file import load_config
from pipeline.phantom import make_cohort
from pipeline.workspace import open_workspace
from workflows.tile import tile_cohort
from workflows.train import fit, fit_arguments

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration: three phantoms, patches at their edges of which not all is known, three steps an epoch."""
    folder = tmp_path_factory.mktemp("team")
    manifest = make_cohort(folder / "cohort", seed=3, slides=3, width=1001, height=803, mpp=1.0)
    content = yaml.safe_load((ROOT / "workflows" / "configs" / "demo.yaml").read_text())
    content["output"], content["cohort"] = str(folder / "out"), {"manifest": str(manifest)}
    content["network"] = {"architecture": "fcn", "mpp": 4.0, "width": 4, "depth": 2}
    content["tiles"]["patch_size"] = 64
    weights = {content["classes"][1]["name"]: 2.0}
    content["training"] = {"epochs": 4, "patches_per_epoch": 20, "batch_size": 8, "class_weights": weights}
    content["cluster"] = {"workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


@pytest.mark.usefixtures("one_thread")
def test_two_processes_equal_one_and_one_goes_on_after_two(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    with open_workspace(load_config(path, [])) as workspace:
        tile_cohort(workspace)
        config, cases, tiles, _, inputs = fit_arguments(workspace)
    two = config.model_copy(update={"training": config.training.model_copy(update={"devices": 2})})
    alone = list(fit(config, cases, tiles, tmp_path / "one" / "model.partial", inputs))
    together = list(islice(fit(two, cases, tiles, tmp_path / "two" / "model.partial", inputs), 3))
    gone_on = list(fit(config, cases, tiles, tmp_path / "two" / "model.partial", inputs))
    for records in (together, gone_on):
        for record, other in zip(alone, records, strict=len(records) == len(alone)):
            for name in ("loss", "learning_rate", *(name for name in record.metrics if name.startswith("dice"))):
                print(name, other.metrics[name], record.metrics[name], other.metrics[name] - record.metrics[name])
    states = [load_file(tmp_path / name / "training.safetensors") for name in ("one", "two")]
    for name, tensor in states[0].items():
        other = states[1][name]
        print(name, ((other.double() - tensor.double()).norm() / tensor.double().norm().clamp(1e-12)).item())
    assert 0
