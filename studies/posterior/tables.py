"""Tables of the study posterior, from its CSVs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from bench.collect import EVALUATION
from bench.statistics import BLIND, MARGIN, can_tell, compare, margin, mean_interval
from bench.tables import markdown
from studies import by_env, by_seed, worst
from studies.posterior.play import BELOW, NOISE, PHYSICS, PRUNED
from studies.posterior.runs import (
    FIXED,
    LADDER,
    LEARNED,
    POINT,
    SAC,
    SPARSE,
    TRAINING,
    USED,
    WARM,
    WARM_FIXED,
    WARM_SHUFFLED,
)

KEPT_RETURN = 0.95
FACTOR = 1.25  # two shares of residuals that are kept are the same if they differ by less
FOUND = 50.0  # return of a task, of 500, from which its goal counts as found
AT_HAND = ("goal-0.2", "goal+0.2")  # what half of the starts are within reach of

Groups = dict[str, pd.Series]  # name of runs, or of a way to play them -> a number of each seed
# first cells of rows, groups, and pairs of their names
Case = tuple[list[str], Groups, Iterable[tuple[str, str]]]


def compare_cases(cases: Iterable[Case], within: float | None = None) -> list[list[str]]:
    """Rows of a table: the difference of means of each pair, p by Holm over all of them, and the verdict.

    Pairs of which one is missing are left out. within: what counts as the same; by default 5 % of the best.
    """
    rows, pairs, margins = [], [], []
    for cells, groups, names in cases:
        for x, y in names:
            if x in groups and y in groups:
                rows.append([*cells, f"{x} minus {y}"])
                pairs.append((groups[x], groups[y]))
                margins.append(within or margin(z.mean() for z in groups.values()))
    compared = compare(pairs, margins)
    return [[*row, *c.cells(1 if within is None else 3)] for row, c in zip(rows, compared)]


COMPARED = ["difference", "mean", "p (Holm)", "verdict"]


def final(runs: pd.DataFrame, metric: str = EVALUATION) -> dict[str, pd.Series]:
    """Of the runs on one suite: method@setting -> value at the end, of all tasks, by seed."""
    values = {name: by_seed(rows, metric) for name, rows in runs.groupby(runs.method + "@" + runs.setting)}
    order = [BLIND, "l2soft", "varshare-fixed", "varshare", "varshare-samples", "varshare-shuffled"]
    order = {method: i for i, method in enumerate(order)}
    return dict(sorted(values.items(), key=lambda x: order.get(x[0].partition("@")[0], len(order))))


def ladder(runs: pd.DataFrame) -> str:
    """Returns of L2Soft, fixed and learned sigma, by what acts and with and without re-centring."""
    values, training = final(runs), final(runs, TRAINING)
    lowest = {x: worst(rows) for x, rows in runs.groupby(runs.method + "@" + runs.setting)}
    rows = []
    for name, x in values.items():
        cells = [x, lowest[name], training[name]]
        rows.append([name, str(len(x)), *(mean_interval(cell).text() for cell in cells)])
    settings = ("mean", "sample", "mean-recentred", "sample-recentred")
    pairs = []
    for setting in settings:
        point = f"l2soft@{setting.replace('sample', 'mean')}"  # it has nothing to sample
        fixed, learned = (f"{method}@{setting}" for method in ("varshare-fixed", "varshare"))
        pairs += [(learned, point), (learned, fixed), (fixed, point)]
    pairs += [(LEARNED, "varshare-fixed@as-wide"), (LEARNED, "varshare-shuffled@mean")]
    pairs += [(WARM, LEARNED), (WARM, WARM_FIXED), (WARM, WARM_SHUFFLED)]
    pairs += [(f"{x}-recentred", x) for x in LADDER]
    columns = ["run", "runs", "evaluation", "its worst task", "training, last tenth"]
    return f"{markdown(columns, rows)}\n{markdown(COMPARED, compare_cases([([], values, pairs)]))}"


def sampling(runs: pd.DataFrame, others: pd.DataFrame) -> str:
    """C3: what acts in the rollout, draws per minibatch, and what is evaluated."""
    training, rows, pairs = final(runs, TRAINING), [], []
    groups: Groups = {}
    for method, draws in (("varshare", 1), ("varshare-samples", 5)):
        for name in (f"{method}@{x}" for x in ("mean", "sample") if f"{method}@{x}" in training):
            ways = values_of(others[others.run == name])
            groups |= {f"{name}, {way}": x for way, x in ways.items()}
            cells = [training[name], *(ways[way] for way in ("mean", "sampled", "ensemble"))]
            rows.append([name, str(draws), *(mean_interval(x).text() for x in cells)])
            pairs += [(f"{name}, {way}", f"{name}, mean") for way in ("sampled", "ensemble")]
    columns = ["run", "draws per minibatch", "training, last tenth", "mean weights", "1 sample", "5 samples"]
    trained = [("varshare@sample", "varshare@mean"), ("varshare-samples@mean", "varshare@mean")]
    trained += [("varshare-samples@sample", "varshare@sample")]
    pairs += [(f"{x}, mean", f"{y}, mean") for x, y in trained]
    compared = compare_cases([(["evaluation"], groups, pairs), (["training"], training, trained)])
    return f"{markdown(columns, rows)}\n{markdown(['of', *COMPARED], compared)}"


def values_of(of_run: pd.DataFrame, level: float = 0) -> Groups:
    """Of the rows of one run: way to play -> return by seed."""
    return {x: rows.set_index("seed").value for x, rows in of_run[of_run.level == level].groupby("what")}


def noise_controls(others: pd.DataFrame) -> str:
    """Trained with a learned sigma, played with it, with as much noise in each layer, and shuffled there."""
    names, rows, cases = ("mean", "sampled", "layer rms", "shuffled"), [], []
    for run in (LEARNED, WARM):
        groups = values_of(others[others.run == run])
        if groups:
            cells = [mean_interval(groups[name]).text() for name in names]
            rows.append([run, *cells, f"{groups[BELOW].mean():.0%}"])
            compared = {name: groups[name] for name in names}
            cases.append(([run], compared, [("sampled", name) for name in names if name != "sampled"]))
    return f"{markdown(['run', *names, BELOW], rows)}\n{markdown(['run', *COMPARED], compare_cases(cases))}"


def robustness(others: pd.DataFrame) -> str:
    """Mean weights with noise relative to their size, and in changed physics, over the run's own return."""
    rows, cases = [], []
    own = {run: values_of(others[others.run == run]).get("mean") for run in USED}
    own = {run: x for run, x in own.items() if x is not None}
    for what, level in [("noise", x) for x in NOISE] + [item for x in PHYSICS for item in x.items()]:
        groups = {run: values_of(others[others.run == run], level)[what] / x for run, x in own.items()}
        rows.append([f"{what} {level:g}", *(mean_interval(x).text(2) for x in groups.values())])
        pairs = [(LEARNED, POINT), (LEARNED, FIXED), (WARM, POINT), (WARM, WARM_FIXED), (WARM, WARM_SHUFFLED)]
        cases.append(([f"{what} {level:g}"], groups, pairs))
    table = markdown(["share of its own return", *own], rows)
    return f"{table}\n{markdown(['case', *COMPARED], compare_cases(cases, MARGIN))}"


