import json
import os
from pathlib import Path

import pytest
import yaml

from pipeline.cohort import read_manifest
from pipeline.config import Config
from pipeline.config_file import load_config, parse_config
from pipeline.errors import CohortError, ConfigError
from pipeline.settings import Section
from pipeline.yaml_text import load

CONFIGS = sorted((Path(__file__).parents[1] / "workflows" / "configs").glob("*.yaml"))
EXAMPLE = next(path for path in CONFIGS if path.stem == "example")


def minimal() -> dict[str, object]:
    return {
        "output": "out",
        "cohort": {"manifest": "cohort.csv"},
        "classes": [{"name": "Other", "color": "#ffffff"}, {"name": "Gland", "color": "#008000"}],
        "network": {"mpp": 1.0},
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    assert load_config(path).class_list.names


def keys(section: type[Section]) -> dict[str, object]:
    nested = {}
    for name, item in section.model_fields.items():
        inner = item.annotation
        nested[name] = keys(inner) if isinstance(inner, type) and issubclass(inner, Section) else None
    return nested


def test_the_example_names_every_key_and_its_default() -> None:
    def check(content: dict, section: type[Section], default: object, place: str) -> None:
        assert set(content) == set(section.model_fields), place
        for name, inner in keys(section).items():
            if inner:
                check(content[name], section.model_fields[name].annotation, getattr(default, name), f"{place}.{name}")
            elif name not in ("output", "manifest", "classes", "mpp", "rest"):
                assert json.loads(json.dumps(content[name])) == default.model_dump(mode="json")[name], f"{place}.{name}"

    check(yaml.safe_load(EXAMPLE.read_text()), Config, parse_config(minimal(), "minimal"), "")


def test_a_config_reads_back_what_it_writes(tmp_path: Path) -> None:
    config = load_config(EXAMPLE, ["training.epochs=7", "network.encoder=null"])
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "copy.yaml") == config


def test_overrides_reach_any_key() -> None:
    overrides = ["training.learning_rate=1e-3", "classes.1.name=Tumour", "annotations.known=[Region*]", "cluster.workers=0"]
    config = parse_config(minimal(), "test", overrides)
    assert config.training.learning_rate == 0.001
    assert config.classes[1].name == "Tumour"
    assert config.annotations.known == ("Region*",)
    assert config.cluster.workers == 0


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.epoch=3", "unknown key `training.epoch`"),
        ("training.epochs=three", "`training.epochs`"),
        ("training.epochs='3'", "`training.epochs`"),
        ("training.epochs=2.5", "`training.epochs`"),
        ("training.epochs=true", "`training.epochs`"),
        ("network.mpp=.nan", "`network.mpp`"),
        ("network.mpp=400", "`network.mpp`"),
        ("network.architecture=vgg", "`network.architecture`"),
        ("annotations.rest=Fat", "annotations.rest"),
        ("training.class_weights={Fat: 2.0}", "training.class_weights"),
        ("classes.1.name=Other", "class names should differ"),
        ("cohort.fractions.train=0.9", "sum to 1"),
        ("classes.5.name=Fat", "no such place"),
        ("classes.0.annotations=[Gland]", "annotation 'Gland'"),
        ("classes.1.name=tissue", "columns of the table"),
        ("tracking.alias=latest", "MLflow keeps to itself"),
        ("tracking.alias=V2", "MLflow keeps to itself"),
        ("annotations.known=[Gland]", "annotations.known should name no outline that stands for a class"),
        ("annotations.ignored=[Blood, Gland]", "annotations.ignored should name no outline that stands for a class"),
        ("training.class_weights={2024-01-01: 2}", "no plain words as keys"),
        ('output="a\\0b"', "which is no text"),
        ("segmentation.splits=[]", "`segmentation.splits`: should have at least 1 item, not [];"),
        ("classes=null", "`classes`: should be a list, such as [a, b], not null;"),
        ("training=[1]", "`training`: should be keys and values, not [1];"),
        ("=3", "found nothing before `=`"),
        ("network.norm=instance", "segmentation.blend should be true"),
        ("network.norm=group", "`network.norm`"),
        ("cluster={workers: 2, scheduler: 'tcp://head:8786'}", "workers should be null where a scheduler is named"),
        ("engine={precision: fastest, backend: torch}", "torch computes in no int8"),
        ("training.warmup_epochs=61", "no more than epochs, 60"),
        ("output=~nobody-has-this-name/out", "should lead somewhere"),
        ("output=''", "`output`: should name a folder or a file"),
        ("seed", "no `=`"),
        ("seed=[", "broken YAML"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("[", r"\[")):
        parse_config(minimal(), "test", [override])


