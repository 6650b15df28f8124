"""How numbers look."""

import math
from collections.abc import Callable

import pytest

from fpsc.pages import numbers


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (numbers.seconds, 1.0, "1.00 s"),
        (numbers.seconds, 0.0412341, "41.2 ms"),
        (numbers.seconds, 2.5e-6, "2.50 µs"),
        (numbers.seconds, 0.99951, "1,000 ms"),
        (numbers.seconds, 4321.0, "4,321 s"),
        (numbers.seconds, 0.0, "0 s"),
        (numbers.size, 3 * 2**30, "3.00 GiB"),
        (numbers.size, 1536, "1.50 KiB"),
        (numbers.size, 12, "12 B"),
        (numbers.times, 2.346, "2.35×"),
        (numbers.times, 99.996, "100×"),
        (numbers.error, 0.0, "0"),
        (numbers.error, 0.01234, "1.2e-02"),
        (numbers.error, 0.151, "0.15"),
        (numbers.error, 1.83, "1.8"),
        (numbers.percent, 0.0771, "7.7%"),
        (numbers.percent, 0.6, "60%"),
        (numbers.percent, 0.0, "0%"),
        (numbers.plain, 12345.6, "12,346"),
        (numbers.plain, 1.5e-10, "1.5e-10"),
        (numbers.whole, 20280, "20,280"),
        (numbers.decibel, 31.416, "31.42 dB"),
        (numbers.decibel, math.inf, "∞ dB"),
    ],
)
def test_numbers_as_people_read_them(show: Callable[[float], str], value: float, text: str) -> None:
    assert show(value) == text


def test_quartiles_share_the_unit_of_their_median() -> None:
    assert numbers.seconds(0.998, like=1.0) == "0.998 s"
