"""How far apart two distributions are, from samples of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


def kernel_distance(x_ND: Tensor, y_ND: Tensor) -> Estimate:
    """Squared maximum mean discrepancy of two distributions of features, without bias.

    The kernel is the polynomial one of the kernel inception distance, k(x, y) = (x . y / D + 1)^3
    (Binkowski et al. 2018, "Demystifying MMD GANs", arXiv 1801.01401, section 4.2). Row i of both
    belongs together: the same prompt. The estimate is the U-statistic of the pairs z = (x, y)

        1 / (n (n - 1)) sum over i != j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    (Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13, equation 4), which stays without bias
    where x_i and y_i depend on each other. It is about zero, and may be negative, where the
    distributions are equal. The error is the jackknife's, from the estimates that leave one pair
    out (Efron and Stein 1981, "The Jackknife Estimate of Variance").

    Raises:
        ValueError: the sets differ in shape, or have fewer than three rows.
    """
    if x_ND.shape != y_ND.shape or x_ND.ndim != 2 or len(x_ND) < 3:
        raise ValueError(
            "expected two sets of features [N, D] of one shape with N of 3 or more, found "
            f"{tuple(x_ND.shape)} and {tuple(y_ND.shape)}"
        )
    x, y = x_ND.double(), y_ND.double()
    cross = _kernel(x, y)
    h_NN = _kernel(x, x) + _kernel(y, y) - cross - cross.T
    h_NN.fill_diagonal_(0)
    n, rows, total = len(x), h_NN.sum(1), h_NN.sum()
    without_N = (total - 2 * rows) / ((n - 1) * (n - 2))
    variance = (n - 1) / n * (without_N - without_N.mean()).square().sum()
    return Estimate((total / (n * (n - 1))).item(), math.sqrt(variance.item()))


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3