def pruning(others: pd.DataFrame) -> str:
    """Smallest share of the actor's residuals that keeps 95 % of the return, compared as logarithms."""
    groups: Groups = {}
    for run in (x for x in USED if (others.run == x).any()):
        for criterion in ("|mu|", "|mu| / sigma"):
            of_run = others[(others.run == run) & others.what.isin(["mean", f"pruned by {criterion}"])]
            if of_run.what.nunique() == 2:
                dropped = prunable(of_run, f"pruned by {criterion}").clip(upper=PRUNED[-2])
                groups[f"{run} by {criterion}"] = -np.log10(1 - dropped)
    rows = []
    for name, x in groups.items():
        center, high, low = (f"{100 * 10**-y:.2g}" for y in mean_interval(x))
        rows.append([name, f"{center} [{low}, {high}]"])
    pairs = [(f"{x} by |mu| / sigma", f"{y} by |mu|") for x in (LEARNED, WARM) for y in (x, POINT)]
    pairs += [(f"{WARM} by |mu|", f"{x} by |mu|") for x in (POINT, WARM_FIXED)]
    table = markdown(["residuals of", "% that have to stay (geometric mean)"], rows)
    note = f"Differences of -log10 of that share; the same: within a factor of {FACTOR}."
    compared = compare_cases([([], groups, pairs)], float(np.log10(FACTOR)))
    return f"{table}\n{note}\n\n{markdown(COMPARED, compared)}"


