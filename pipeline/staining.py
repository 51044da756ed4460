"""How one slide is stained, and the stain that slides are given for a model. Importing this module does not import numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

Rgb = tuple[float, float, float]
"""Red, green and blue."""

METHODS = ("macenko", "reinhard")
"""Ways to tell the dyes of a slide; see stains.py."""


@dataclass(frozen=True)
class Staining:
    """How a slide is stained: its `light`, in grey levels, and its `dyes`, in optical density where they are strong.

    Where the dyes could not be told there are none, and `problem` says why.
    """

    light: Rgb
    dyes: tuple[Rgb, ...]
    problem: str = ""

    def to_dict(self) -> dict[str, object]:
        """As plain values that JSON can hold."""
        return {**asdict(self), "light": list(self.light), "dyes": [list(dye) for dye in self.dyes]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Staining:
        """The staining that `to_dict` wrote."""
        return cls(tuple(values["light"]), tuple(map(tuple, values["dyes"])), values["problem"])


@dataclass(frozen=True)
class Normalisation:
    """How slides are made alike before a model sees them: by one of METHODS, and to which dyes.

    An ensemble's members may each have dyes of their own; those after the first are the `others`.
    """

    method: str
    dyes: tuple[Rgb, ...]
    others: tuple[Normalisation, ...] = ()

    @property
    def each(self) -> tuple[Normalisation, ...]:
        """What every member sees by itself; of a single model, the normalisation itself."""
        return replace(self, others=()), *self.others
