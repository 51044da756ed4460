"""Work ahead: order, bounds and errors."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.ahead import ahead


def test_results_come_in_the_order_of_their_items_however_long_each_takes() -> None:
    def slow_if_even(number: int) -> int:
        time.sleep(0.02 if number % 2 == 0 else 0)
        return number * number

    assert list(ahead(slow_if_even, range(12), depth=5, threads=3)) == [(n, n * n) for n in range(12)]


def test_no_more_items_are_drawn_than_may_wait() -> None:
    drawn, used = 0, 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for number in range(20):
            drawn += 1
            yield number

    for _ in ahead(lambda number: number, items(), depth=3):
        used += 1
        assert drawn - used < 3
    assert used == 20


def test_one_is_computed_while_another_is_used() -> None:
    began = threading.Event()
    results = ahead(lambda number: began.set() if number == 1 else None, range(2))
    next(results)
    assert began.wait(5)
    results.close()


def test_an_error_is_raised_in_the_turn_of_its_item() -> None:
    def fails_at_two(number: int) -> int:
        if number == 2:
            raise RuntimeError("two")
        return number

    results = ahead(fails_at_two, range(5), depth=4)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(RuntimeError, match="two"):
        next(results)
