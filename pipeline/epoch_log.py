"""The figures of epochs, on their way into MLflow: a store that does not take them for a while ends no training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import TrackingError
from pipeline.progress import console
from pipeline.snapshot import Record
from pipeline.tracking import Run

_PAUSE_SECONDS = 600.0  # MLflow itself tries for minutes, in which nobody hears of other epochs


class EpochLog:
    """Logs the epochs of trainings, each into its run; what a store does not take waits for a later epoch, or for the end.

    That is told once. Trainings go by any path of their own. Raises TrackingError where a store does not tell which epochs
    it has already.
    """

    def __init__(self, runs: Mapping[Path, Run]) -> None:
        self._runs = runs
        self._seen = {training: run.steps("loss") for training, run in runs.items()}
        self._waiting = deque[tuple[Path, Record]]()
        self._refused: float | None = None  # when it was that the store last took nothing

    def add(self, training: Path, record: Record) -> bool:
        """Log an epoch of a training; returns False, and does nothing, where it has been told of before."""
        if record.epoch in self._seen[training]:
            return False
        self._seen[training].add(record.epoch)
        self._waiting.append((training, record))
        if self._refused is None or time.monotonic() - self._refused >= _PAUSE_SECONDS:
            try:
                self.finish()
            except TrackingError as error:
                if self._refused is None:
                    console.print(f"Training goes on, and its figures are logged later: {error}")
                self._refused = time.monotonic()
        return True

    def finish(self) -> None:
        """Log all that waits. Raises TrackingError."""
        while self._waiting:
            training, record = self._waiting[0]
            self._runs[training].log_metrics(record.metrics, step=record.epoch)
            self._waiting.popleft()
        self._refused = None
