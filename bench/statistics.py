"""Statistics of comparisons. A run is the unit, because the tasks of one run are correlated.

Student's t on the means of ten runs covers 94 to 95 % on normal data and 93 to 94 % on data cut off at a
ceiling, where the percentile bootstrap covers 90 % (tests/test_statistics.py). Where nearly all runs are at
the ceiling no interval of ten covers, and none is needed: `can_tell` says so.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
MARGIN = 0.05  # two methods are the same if they surely differ by less than this share of the better mean
AT_CEILING = 0.98  # share of a suite's ceiling from which a method is there
BLIND = "task-blind"
Runs = dict[str, pd.Series]  # method, or a setting of one -> a number of each run, by seed


class Interval(NamedTuple):
    """A number and its 95 % confidence interval, NaN where there are too few runs for one."""

    center: float
    low: float
    high: float

    def text(self, digits: int = 1) -> str:
        """As 12.3 [10.0, 14.6]; what is not finite is a dash."""
        # adding 0 turns -0 into 0
        center, low, high = (f"{round(x, digits) + 0:,.{digits}f}" if math.isfinite(x) else "-" for x in self)
        return f"{center} [{low}, {high}]"


class Difference(NamedTuple):
    """A difference of means, its 95 % confidence interval, and the p-value of no difference."""

    interval: Interval
    p: float


def mean_interval(x: Sequence[float]) -> Interval:
    """Mean of runs, with Student's t (n - 1 degrees of freedom)."""
    x = np.asarray(x, float)
    if len(x) < 2:
        return Interval(x.mean(), math.nan, math.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * stats.sem(x)
    return Interval(x.mean(), x.mean() - half, x.mean() + half)


def median_interval(x: Sequence[float]) -> Interval:
    """Median of runs, infinite ones allowed, between order statistics that cover 95 % of any distribution.

    The k-th smallest and the k-th largest of n cover all but 2 P(Binomial(n, 1/2) < k); with fewer than six
    runs even the extremes do not cover enough.
    """
    x = np.sort(np.asarray(x, float))
    k = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(x), 0.5))  # P(at most k - 1) < 2.5 %
    low, high = (x[k - 1], x[-k]) if k > 0 else (math.nan, math.nan)
    return Interval(np.median(x), low, high)


def difference(x: pd.Series, y: pd.Series) -> Difference:
    """Mean of x minus that of y, runs by their seed: paired where the seeds are the same, else Welch's t."""
    center = x.mean() - y.mean()
    if min(len(x), len(y)) < 2:
        return Difference(Interval(center, math.nan, math.nan), math.nan)
    paired = set(x.index) == set(y.index)
    spread = np.ptp(x - y) if paired else max(np.ptp(x), np.ptp(y))
    if spread <= 1e-9 * max(1, abs(center)):  # the same in every run, except for rounding
        return Difference(Interval(center, center, center), float(abs(center) <= 1e-9))
    test = stats.ttest_rel(x, y[x.index]) if paired else stats.ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(Interval(center, float(low), float(high)), float(test.pvalue))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's correction (1979) of the p-values of several comparisons; NaN is no comparison."""
    p = np.asarray(p, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return adjusted


def verdict(d: Difference, p: float, within: float) -> str:
    """The same: the interval lies within the margin, even without 0. Better or worse: p, corrected, < 5 %."""
    if max(-d.interval.low, d.interval.high) < within:
        return "the same"
    if p < 1 - CONFIDENCE:
        return "better" if d.interval.center > 0 else "worse"
    return "undecided"


def margin(means: Iterable[float]) -> float:
    """Two methods are the same if they differ by less than this: 5 % of the best mean."""
    return MARGIN * abs(max(means))


class Comparison(NamedTuple):
    """Two methods compared: x minus y, its p-value corrected for all comparisons, and what it says."""

    interval: Interval
    p: float
    verdict: str  # better, worse, the same, undecided
    within: float

    def cells(self, digits: int = 1) -> list[str]:
        """Difference, p and verdict, as in tables."""
        return [self.interval.text(digits), f"{self.p:.2g}", self.verdict]


def compare(pairs: Iterable[tuple[pd.Series, pd.Series]], within=None) -> list[Comparison]:
    """Every pair of runs, each a number by seed, with Holm's correction for all of them.

    within: what counts as the same, of all pairs or of each; by default 5 % of the better mean.
    """
    pairs = list(pairs)
    if within is None:
        within = [margin((x.mean(), y.mean())) for x, y in pairs]
    elif isinstance(within, float):
        within = [within] * len(pairs)
    found = [difference(x, y) for x, y in pairs]
    corrected = holm([d.p for d in found])
    return [Comparison(d.interval, p, verdict(d, p, m), m) for d, p, m in zip(found, corrected, within)]


def against(runs: Runs, control: str) -> dict[str, Comparison]:
    """Every other method minus the control, corrected for their number; {} if there is no control."""
    if control not in runs:
        return {}
    others = [method for method in runs if method != control]
    pairs = [(runs[method], runs[control]) for method in others]
    return dict(zip(others, compare(pairs, margin(x.mean() for x in runs.values()))))


def can_tell(runs: Runs, ceiling: float | None) -> tuple[bool, str]:
    """Whether a suite can tell methods apart, by the mean return over tasks of each run, and why.

    It cannot if the task-blind control, one network that is not told the task, is not beaten by the best
    method (an interval above 0, and p corrected for having chosen it among them), or if all the others are
    at the ceiling, if that is known: then what is compared is not how tasks are shared. If task-blind is not
    beaten the reason says whether the interval lies below the margin or the runs were too few.
    """
    others = {method: x for method, x in runs.items() if method != BLIND}
    if len(runs) < 2:
        return False, "there is nothing to compare"
    if BLIND not in runs:
        return False, "without task-blind it cannot be excluded that a network need not be told the task"
    height = "" if ceiling is not None else "; how much the tasks allow has not been measured"
    best = max(others, key=lambda method: others[method].mean())
    interval, p, *_ = against(runs, BLIND)[best]
    seen = f"the best method, {best}, scores {others[best].mean():.1f}, task-blind {runs[BLIND].mean():.1f}"
    seen += f": {interval.text()} more"
    if not math.isfinite(interval.low):
        return False, f"one run of each shows nothing; {seen}{height}"
    if not interval.low > 0 and interval.high <= margin(x.mean() for x in runs.values()):
        return False, f"task-blind is not beaten; {seen}{height}"
    if not (interval.low > 0 and p < 1 - CONFIDENCE):
        few = f"{len(others[best])} runs of each do not show that task-blind is beaten"
        return False, f"{few} (p {p:.2g}, Holm, {len(others)} methods); {seen}{height}"
    if ceiling is not None and min(x.mean() for x in others.values()) >= AT_CEILING * ceiling:
        return False, f"all methods but task-blind are at the ceiling of {ceiling:.1f}; {seen}"
    return True, f"{seen}{height}"
