"""How sure a mean is: intervals over seeds and over paired questions."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from sparsemem.errors import ConfigError, MissingDependencyError


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and where the true one lies, in the unit of the values.

    Args:
        mean: Of the values, or of the differences.
        low: Lower bound; None for a single value, which says nothing of its spread.
        high: Upper bound, likewise.
        num: Values, or pairs.
    """

    mean: float
    low: float | None
    high: float | None
    num: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of a few independent runs, with Student's interval.

    mean ± t * s / sqrt(n), with s the sample's standard deviation and t the quantile
    (1 + confidence) / 2 of Student's distribution with n - 1 degrees of freedom.
    Source: Student 1908, "The probable error of a mean", Biometrika 6(1).

    Args:
        values: One per seed, in any order.
        confidence: How often such an interval holds the true mean, 0 to 1.

    Raises:
        ConfigError: There is no value, or `confidence` is not between 0 and 1.
        MissingDependencyError: scipy is not installed; one value needs none.
    """
    _check(len(values), confidence)
    mean, num = statistics.fmean(values), len(values)
    if num == 1:
        return Interval(mean, None, None, num)
    half = _student((1 + confidence) / 2, num - 1) * statistics.stdev(values) / math.sqrt(num)
    return Interval(mean, mean - half, mean + half, num)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Difference of two means over the same questions, with the percentile interval of a bootstrap.

    Questions are drawn with replacement, each with both of its scores, so that what makes a question
    hard for both cancels out. The interval speaks of other questions, not of other seeds.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.

    Args:
        a: Scores, one per question.
        b: Scores of the same questions, in the same order.
        num_resamples: Draws of as many questions as there are.
        confidence: Share of the draws that the interval holds, 0 to 1.
        seed: Of the draws.

    Returns:
        mean(a) - mean(b); the same whatever the order of the questions.

    Raises:
        ConfigError: The scores are not as many, there is none, or an option is out of its range.
    """
    if len(a) != len(b):
        raise ConfigError(f"{len(a)} scores against {len(b)} are no pairs; give both of the same questions")
    _check(len(a), confidence)
    if num_resamples < 1:
        raise ConfigError(f"num_resamples={num_resamples} is not positive; use 10000 or so")
    # Sorted, or the same draws would mean other questions in another order.
    differences = np.sort(np.subtract(a, b))
    mean, num = statistics.fmean(differences), len(differences)
    if num == 1:
        return Interval(mean, None, None, num)
    rng = np.random.default_rng(seed)
    means = [rng.choice(differences, num).mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(mean, float(low), float(high), num)


def check_scipy() -> None:
    """Find out whether there can be intervals over seeds, before the hours of the runs.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    _student(0.975, 1)


def _check(num: int, confidence: float) -> None:
    if not num:
        raise ConfigError("there is no value; give at least one")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} is not between 0 and 1; use 0.95 or so")


def _student(probability: float, degrees: int) -> float:
    try:
        from scipy.stats import t  # takes a second, and single runs need none
    except ImportError as error:
        raise MissingDependencyError(
            "an interval over seeds needs scipy; pip install 'sparsemem[study]'"
        ) from error
    return float(t.ppf(probability, degrees))
