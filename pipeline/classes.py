"""What a pixel can be: an ordered list of named, coloured classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

IGNORED = 255
"""Value of a pixel of which nothing is known (truth) or that was not examined (prediction)."""


@dataclass(frozen=True)
class Class:
    """One class: its name and its colour as (red, green, blue), 0 to 255."""

    name: str
    color: tuple[int, int, int]

    @classmethod
    def of_hex(cls, name: str, color: str) -> Class:
        """The class of a name and a colour as `#rrggbb`. Raises ValueError for any other text."""
        red, green, blue = bytes.fromhex(color.removeprefix("#"))
        return cls(name, (red, green, blue))

    @property
    def hex_color(self) -> str:
        """The colour as `#rrggbb`."""
        return "#{:02x}{:02x}{:02x}".format(*self.color)


@dataclass(frozen=True)
class Classes:
    """The classes of a model, in the order of their indices (0, 1, ...); at most 255."""

    items: tuple[Class, ...]

    def __post_init__(self) -> None:
        names = [item.name for item in self.items]
        if len(set(names)) != len(names) or not 1 <= len(names) <= IGNORED:
            raise ValueError(f"expected 1 to {IGNORED} classes with different names, found {names}")

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Class]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Class:
        return self.items[index]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the indices."""
        return tuple(item.name for item in self.items)

    def index(self, name: str) -> int:
        """The index of the class called `name`. Raises ValueError where there is none."""
        return self.names.index(name)
