"""The distance between distributions: its formula, that it is without bias, its error."""

import pytest
import torch

from fpsc.evaluate.distance import kernel_distance


def by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    """The sum over pairs, term by term."""

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / len(a) + 1) ** 3)

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    terms = (k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs)
    return sum(terms) / len(pairs)


def test_it_is_the_sum_over_pairs() -> None:
    x, y = torch.randn(7, 5), torch.randn(7, 5) + 0.3
    assert kernel_distance(x, y).value == pytest.approx(by_hand(x, y), rel=1e-9)


def test_equal_sets_have_none() -> None:
    x = torch.randn(9, 4)
    found = kernel_distance(x, x)
    assert found.value == pytest.approx(0, abs=1e-12) and found.error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_without_bias_also_where_the_rows_depend_on_each_other(alike: float) -> None:
    """Over many draws from one distribution the mean is zero, within three of its own errors."""
    values = []
    for _ in range(400):
        x = torch.randn(12, 3)
        y = alike * x + (1 - alike**2) ** 0.5 * torch.randn(12, 3)
        values.append(kernel_distance(x, y).value)
    found = torch.tensor(values)
    assert abs(found.mean()) < 3 * found.std() / 20
    assert found.min() < 0 < found.max()


def test_the_error_is_how_much_it_varies() -> None:
    found = [kernel_distance(torch.randn(40, 8), torch.randn(40, 8) + 0.6) for _ in range(200)]
    spread = torch.tensor([each.value for each in found]).std().item()
    told = sum(each.error for each in found) / len(found)
    assert 0.7 * spread < told < 1.4 * spread


def test_it_grows_with_the_difference() -> None:
    x, y = torch.randn(60, 8), torch.randn(60, 8)
    values = [kernel_distance(x, y + shift).value for shift in (0.0, 0.3, 0.6, 1.2)]
    assert values == sorted(values) and values[-1] > 10 * abs(values[0])


@pytest.mark.parametrize(("x", "y"), [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((2, 3), (2, 3))])
def test_sets_that_do_not_fit(x: tuple[int, int], y: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected two sets.*\(\d, \d\) and"):
        kernel_distance(torch.zeros(x), torch.zeros(y))
