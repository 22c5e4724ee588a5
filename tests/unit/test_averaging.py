"""The running average of the weights: its closed form, and that applying it is undone."""

from __future__ import annotations

import pytest
import torch

from align.averaging import Average


def test_t20_closed_form_after_n_steps():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    average, decay, seen = Average({"w": parameter}, 0.9), 0.9, [parameter.detach().clone()]
    for _ in range(25):
        with torch.no_grad():
            parameter.add_(torch.randn(3, 4))
        seen.append(parameter.detach().clone())
        average.update()
    n = len(seen) - 1
    expected = decay**n * seen[0] + sum((1 - decay) * decay ** (n - i) * seen[i] for i in range(1, n + 1))
    torch.testing.assert_close(average.values["w"], expected, rtol=1e-5, atol=1e-6)


def test_what_is_left_of_the_base_after_300_steps_at_995():
    parameter = torch.nn.Parameter(torch.ones(()))
    average = Average({"w": parameter}, 0.995)
    with torch.no_grad():
        parameter.zero_()
    for _ in range(300):
        average.update()
    assert float(average.values["w"]) == pytest.approx(0.222, abs=5e-4)


def test_applied_is_undone_also_after_an_error():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = Average({"w": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(4.0)
    average.update()
    with pytest.raises(RuntimeError), average.applied():
        assert parameter.tolist() == [2.0, 2.0]
        raise RuntimeError
    assert parameter.tolist() == [4.0, 4.0]
