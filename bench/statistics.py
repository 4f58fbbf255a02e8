"""Statistics of comparisons. A run is the unit, because the tasks of one run are correlated.

Student's t on the means of ten runs covers 94 to 95 % on normal data and 93 to 94 % on data cut off at a
ceiling, where the percentile bootstrap covers 90 % (tests/test_statistics.py). Where nearly all runs are at
the ceiling no interval of ten covers, and none is needed: `can_tell` says so.

Where several searches chose a method's settings its runs are indexed by (search, seed), and the searches'
scatter is part of every interval (`Noise`).
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from bench.methods import base_of, title_of

CONFIDENCE = 0.95
MARGIN = 0.05  # two methods are the same if they surely differ by less than this share of the better mean
AT_CEILING = 0.98  # share of a suite's ceiling from which a method is there
BLIND, INDEPENDENT = "task-blind", "independent"
Runs = dict[str, pd.Series]  # method, or a setting of one -> a number of each run, by seed or (search, seed)


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


class Noise(NamedTuple):
    """How much the searches for settings add to the scatter of runs, pooled over methods.

    Three searches of one method say little of their scatter; those of nine say enough, if it is the same for
    all of them: the assumption behind the intervals of a suite with several searches.
    """

    methods: int
    searches: int  # of each
    between: float  # mean square between searches: (runs of a search) * (variance of the searches' means)
    within: float  # mean square within searches

    def of_mean(self, x: pd.Series, methods: int) -> tuple[float, float]:
        """Variance of the mean of x, by (search, seed), and its degrees of freedom (Satterthwaite 1946).

        methods: whose searches x depends on, 1, or 2 of a difference. With N runs in K searches the variance
        is that within searches / N, and of each method the variance of a search, (between - within) K / N,
        over K. NaN if x lacks a search, or has none with two runs.
        """
        free = len(x) - self.searches
        if x.index.get_level_values(0).nunique() < self.searches or free < 1:
            return math.nan, math.nan
        own = squares(x)[1]
        more = methods * max(self.between - self.within, 0.0)
        parts = [(own, free)]
        if more:
            parts.append((methods * self.between, self.methods * (self.searches - 1)))
            parts.append((methods * self.within, self.methods * free))
        freedom = (own + more) ** 2 / max(sum(part**2 / n for part, n in parts), 1e-300)
        return (own + more) / len(x), freedom


def squares(x: pd.Series) -> tuple[float, float]:
    """Mean squares between searches and within them, of runs by (search, seed)."""
    groups = x.groupby(level=0)
    means = groups.transform("mean")
    searches = groups.ngroups
    between = ((means - x.mean()) ** 2).sum() / (searches - 1)
    within = ((x - means) ** 2).sum() / (len(x) - searches)
    return float(between), float(within)


def search_noise(runs: Runs) -> Noise | None:
    """Of a suite's methods, without task-blind, whose settings hardly matter; None if each has one search.

    Of methods that have runs of every search, and more than one of some.
    """
    several = [x for method, x in runs.items() if method != control_in(runs, BLIND) and x.index.nlevels == 2]
    numbers = [x.index.get_level_values(0).nunique() for x in several]
    searches = max(numbers, default=1)
    several = [x for x, number in zip(several, numbers) if number == searches < len(x)]
    if searches == 1 or not several:
        return None
    between, within = np.mean([squares(x) for x in several], axis=0)
    return Noise(len(several), searches, float(between), float(within))


def mean_interval(x: Sequence[float], noise: Noise | None = None) -> Interval:
    """Mean of runs, with Student's t: n - 1 degrees of freedom, or as `Noise` says."""
    center = float(np.mean(x))
    if len(x) < 2:
        return Interval(center, math.nan, math.nan)
    return student(center, *variance_of_mean(x, noise)).interval


def variance_of_mean(x: Sequence[float], noise: Noise | None) -> tuple[float, float]:
    """Variance of the mean of runs, and its degrees of freedom."""
    return noise.of_mean(x, 1) if noise else (float(np.var(x, ddof=1)) / len(x), len(x) - 1)


def student(center: float, variance: float, freedom: float) -> Difference:
    """What Student's t says of a difference whose variance was estimated with these degrees of freedom."""
    if variance == 0:  # the same in every run
        return Difference(Interval(center, center, center), float(center == 0))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    p = 2 * stats.t.sf(abs(center) / math.sqrt(variance), freedom)
    return Difference(Interval(center, center - half, center + half), float(p))


def median_interval(x: Sequence[float]) -> Interval:
    """Median of runs, infinite ones allowed, between order statistics that cover 95 % of any distribution.

    The k-th smallest and the k-th largest of n cover all but 2 P(Binomial(n, 1/2) < k); with fewer than six
    runs even the extremes do not cover enough.
    """
    x = np.sort(np.asarray(x, float))
    k = int(stats.binom.ppf((1 - CONFIDENCE) / 2, len(x), 0.5))  # P(at most k - 1) < 2.5 %
    low, high = (x[k - 1], x[-k]) if k > 0 else (math.nan, math.nan)
    return Interval(np.median(x), low, high)


