"""Work that goes on in threads while its results are used, in order, and never far ahead of them.

    items ----> f f f f          in threads, at most `depth` of them under way or waiting to be used
                 `-> r r r r     in the order of the items

What is done here (decoding, codecs, numpy, forward passes) lets other threads run meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], depth: int = 2, threads: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Each item with function(item). Items are drawn by the caller's thread; an error is raised in its item's turn."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        while True:
            for item in islice(remaining, depth - len(waiting)):
                waiting.append((item, pool.submit(function, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
