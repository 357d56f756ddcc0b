import itertools
import math
import sys

import numpy as np
import pytest

from sparsemem.errors import ConfigError, MissingDependencyError
from sparsemem.evaluation.statistics import Interval, mean_interval, paired_bootstrap


@pytest.mark.parametrize(
    ("values", "confidence", "quantile"),
    [
        # Quantiles from the tables of Student's distribution.
        ([1.0, 2.0], 0.95, 12.706),
        ([0.8, 0.7, 0.9], 0.95, 4.303),
        ([0.8, 0.7, 0.9], 0.99, 9.925),
        ([3.0, 1.0, 4.0, 1.0, 5.0], 0.9, 2.132),
    ],
)
def test_an_interval_over_seeds_is_students(values, confidence, quantile):
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    found = mean_interval(values, confidence)
    assert (found.mean, found.num) == (pytest.approx(mean), len(values))
    assert (found.low, found.high) == pytest.approx(
        (mean - quantile * error, mean + quantile * error), rel=1e-3
    )


def test_an_interval_over_seeds_holds_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 4))
    held = sum(found.low <= 3.0 <= found.high for found in map(mean_interval, draws.tolist()))
    assert held / len(draws) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert mean_interval([0.5]) == Interval(0.5, None, None, 1)
    assert paired_bootstrap([0.5], [0.25]) == Interval(0.25, None, None, 1)


def test_equal_values_leave_no_doubt():
    assert mean_interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5, 3)
    assert paired_bootstrap([0.5, 0.75], [0.25, 0.5], num_resamples=20) == Interval(0.25, 0.25, 0.25, 2)


def test_an_interval_does_not_depend_on_order():
    values = [0.1, 0.7, 0.3, 1e-9]
    assert len({mean_interval(order) for order in itertools.permutations(values)}) == 1
    pairs = list(zip(values, [0.2, 0.1, 0.9, 0.4], strict=True))
    found = {paired_bootstrap(*zip(*p, strict=True), num_resamples=50) for p in itertools.permutations(pairs)}
    assert len(found) == 1


def test_a_bootstrap_of_two_pairs_is_that_of_all_draws():
    """Of 0 and 1 the mean is 0 or 1 in a quarter of the draws each, and 1/2 in the others."""
    a, b = [1.0, 0.5], [0.0, 0.5]
    assert paired_bootstrap(a, b, confidence=0.6) == Interval(0.5, 0.0, 1.0, 2)
    assert paired_bootstrap(a, b, confidence=0.4) == Interval(0.5, 0.5, 0.5, 2)


def test_a_bootstrap_keeps_pairs_together():
    """What a question costs both is no doubt about their difference."""
    rng = np.random.default_rng(1)
    hardness, gain = rng.normal(size=200), rng.normal(0.1, 0.01, size=200)
    paired = paired_bootstrap((hardness + gain).tolist(), hardness.tolist(), num_resamples=1000)
    shuffled = paired_bootstrap(
        (hardness + gain).tolist(), rng.permutation(hardness).tolist(), num_resamples=1000
    )
    assert paired.mean == pytest.approx(shuffled.mean)
    assert 0 < paired.low < 0.1 < paired.high
    assert shuffled.low < 0 < shuffled.high
    assert shuffled.high - shuffled.low > 50 * (paired.high - paired.low)


def test_a_bootstrap_of_many_pairs_is_about_normal():
    a = np.random.default_rng(2).normal(size=400)
    found = paired_bootstrap(a.tolist(), [0.0] * 400, confidence=0.9)
    half = 1.645 * a.std() / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((a.mean() - half, a.mean() + half), abs=0.1 * half)


def test_a_bootstrap_holds_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        found = paired_bootstrap(*rng.binomial(1, (0.7, 0.5), size=(60, 2)).T, num_resamples=300)
        held += found.low <= 0.2 <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_a_bootstrap_is_that_of_its_seed():
    a, b = [0.1, 0.9, 0.4, 0.7], [0.3, 0.2, 0.6, 0.65]
    first, again, other = (paired_bootstrap(a, b, num_resamples=30, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.mean == other.mean
    assert (first.low, first.high) != (other.low, other.high)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: mean_interval([]), "no value; give at least one"),
        (lambda: mean_interval([1.0, 2.0], 95), "confidence=95 is not between 0 and 1"),
        (lambda: paired_bootstrap([], []), "no value; give at least one"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "1 scores against 2 are no pairs"),
        (lambda: paired_bootstrap([1.0], [1.0], confidence=0), "confidence=0 is not between"),
        (lambda: paired_bootstrap([1.0], [1.0], num_resamples=0), "num_resamples=0 is not positive"),
    ],
)
def test_what_has_no_interval_is_named(call, reason):
    with pytest.raises(ConfigError, match=reason):
        call()


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingDependencyError, match=r"needs scipy; pip install 'sparsemem\[study\]'"):
        mean_interval([1.0, 2.0])