def difference(x: pd.Series, y: pd.Series, noise: Noise | None = None) -> Difference:
    """Mean of x minus that of y, runs by their seed: paired where the seeds are the same, else Welch's t.

    With noise over the seeds that both have, and as it says.
    """
    if noise:
        x, y = x.align(y, join="inner")
    center = x.mean() - y.mean()
    if min(len(x), len(y)) < 2:
        return Difference(Interval(center, math.nan, math.nan), math.nan)
    paired = set(x.index) == set(y.index)
    spread = np.ptp(x - y) if paired else max(np.ptp(x), np.ptp(y))
    if spread <= 1e-9 * max(1, abs(center)):  # the same in every run, except for rounding
        return Difference(Interval(center, center, center), float(abs(center) <= 1e-9))
    if noise:
        return student(center, *noise.of_mean(x - y, 2))
    test = stats.ttest_rel(x, y[x.index]) if paired else stats.ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(Interval(center, float(low), float(high)), float(test.pvalue))


def across(x: pd.Series, y: pd.Series, noise_x: Noise | None, noise_y: Noise | None) -> Difference:
    """Mean of x minus that of y, runs of two suites: unpaired, each with the noise of its own searches.

    Without noise Welch's t, else the same formula of degrees of freedom (Satterthwaite 1946).
    """
    center = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
        return Difference(Interval(center, math.nan, math.nan), math.nan)
    (a, free_a), (b, free_b) = variance_of_mean(x, noise_x), variance_of_mean(y, noise_y)
    return student(center, a + b, (a + b) ** 2 / max(a**2 / free_a + b**2 / free_b, 1e-300))


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


def compare(
    pairs: Iterable[tuple[pd.Series, pd.Series]], within=None, noise: Noise | None = None
) -> list[Comparison]:
    """Every pair of runs, each a number by seed, with Holm's correction for all of them.

    within: what counts as the same, of all pairs or of each; by default 5 % of the better mean.
    """
    pairs = list(pairs)
    if within is None:
        within = [margin((x.mean(), y.mean())) for x, y in pairs]
    elif isinstance(within, float):
        within = [within] * len(pairs)
    return judge([difference(x, y, noise) for x, y in pairs], within)


def judge(found: list[Difference], within: list[float]) -> list[Comparison]:
    """What differences say, corrected for their number; within: what counts as the same, of each."""
    corrected = holm([d.p for d in found])
    return [Comparison(d.interval, p, verdict(d, p, m), m) for d, p, m in zip(found, corrected, within)]


def against(runs: Runs, control: str) -> dict[str, Comparison]:
    """Every other method minus the control, corrected for their number; {} if there is no control."""
    if control not in runs:
        return {}
    others = [method for method in runs if method != control]
    pairs = [(runs[method], runs[control]) for method in others]
    within = margin(x.mean() for x in runs.values())
    return dict(zip(others, compare(pairs, within, search_noise(runs))))


def control_in(runs: Collection[str], control: str) -> str:
    """What a control is called among these methods: with another algorithm than PPO "task-blind-sac"."""
    return next((m for m in runs if base_of(m) == control and control not in runs), control)


LOST = {BLIND: "tasks need not be known", INDEPENDENT: "sharing gains nothing"}  # if a control is not beaten


def can_tell(runs: Runs, ceiling: float | None, controls: Iterable[str] = tuple(LOST)) -> tuple[bool, str]:
    """Whether a suite can tell methods apart, by the mean return over tasks of each run, and why.

    It can if the best method beats both controls: task-blind, one network that is not told the task, or tasks
    need not be known; and Independent, an agent for each task, or sharing gains nothing. Each with an
    interval above 0, and p corrected for having chosen the best. It cannot if all are at the ceiling, if
    that is known. If a control is not beaten the reason says whether the interval lies below the margin or
    the runs were too few.
    """
    others = {method: x for method, x in runs.items() if method != control_in(runs, BLIND)}
    if len(runs) < 2:
        return False, "there is nothing to compare"
    height = "" if ceiling is not None else "; how much the tasks allow has not been measured"
    best = max(others, key=lambda method: others[method].mean())
    says = f"the best method, {title_of(best)}, scores {others[best].mean():.1f}"
    for known in controls:
        control = control_in(runs, known)
        if control not in runs:
            return False, f"without {control} it cannot be excluded that {LOST[known]}; {says}{height}"
        if best == control:
            return False, f"no method is better than {control}; {says}{height}"
        interval, p, *_ = against(runs, control)[best]
        says += f", {control} {runs[control].mean():.1f}: {interval.text()} more (p {p:.2g})"
        if not math.isfinite(interval.low):
            return False, f"one run of each shows nothing; {says}{height}"
        if not interval.low > 0 and interval.high <= margin(x.mean() for x in runs.values()):
            return False, f"{control} is not beaten; {says}{height}"
        if not (interval.low > 0 and p < 1 - CONFIDENCE):
            few = f"{len(others[best])} runs of each do not show that {control} is beaten"
            return False, f"{few} (Holm, {len(runs) - 1} methods); {says}{height}"
    if ceiling is not None and min(x.mean() for x in others.values()) >= AT_CEILING * ceiling:
        return False, f"all methods but {BLIND} are at the ceiling of {ceiling:.1f}; {says}"
    return True, f"{says}{height}"
