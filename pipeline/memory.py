"""Want of memory, for processors or on a GPU: how it is known and told; and how what is held of a GPU is given back."""

from __future__ import annotations

import gc
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import EngineError, TrainingError

_WANT = re.compile("can't allocate memory|out of memory|_ALLOC(ATION)?_FAILED")
"""Words of torch and of CUDA's libraries, often all that tells: on a GPU that others fill, whoever asks first fails."""


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(_WANT.search(str(error)))


@contextmanager
def memory_sufficing(work: str) -> Iterator[None]:
    """Raise TrainingError, which says what to lower, where memory runs out in a block that does such `work`."""
    try:
        yield
    except (MemoryError, RuntimeError, EngineError) as error:
        cause = error.__cause__ if isinstance(error, EngineError) else error  # an engine's says what a segmentation lowers
        if not lacks_memory(cause):
            raise
        found = f"no memory for {work} ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__})"
        remedy = "Lower training.batch_size, tiles.patch_size or network.width."
        raise TrainingError("training", found, "patches and a network that fit into memory", remedy) from error


@contextmanager
def gpu_given_back() -> Iterator[None]:
    """Give what a block held of a GPU back to it as the block ends, for other processes: torch would keep it for itself."""
    try:
        yield
    except BaseException as error:
        if cuda():
            _forget_variables(error)
        raise
    finally:
        if gpu := cuda():
            gc.collect()
            gpu.empty_cache()


def cuda() -> Any:
    """torch.cuda in a process that computes with it, else None; nobody imports torch to know that."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _forget_variables(error: BaseException | None) -> None:
    """Those of all functions that an error, and those behind it, came through; whoever keeps the error would keep them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
