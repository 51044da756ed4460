"""What a person sees while work goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

console = Console(highlight=False, soft_wrap=True, markup=False)
_LINE_SECONDS = 10.0  # between plain lines
_FRAME = 3  # of a column of a table: a line, and a blank on either side


class Bar:
    """Counts what is done of a total, with a note such as a speed."""

    def __init__(self, title: str, total: int, live: Progress | None) -> None:
        self.title, self.total, self.done = title, total, 0
        self._live, self._started, self._printed, self._skipped = live, time.monotonic(), time.monotonic(), 0
        self._note = self._said = ""
        self._task = live.add_task(title, total=total, note="") if live else None

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more."""
        self.done, self._note = self.done + steps, note
        if self._live is not None and self._task is not None:
            self._live.update(self._task, advance=steps, note=note)
        elif steps and (time.monotonic() - self._printed > _LINE_SECONDS or self.done == self.total):
            self._say()

    def close(self) -> None:
        """Print the last note of a bar that is not live, if it has not been printed yet."""
        if self._note != self._said:
            self._say()

    def _say(self) -> None:
        self._printed, self._said = time.monotonic(), self._note
        console.print(f"{self.title}: {self.done}/{self.total}, {self._left()}{self._note and ', ' + self._note}")

    def skip(self, steps: int) -> None:
        """Count `steps` that were done before, which say nothing of the pace."""
        self.done += steps
        self._skipped += steps
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self.done)

    def grow(self, steps: int) -> None:
        """Add `steps` to the total."""
        self.total += steps
        if self._live is not None and self._task is not None:
            self._live.update(self._task, total=self.total)

    def _left(self) -> str:
        elapsed, done = time.monotonic() - self._started, self.done - self._skipped
        if self.done >= self.total or not done:
            return f"{elapsed:.0f} s"
        return f"about {elapsed / done * (self.total - self.done):.0f} s left"


def new_table(title: str, *columns: str) -> Table:
    """An empty table with a title over its left corner, in which nothing is cut off, however narrow it has to be."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title or None, title_justify="left")


def facts_table(facts: Mapping[str, str | None]) -> Table:
    """What is told of one thing, a line for each fact that there is."""
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=None)
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, value)
    return table


def show(table: Table) -> None:
    """Print a `new_table`; where it has to be narrow, its lines are broken between words, as long as that is enough."""
    texts = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    least = [max((cell_len(word) for text in column for word in text.split()), default=0) for column in texts]
    widths = [max((cell_len(line) for text in column for line in text.splitlines()), default=0) for column in texts]
    room = console.width - _FRAME * len(widths) - 1
    while sum(widths) > max(room, sum(least)):
        widest = max(range(len(widths)), key=lambda index: (widths[index] > least[index], widths[index]))
        widths[widest] -= 1
    if sum(widths) <= room:
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
    console.print(table)


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """A bar that is gone when the work is; where the output is no terminal, a line every ten seconds and at the end."""
    if not console.is_terminal:
        bar = Bar(title, total, None)
        yield bar
        bar.close()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as live:
        yield Bar(title, total, live)
