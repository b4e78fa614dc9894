"""Metrics over several sets of predictions, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from abft.evaluation.metrics import (
    calibrate,
    consistency,
    distribution_bias,
    gler,
    mean_and_error,
    paired_bootstrap,
    posterior_bias,
)


def test_consistency():
    # Query by query: 3 of 3, 2 of 3, 1 of 3.
    predictions = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 2, 2]])
    assert consistency(predictions) == pytest.approx((1 + 2 / 3 + 1 / 3) / 3)
    assert consistency(predictions[:1]) == 1
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        consistency(predictions[:0])


def test_bias():
    uniform = distribution_bias(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    assert uniform["distribution"] == pytest.approx([0.5, 0.5])
    assert uniform["entropy"] == pytest.approx(math.log(2))
    assert distribution_bias(torch.tensor([[1.0, 0.0]]))["entropy"] == 0

    probabilities = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    found = posterior_bias(probabilities, torch.tensor([0, 0]))
    assert found["difference"] == pytest.approx([-0.4, 0.4])
    assert found["kl"] is None  # infinite
    found = posterior_bias(probabilities, torch.tensor([0, 1]))
    assert found["kl"] == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))
    sure = posterior_bias(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert sure["kl"] == 0


def test_gler_is_a_slope_over_equal_steps():
    assert gler([1, 0.75, 0.5, 0.25, 0], [0.9, 0.8, 0.7, 0.6, 0.5]) == pytest.approx(0.4)
    assert gler([1, 0], [0.5, 0.5]) == 0
    with pytest.raises(ValueError, match="two different shares"):
        gler([1, 1], [0.5, 0.6])


def test_calibration_undoes_a_constant_bias():
    generator = torch.Generator().manual_seed(0)
    fair = torch.rand(50, 3, generator=generator, dtype=torch.float64).softmax(1)
    bias = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    biased = fair * bias / (fair * bias).sum(1, keepdim=True)
    torch.testing.assert_close(calibrate(biased, bias), fair)
    assert calibrate(fair, torch.tensor([1.0, 0.0, 0.0])).isfinite().all()


def test_paired_comparison():
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.5).astype(float)
    better = np.maximum(before, rng.random(400) < 0.2)
    found = paired_bootstrap(before, better)
    assert found.difference == pytest.approx((better - before).mean())
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.01
    # Pairing matters: a model that differs in few prompts has a narrow interval.
    apart = paired_bootstrap(before, rng.permutation(better))
    assert apart.high - apart.low > 1.5 * (found.high - found.low)
    assert paired_bootstrap(before, better) == found
    noise = paired_bootstrap(before, (rng.random(400) < 0.5).astype(float))
    assert noise.p_value > 0.01
    same = paired_bootstrap(before, before)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="400 and 3"):
        paired_bootstrap(before, before[:3])


def test_interval_covers_as_often_as_it_says():
    """The 95 % interval holds the known difference in about 95 % of 120 samples."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(120):
        before, after = (rng.random(150) < 0.5).astype(float), (rng.random(150) < 0.6).astype(float)
        found = paired_bootstrap(before, after, resamples=400)
        inside += found.low <= 0.1 <= found.high
    assert 105 <= inside <= 120


def test_error_of_the_mean():
    assert mean_and_error([0.5]) == (0.5, None)
    mean, error = mean_and_error([0.4, 0.6])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.1)
