"""What is saved comes back bit for bit; what is broken, mixed or a pickle is refused."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline import checkpoint
from pipeline.architectures import build_network
from pipeline.classes import Class, Classes
from pipeline.errors import CheckpointError
from pipeline.graph import GraphNetwork
from pipeline.network import ModelSpec
from pipeline.registry import resolve_model

LINEAGE = {"run": "b1946ac9", "epoch": 7, "dice": {"Gland": 0.91}, "place": "Zürich"}


def spec(architecture: str = "fcn", **changes: Any) -> ModelSpec:
    classes = Classes((Class("Drüse", (200, 40, 40)), Class("Stroma", (40, 200, 40))))
    values = {"classes": classes, "mpp": 0.4942, "patch_size": 64, "width": 4, "depth": 3, "halo": 32, "stride": 8}
    return ModelSpec(architecture=architecture, **{**values, **changes})


def network(model: ModelSpec, seed: int = 0) -> torch.nn.Module:
    """A network whose batch statistics are no longer those of a new one."""
    torch.manual_seed(seed)
    built = build_network(model)
    with torch.no_grad():
        built.train()(torch.randn(2, 3, 32, 64))
    return built


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", spec(), network(spec()), LINEAGE)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "model",
    [
        spec(),
        spec(downsample="stride", upsample="transpose"),
        spec("heatmap", output_stride=8),
        spec("classifier", output_stride=8),
        spec("unet"),
        spec("basic_unet", depth=4),
        spec("flexible_unet", depth=5, encoder="resnet10"),
    ],
    ids=lambda model: model.architecture,
)
def test_a_model_comes_back_bit_for_bit(model: ModelSpec, tmp_path: Path) -> None:
    before = network(model)
    checkpoint.save(tmp_path / "deep" / "model", model, before, LINEAGE)
    assert before.training
    found, after = checkpoint.load(tmp_path / "deep" / "model")
    assert found == model == checkpoint.load_spec(tmp_path / "deep" / "model")
    assert isinstance(after, GraphNetwork) and not after.training and after.state_dict().keys() == before.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]) and value.dtype == after.state_dict()[name].dtype
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(before.eval()(image), after(image))


class Flattens(torch.nn.Sequential):
    """The same answer, by way of an operation that no graph has."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = super().forward(image)
        return answer.flatten(2).reshape(answer.shape)


def test_a_network_without_a_graph_is_built_anew(tmp_path: Path) -> None:
    before = Flattens(OrderedDict(network(spec()).named_children()))
    checkpoint.save(tmp_path / "model", spec(), before)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.yaml", "weights.safetensors"}
    assert len(checkpoint.digest(tmp_path / "model")) == 64
    _, after = checkpoint.load(tmp_path / "model")
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert not isinstance(after, GraphNetwork) and torch.equal(before.eval()(image), after(image))
    (tmp_path / "model" / "network.json").write_text("{}")
    for read in (checkpoint.load, checkpoint.digest):
        with pytest.raises(CheckpointError, match="expected no such file"):
            read(tmp_path / "model")


def test_lineage_comes_back_and_may_be_absent(saved: Path, tmp_path: Path) -> None:
    assert checkpoint.load_run_record(saved) == LINEAGE
    checkpoint.save(tmp_path / "other", spec(), network(spec()))
    assert checkpoint.load_run_record(tmp_path / "other") == {}


def test_a_description_is_parsed_once_and_again_when_it_has_changed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, safe_load = [], yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", lambda text: parsed.append(text) or safe_load(text))
    assert {checkpoint.load_spec(saved) for _ in range(3)} == {spec()}
    checkpoint.load_run_record(saved)["dice"]["Gland"] = 0.0  # whoever has it may do what he likes
    assert checkpoint.load_run_record(saved) == LINEAGE
    assert len(parsed) == 1
    _edit(lineage={"run": "another"})(saved)
    assert checkpoint.load_run_record(saved) == {"run": "another"} and checkpoint.load_spec(saved) == spec()


def test_the_digest_is_that_of_the_content(saved: Path, tmp_path: Path) -> None:
    first = checkpoint.digest(saved)
    assert len(first) == 64
    assert checkpoint.digest(shutil.copytree(saved, tmp_path / "copy")) == first
    checkpoint.save(tmp_path / "again", spec(), network(spec()), LINEAGE)
    assert checkpoint.digest(tmp_path / "again") == first
    checkpoint.save(tmp_path / "weights", spec(), network(spec(), seed=1), LINEAGE)
    checkpoint.save(tmp_path / "spec", spec(mpp=0.5), network(spec()), LINEAGE)
    assert len({first, *(checkpoint.digest(tmp_path / name) for name in ("weights", "spec"))}) == 3


def test_the_digest_does_not_depend_on_who_made_the_model(saved: Path, tmp_path: Path) -> None:
    for maker in ("one", "another"):
        checkpoint.save(tmp_path / maker, spec(), network(spec()), LINEAGE, {"machine": maker})
        assert checkpoint.load_ancestry(tmp_path / maker) == {"machine": maker}
        assert checkpoint.digest(tmp_path / maker) == checkpoint.digest(saved)


