"""A training under way, on disk: all that it takes to go on after a kill as if there had been none.

    OUTPUT/training.safetensors     the trainer's tensors; in its header, as JSON, what they depend on and how far they are

It is one file, and replaced as a whole: whenever a process is killed, there is the state after one epoch or after the one
before it, and never a mixture. No pickle is read. Reading the header alone does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pipeline.errors import TrainingError
from pipeline.files import replacing
from pipeline.staining import Normalisation

if TYPE_CHECKING:
    import torch

_KEY = "fullfield.training"
_LENGTH = 8  # bytes that tell the length of the header, with which a file of safetensors begins
_SHOWN = 4  # differences that are named


@dataclass(frozen=True)
class Record:
    """What an epoch achieved, and how many are `planned`; `best` says that its network was kept.

    `unread` names the slides of which something could not be read, and was passed over, up to then. `remark` is what to tell
    of the validation, and `missed` names the slides that this one could not read.
    """

    epoch: int
    metrics: Mapping[str, float]
    best: bool
    planned: int
    unread: Sequence[str] = ()
    remark: str = ""
    missed: Sequence[str] = ()


@dataclass(frozen=True)
class Standing:
    """How far a training is: what it depends on, by name; its epochs so far; and the seconds that they took.

    All of them see slides in the stain of the `normalisation`, where there is one.
    """

    inputs: Mapping[str, str]
    records: tuple[Record, ...]
    seconds: float
    normalisation: Normalisation | None = None

    def is_best(self, metrics: Mapping[str, float], missed: Sequence[str]) -> bool:
        """Whether an epoch with these metrics, whose validation `missed` these slides, did better than all before it.

        One without a Dice, or with one over fewer slides than another epoch saw, did so only where none before has any.
        """
        scored = [record for record in self.records if "dice" in record.metrics]
        if "dice" not in metrics or any(not set(missed) <= set(record.missed) for record in self.records):
            return not scored
        return all(metrics["dice"] > record.metrics["dice"] for record in scored if set(record.missed) == set(missed))

    def after(self, record: Record, seconds: float) -> Standing:
        """The standing after one more epoch, so many seconds after the start."""
        return replace(self, records=(*self.records, record), seconds=seconds)

    def changes(self, inputs: Mapping[str, str]) -> str:
        """Which of its inputs differ from these, in words; empty where none does."""
        names = [name for name in {**self.inputs, **inputs} if self.inputs.get(name) != inputs.get(name)]
        told = [f"{name} was {shorten(self.inputs.get(name, 'not there'), 60)}" for name in names[:_SHOWN]]
        return ", ".join(told) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def of_another(path: Path, changed: str) -> TrainingError:
    """The error where an interrupted training had other inputs than the one asked for; `changed` lists them in words."""
    remedy = f"Call with the same again to go on with it; to begin anew, delete {path} and model.partial beside it."
    return TrainingError(
        str(path), f"an interrupted training of another, {changed}", "one of this cohort and configuration", remedy
    )


def beside(model: Path) -> Path:
    """Where the state of a training lies, given the folder of its unfinished model."""
    return model.with_name("training.safetensors")


def save(path: Path, standing: Standing, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a training's state over the one before it, whole or not at all."""
    from safetensors.torch import save

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        partial.write_bytes(save(flat, {_KEY: json.dumps(asdict(standing))}))  # its save_file leaves files when it is killed


def read_standing(path: Path) -> Standing | None:
    """How far the training is whose state lies at `path`; None where there is none. Raises TrainingError."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with _whole(path), safe_open(path, "numpy") as file:
        return _standing(file.metadata())


def load(path: Path) -> tuple[Standing, dict[str, torch.Tensor]]:
    """How far the training is, and the trainer's tensors, on the CPU: of one epoch, whoever writes the next meanwhile.

    Raises TrainingError.
    """
    from safetensors.torch import load as tensors_of

    with _whole(path):
        content = path.read_bytes()  # at once: safe_open would look the file up again by its name for torch
        header = json.loads(content[_LENGTH : _LENGTH + int.from_bytes(content[:_LENGTH], "little")])
        return _standing(header["__metadata__"]), tensors_of(content)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Raise TrainingError where a state is broken that is read in the block."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise broken(path, error) from error


def _standing(metadata: Mapping[str, str]) -> Standing:
    content = json.loads(metadata[_KEY])
    records, stain = tuple(map(_record, content["records"])), content.get("normalisation")
    normalisation = stain and Normalisation(stain["method"], tuple(map(tuple, stain["dyes"])))
    return Standing(content["inputs"], records, content["seconds"], normalisation)


def _record(content: Mapping[str, Any]) -> Record:
    return Record(**{**content, **{key: tuple(content.get(key, ())) for key in ("unread", "missed")}})


def broken(path: Path, error: Exception) -> TrainingError:
    """The error that says that a state cannot be gone on from."""
    remedy = "Delete it, and the training begins anew."
    return TrainingError(str(path), f"what no training can go on from ({error})", "the state of this training", remedy)