def prunable(of_run: pd.DataFrame, criterion: str) -> pd.Series:
    """By seed: the largest share up to which every smaller one keeps 95 % of the return."""
    whole = of_run[of_run.what == "mean"].set_index("seed").value
    curve = of_run[of_run.what == criterion].pivot(index="seed", columns="level", values="value")
    kept = curve.ge(KEPT_RETURN * whole, axis=0).cummin(axis=1)
    return kept.apply(lambda row: max((level for level, on in row.items() if on), default=0.0), axis=1)


def exploration(runs: pd.DataFrame) -> str:
    """Returns where a goal has to be found first, and how many are."""
    values = final(runs)
    tasks = runs[(runs.metric == EVALUATION) & ~runs.task.isin(["mean", *AT_HAND])]
    found = (tasks.value >= FOUND).groupby([tasks.method + "@" + tasks.setting, tasks.seed]).sum()
    rows = [
        [name, str(len(x)), mean_interval(x).text(), mean_interval(found[name]).text()]
        for name, x in values.items()
    ]
    pairs = [(f"varshare@{x}", f"l2soft@{x}") for x in ("mean", "entropy")]
    sampled = [f"varshare@{x}" for x in ("sample", "sample-warm")]
    pairs += [(x, y) for x in sampled for y in (LEARNED, "varshare@entropy", "l2soft@entropy")]
    pairs += [(x, x.replace("varshare", "varshare-fixed")) for x in sampled]
    far = f"goals found, of the {tasks.task.nunique()} out of reach at first"
    columns = ["run", "runs", "evaluation", far]
    named = {x.partition("@")[0] if BLIND in x else x: y for x, y in values.items()}
    able, why = can_tell(named, None, (BLIND,))
    head = f"This suite {'can tell' if able else '**cannot tell**'}: {why}. Independent was not run.\n"
    return f"{head}\n{markdown(columns, rows)}\n{markdown(COMPARED, compare_cases([([], values, pairs)]))}"


def with_sac(runs: pd.DataFrame, sigma: pd.DataFrame) -> str:
    """Returns of fixed and learned sigma, and quantiles of the latter, with SAC."""
    values, training = final(runs), final(runs, TRAINING)
    rows = [
        [name, str(len(x)), mean_interval(x).text(), mean_interval(training[name]).text()]
        for name, x in values.items()
    ]
    quantiles, last = [], sigma[(sigma.method + "@" + sigma.setting) == SAC]
    for layer, of_layer in last.groupby(last.metric.str.rpartition("/")[2]):
        q = of_layer.groupby(of_layer.metric.str.extract("_q([0-9]+)/")[0].astype(int)).value.mean()
        quantiles.append([layer, *(f"{q[x]:.2g}" for x in (1, 50, 99))])
    pairs = [("varshare-sac@mean", "varshare-fixed-sac@mean")]
    text = markdown(["run", "runs", "evaluation", "training, last tenth"], rows)
    text += f"\n{markdown(COMPARED, compare_cases([([], values, pairs)]))}"
    table = markdown(["layer", "1 %", "50 %", "99 %"], quantiles)
    return f"{text}\nSigma among live weights at the end:\n\n{table}"


def all_tables(runs: pd.DataFrame, others: pd.DataFrame, sigma: pd.DataFrame) -> str:
    """All tables."""
    parts = ["Whether a suite with dense rewards can tell is in the study power, which has the control.\n"]
    is_sac = runs.method.str.endswith("-sac")
    for env, rows in by_env(runs[~is_sac]).items():
        if env == SPARSE:
            parts.append(f"## Exploration: {env}\n\n{exploration(rows)}")
            continue
        on = others[others.env == env]
        tables = {"the ladder": ladder(rows), "C3, sampling": sampling(rows, on)}
        tables |= {
            "what sigma knows": noise_controls(on),
            "robustness": robustness(on),
            "pruning": pruning(on),
        }
        parts += [f"## {env}: {name}\n\n{text}" for name, text in tables.items()]
    if is_sac.any():
        parts.append(
            f"## Soft actor-critic: {', '.join(runs[is_sac].env.unique())}\n\n{with_sac(runs[is_sac], sigma)}"
        )
    return "\n".join(parts)
