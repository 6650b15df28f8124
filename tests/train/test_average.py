"""The moving average of the weights."""

import torch
from torch import nn

from fpsc.train.average import Average


def test_it_is_the_average_and_comes_and_goes() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    average = Average({"a": parameter}, 0.9)
    expected = torch.zeros(3)
    for step in range(1, 200):
        parameter.data.fill_(float(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        average.update(step)
    torch.testing.assert_close(average.tensors["a"], expected, rtol=1e-5, atol=0)
    with average.applied():
        torch.testing.assert_close(parameter.data, expected, rtol=1e-5, atol=0)
    assert parameter.data.tolist() == [199, 199, 199]
    torch.testing.assert_close(average.tensors["a"], expected, rtol=1e-5, atol=0)


def test_without_decay_it_is_the_weights() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    average = Average({"a": parameter}, 0.0)
    parameter.data.fill_(2.0)
    average.update(1)
    with average.applied():
        assert parameter.data.tolist() == [2, 2, 2]
    assert not average.tensors