def test_an_override_at_fault_is_named_and_what_follows_from_it_is_not() -> None:
    with pytest.raises(ConfigError, match=r"^test with segmentation\.splits=\[vall\]: found (?!.*at least 1)"):
        parse_config(minimal(), "test", ["segmentation.splits=[vall]"])


def test_what_is_everything_else_has_no_lesions() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.lesions should not name Other"):
        parse_config(minimal(), "test", ["annotations.rest=Other", "evaluation.lesions=[Other]"])


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = parse_config(minimal(), "test", ["output=~/out", "cohort.manifest=~/cohort.csv"])
    assert (config.output, config.cohort.manifest) == (Path("/home/me/out"), Path("/home/me/cohort.csv"))


def test_batch_norm_needs_more_than_a_pixel() -> None:
    deep = ["network.depth=5", "tiles.patch_size=32", "training.batch_size=8"]
    with pytest.raises(ConfigError, match="batch norm needs more than one pixel"):
        parse_config(minimal(), "test", [*deep, "training.patches_per_epoch=17"])
    for enough in ("training.patches_per_epoch=18", "tiles.patch_size=64"):
        parse_config(minimal(), "test", [*deep, "training.patches_per_epoch=17", enough])


def test_a_network_that_is_not_local_is_taken_where_it_is_blended() -> None:
    config = parse_config(minimal(), "test", ["network.norm=instance", "segmentation.blend=true"])
    assert config.network.norm == "instance" and config.segmentation.blend


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="no `cohort`, which is required"):
        parse_config({key: value for key, value in minimal().items() if key != "cohort"}, "test")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "broken YAML"),
        ("a: " + "[" * 20_000, "broken YAML"),
        ("a: &x [*x]", "within themselves"),
        ("seed: 1\noutput: a\nseed: 2\n", r"key given twice: \['seed'\](.|\n)*line 3, column 1"),
        ("seed: 1\n1: 2\n1: 3\nseed: 2\n", "key given twice"),
        ("[1]: 1\n[1]: 2\n", "broken YAML"),
        ("output: 2024-31-12\n", "month must be in 1..12"),
        ("3", "found a single value; expected keys and values"),
        ("", "found nothing; expected keys and values"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_config(tmp_path / "broken.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: found no such file"):
        load_config(tmp_path / "none.yaml")


def test_what_is_no_file_is_told_as_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, found in ((tmp_path, "a folder"), (tmp_path / "pipe", "no ordinary file, but a pipe or a device")):
        for error, read in ((ConfigError, load_config), (CohortError, read_manifest)):
            with pytest.raises(error, match=f"{path}: found {found};"):
                read(path)


def test_the_digest_ignores_where_and_by_whom() -> None:
    config = parse_config(minimal(), "test")
    assert config.digest() == parse_config(minimal(), "test", ["output=elsewhere", "cluster.workers=3"]).digest()
    for same in ("tracking.alias=mine", "training.devices=2", "cohort.manifest=/copied/to/cohort.csv"):
        assert config.digest() == parse_config(minimal(), "test", [same]).digest(), same


def test_the_digest_depends_on_all_else() -> None:
    changes = {
        "seed": "1",
        "cohort": "{manifest: cohort.csv, fractions: {train: 1, val: 0, test: 0}}",
        "classes": "[{name: Other, color: '#fffffe'}, {name: Gland, color: '#008000'}]",
        "annotations": "{rest: Other}",
        "tissue": "{mpp: 4.0}",
        "normalisation": "{method: macenko}",
        "network": "{mpp: 2.0}",
        "tiles": "{min_tissue: 0.5}",
        "training": "{epochs: 3}",
        "segmentation": "{blend: true}",
        "engine": "{flips: true}",
        "evaluation": "{lesions: [Gland]}",
    }
    assert set(changes) == set(Config.model_fields) - {"output", "cluster", "tracking"}
    overrides = [[], *([f"{name}={value}"] for name, value in changes.items())]
    assert len({parse_config(minimal(), "test", override).digest() for override in overrides}) == len(overrides)


def test_words_that_look_like_numbers_come_back_as_words() -> None:
    config = parse_config({**minimal(), "tracking": {"experiment": "1e3", "model": "2e4"}}, "test")
    assert parse_config(load(config.to_yaml()), "test") == config


def test_keys_may_be_merged(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, y: 3}\n")
    assert load((tmp_path / "c.yaml").read_text())["b"] == {"x": 1, "y": 3}