def test_saving_again_replaces_all_of_it(saved: Path) -> None:
    checkpoint.save(saved, spec(mpp=2.0), network(spec(), seed=1))
    assert checkpoint.load_spec(saved).mpp == 2.0 and checkpoint.load_run_record(saved) == {}
    assert sorted(item.name for item in saved.parent.iterdir()) == ["model"]


class Unsaveable(torch.nn.Module):
    """Fails in the middle of a save."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space left on device")


def test_a_save_that_fails_leaves_the_earlier_model(saved: Path) -> None:
    before = checkpoint.digest(saved)
    with pytest.raises(OSError, match="no space") as caught:
        checkpoint.save(saved, spec(), Unsaveable())
    assert caught.value.filename == str(saved) and list(saved.parent.iterdir()) == [saved]
    assert checkpoint.digest(saved) == before
    checkpoint.save(saved, spec(mpp=2.0), network(spec()))
    assert checkpoint.load_spec(saved).mpp == 2.0 and len(list(saved.parent.iterdir())) == 1


def test_a_save_that_was_cut_between_its_renames_loses_nothing(saved: Path) -> None:
    before = checkpoint.digest(saved)
    saved.rename(saved.with_name("model.old.partial"))
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(saved, spec(), Unsaveable())
    assert checkpoint.digest(saved) == before


def test_an_earlier_model_that_is_kept_is_put_back_or_let_go(saved: Path) -> None:
    before = checkpoint.digest(saved)
    for end in (checkpoint.put_back, checkpoint.let_go):
        checkpoint.save(saved, spec(), network(spec()), keep_earlier=True)
        after = checkpoint.digest(saved)
        assert after != before
        checkpoint.recover(saved)  # nothing is to be recovered: the new one is whole
        assert checkpoint.digest(saved) == after
        for _ in range(2):  # for which nothing waits any more
            end(saved)
        assert checkpoint.digest(saved) == (before if end is checkpoint.put_back else after)
        assert [item.name for item in saved.parent.iterdir()] == [saved.name]


def test_a_folder_with_other_things_is_not_overwritten(saved: Path) -> None:
    notes = saved / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(CheckpointError, match="other files"):
        checkpoint.save(saved, spec(), network(spec()))
    with pytest.raises(CheckpointError, match="other files"):
        checkpoint.save(notes, spec(), network(spec()))
    assert notes.read_text() == "mine"


def _edit(**changes: Any) -> Callable[[Path], None]:
    """Changes model.yaml as somebody would who wants it believed."""

    def edit(folder: Path) -> None:
        content = yaml.safe_load((folder / "model.yaml").read_text())
        for key, value in changes.items():
            (content["spec"] if key in content["spec"] else content)[key] = value
        content["spec_sha256"] = hashlib.sha256(
            json.dumps(content["spec"], sort_keys=True, default=str).encode()
        ).hexdigest()
        (folder / "model.yaml").write_text(yaml.safe_dump(content))

    return edit


def _untold_edit(folder: Path) -> None:
    text = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(text.replace("mpp: ", "mpp: 1"))


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "weights.safetensors")
        change(weights)
        save_file(weights, folder / "weights.safetensors")

    return edit


def _swap(name: str) -> Callable[[Path], None]:
    """Puts in a file of a model that is twice as wide."""

    def swap(folder: Path) -> None:
        other = folder.with_name("wide")
        checkpoint.save(other, spec(width=8), network(spec(width=8)))
        (other / name).replace(folder / name)

    return swap


def _graph(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the graph, and model.yaml as somebody would who wants it believed."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / "network.json").read_text())
        change(content)
        text = json.dumps(content)
        (folder / "network.json").write_text(text)
        _edit(network=hashlib.sha256(text.encode()).hexdigest())(folder)

    return edit


def _of_folds(folder: Path) -> None:
    (folder / "fold-1").mkdir()
    shutil.copytree(folder, folder / "fold-1" / "model", ignore=lambda *_: ["fold-1"])
    (folder / "model.yaml").unlink()


def _cut(folder: Path) -> None:
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (shutil.rmtree, "no such folder"),
        (_of_folds, "Give .*/fold-1/model"),
        (lambda folder: (folder / "model.yaml").unlink(), "no model.yaml"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "no weights.safetensors"),
        (lambda folder: (folder / "weights.safetensors").rename(folder / "weights.pth"), "the pickle weights.pth"),
        (lambda folder: (folder / "model.yaml").write_text("spec: ["), "broken YAML"),
        (lambda folder: (folder / "model.yaml").write_bytes(b"\xff\xfe\x00"), "broken YAML"),
        (lambda folder: (folder / "model.yaml").write_text("fullfield: 2026-13-45"), "broken YAML"),
        (lambda folder: (folder / "model.yaml").write_text("- spec"), "found a list"),
        (lambda folder: (folder / "model.yaml").write_text("!!python/object/apply:os.getcwd []"), "broken YAML"),
        (
            _edit(note="x"),
            "the keys fullfield, lineage, network, note, spec, spec_sha256, weights_sha256; "
            "expected the keys fullfield and spec, perhaps spec_sha256, network, weights_sha256, lineage",
        ),
        (_untold_edit, r"a spec of SHA-256 \w+: it was changed"),
        (_weights(lambda weights: weights["head.conv.bias"].add_(1)), "SHA-256 .*; expected the file of SHA-256"),
        (_edit(lineage=[1]), "the lineage"),
        (_edit(mpp=-1), "`mpp`"),
        (_edit(mean=[10**400, 1, 1]), "`mean`"),
        (_edit(rest=7), "`rest`: found 7; expected null, or the index of a class, 0 to 1"),
        (_edit(rest=date(2020, 1, 1)), "`rest`"),
        (_edit(architecture="vgg"), "written by Fullfield 0"),
        (_edit(spec={"mpp": 1.0}), "no key `architecture`"),
        (_swap("weights.safetensors"), "body.encode.0.conv.weight of 8x3x3x3 float32 for 4x3x3x3 float32; .* more"),
        (_swap("network.json"), "SHA-256 .*; expected the file of SHA-256"),
        (_swap("model.yaml"), "SHA-256 .*; expected the file of SHA-256"),
        (lambda folder: (folder / "network.json").unlink(), "network.json: found no such file"),
        (lambda folder: (folder / "network.json").write_bytes(b"\xff"), "network.json: found SHA-256"),
        (_edit(network=[3]), "expected the file"),
        (_graph(lambda graph: graph["nodes"].append("x")), "the node x"),
        (_graph(lambda graph: graph["nodes"][0].update(op="exec")), "not named after its operation"),
        (_graph(lambda graph: graph.update(output="conv2d")), r"an answer of \(1, 4, 16, 24\)"),
        (_graph(lambda graph: graph["nodes"][0]["settings"].update(groups=2)), "a graph that does not run"),
        (_edit(classes=[{"name": "One", "color": [1, 2, 3]}]), r"an answer of \(1, 2, 16, 24\)"),
        (_weights(lambda weights: weights.pop("head.conv.weight")), "found no head.conv.weight;"),
        (_weights(lambda weights: weights.update(extra=torch.zeros(2))), "found unknown extra;"),
        (_weights(lambda weights: weights.update({"head.conv.bias": torch.zeros(3)})), "head.conv.bias of 3 float32 for 2"),
        (
            _weights(lambda weights: weights.update({"head.conv.bias": torch.zeros(2).half()})),
            "head.conv.bias of 2 float16 for 2 float32",
        ),
        (_weights(dict.clear), "no body.encode.0.conv.weight; .* more"),
        (_cut, "a broken file"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b""), "a broken file"),
    ],
)
def test_a_damaged_model_is_refused(saved: Path, damage: Callable[[Path], None], word: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=word) as caught:
        checkpoint.load(saved)
    assert str(saved) in caught.value.subject and caught.value.remedy


@pytest.mark.parametrize("name", ["weights.safetensors", "network.json"])
def test_a_model_with_a_damaged_file_has_no_digest(saved: Path, name: str) -> None:
    """By it models are registered, and outputs told apart: what is damaged is not another model."""
    whole, expected = (saved / name).read_bytes(), checkpoint.digest(saved)
    for content in (whole[: len(whole) // 2], b""):
        (saved / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="SHA-256 .*; expected the file of SHA-256") as caught:
            checkpoint.digest(saved)
        assert caught.value.subject == str(saved / name)
    (saved / name).write_bytes(whole)
    assert checkpoint.digest(saved) == expected


def test_a_pickle_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(network(spec()).state_dict(), path)
    for read in (checkpoint.load, checkpoint.load_spec, checkpoint.load_run_record, checkpoint.digest):
        with pytest.raises(CheckpointError, match="found a pickle; .* none is loaded"):
            read(path)
    with pytest.raises(CheckpointError, match="found a pickle; .* none is loaded"):
        resolve_model(str(path))


def test_of_a_file_of_a_model_the_folder_is_named(saved: Path, tmp_path: Path) -> None:
    for name in ("model.yaml", "weights.safetensors", "network.json"):
        with pytest.raises(CheckpointError, match=f"{name}: found a file; .* Give {saved}[.]$"):
            resolve_model(str(saved / name))
    (tmp_path / "other").touch()
    with pytest.raises(CheckpointError, match=r"other: found a file; .* such as OUTPUT/model[.]$"):
        resolve_model(str(tmp_path / "other"))


def test_a_spec_and_a_digest_need_no_torch(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline import checkpoint; folder = Path(sys.argv[1]);"
        "print(checkpoint.load_spec(folder).mpp, checkpoint.digest(folder), checkpoint.load_run_record(folder)['epoch']);"
        "sys.exit(bool({'torch', 'monai', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.4942", checkpoint.digest(saved), "7"]


def test_segmenting_needs_not_the_library_that_built_the_network(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import numpy as np; from pipeline import checkpoint;"
        "from pipeline.engine import TorchEngine; engine = TorchEngine(*checkpoint.load(Path(sys.argv[1])));"
        "print(*engine(np.full((1, 32, 64, 3), 200, np.uint8)).shape);"
        "print(sorted({'monai', 'mlflow', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 2 32 64", "[]"]
