"""What does a posterior buy that was trained on a likelihood, V-MPO's? results/studies/likelihood/."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bench.launch import Job
from bench.statistics import compare, mean_interval
from bench.tables import markdown
from studies import GOALS, by_seed, folder_of, job, of_settings, prior, run_study, texts, worst
from studies.posterior.play import NOISE, PHYSICS, PRUNED, play_all
from studies.posterior.tables import FACTOR, Groups, prunable, values_of

STUDY, PENALTY = "likelihood", 0.003  # lambda, of every run
COLD, WARM, BAYES = BETAS = ("0.001", "0.03", "1")  # sigma grows with the square root
POINT = "point"  # L2Soft, what is left as beta goes to 0
ALGORITHMS = {"PPO": ("varshare", "l2soft"), "V-MPO": ("varshare-vmpo", "l2soft-vmpo")}
NAMES = {f"{method}@{x}": (algorithm, x) for algorithm, (method, _) in ALGORITHMS.items() for x in BETAS}
NAMES |= {f"{method}@{POINT}": (algorithm, POINT) for algorithm, (_, method) in ALGORITHMS.items()}


def jobs() -> Iterator[Job]:
    """Both algorithms at the same penalty, from a point to the Bayesian posterior, beta = 1."""
    base = {"learning-rate": "0.012", "eval-interval": "100000"}
    for seed in range(601, 611):
        for varshare, l2soft in ALGORITHMS.values():
            for beta in BETAS:
                own = {"beta": beta, "sigma-prior": prior(float(beta), PENALTY)}
                yield job(STUDY, GOALS[0], 300_000, f"{varshare}@{beta}", seed, base | own)
            own = {"l2-coef": str(PENALTY)}
            yield job(STUDY, GOALS[0], 300_000, f"{l2soft}@{POINT}", seed, base | own)


def kept(of_run: pd.DataFrame, criterion: str) -> pd.Series:
    """-log10 of the smallest share of the actor's residuals that keeps 95 % of the return, by seed."""
    return -np.log10(1 - prunable(of_run, f"pruned by {criterion}").clip(upper=PRUNED[-2]))


def compare_groups(groups: dict[tuple[str, str], pd.Series], within: float | None = None) -> list[list[str]]:
    """Rows: what beta = 1 and a point change, V-MPO minus PPO at each, and whether V-MPO bears more.

    within: what counts as the same; by default 5 % of the best.
    """
    rows, pairs = [], []
    for algorithm in ALGORITHMS:
        for x, y in ((COLD, POINT), (WARM, COLD), (BAYES, COLD)):
            rows.append(f"{algorithm}: {x} minus {y}")
            pairs.append((groups[algorithm, x], groups[algorithm, y]))
    for x in (POINT, *BETAS):
        rows.append(f"V-MPO minus PPO: {x}")
        pairs.append((groups["V-MPO", x], groups["PPO", x]))
    rows.append(f"V-MPO minus PPO, of {BAYES} minus {COLD}")
    pairs.append([(groups[x, BAYES] - groups[x, COLD]).dropna() for x in ("V-MPO", "PPO")])
    within = within or 0.05 * max(x.mean() for x in groups.values())
    return [[row, *c.cells(1 if within > 1 else 3)] for row, c in zip(rows, compare(pairs, within))]


def report(runs: pd.DataFrame) -> str:
    """Returns, pruning and robustness; models that have not been played are."""
    out, found = folder_of(STUDY), of_settings(runs)
    if missing := [name for name in NAMES if tuple(name.split("@")) not in found]:
        return f"No run of {', '.join(missing)} has finished yet.\n"
    play_all(list(jobs()), out, NAMES)
    others = pd.read_csv(out / "played.csv")
    compared = ["", "difference", "p (Holm)", "verdict"]
    rows, returns = [], {}
    ways: dict[tuple[str, str], Groups] = {}
    for name, key in NAMES.items():
        x = found[tuple(name.split("@"))]
        returns[key], ways[key] = by_seed(x), values_of(others[others.run == name])
        sampled = mean_interval(ways[key]["sampled"]).text() if "sampled" in ways[key] else ""
        rows.append([*key, *texts(returns[key], worst(x)), sampled])
    columns = ["algorithm", "beta", "return", "worst task", "played with samples"]
    parts = [f"## Return\n\n{markdown(columns, rows)}\n{markdown(compared, compare_groups(returns))}"]

    rows, stay = [], {}
    for name, key in NAMES.items():
        of_run = others[others.run == name]
        by = {"|mu|": kept(of_run, "|mu|")}
        if key[1] != POINT:
            by["|mu| / sigma"] = kept(of_run, "|mu| / sigma")
        stay[key] = by.get("|mu| / sigma", by["|mu|"])
        cells = []
        for x in by.values():
            center, high, low = (f"{100 * 10**-y:.2g}" for y in mean_interval(x))
            cells.append(f"{center} [{low}, {high}]")
        rows.append([*key, *cells, *[""] * (2 - len(cells))])
    columns = ["algorithm", "beta", "by \\|mu\\|, %", "by \\|mu\\| / sigma, %"]
    note = f"Differences of -log10 of the share, by the score of the last column; the same: within {FACTOR}."
    table = markdown(compared, compare_groups(stay, float(np.log10(FACTOR))))
    head = "Residuals of the actor that have to stay for 95 % of the return, geometric means."
    parts.append(f"## Pruning\n\n{head}\n\n{markdown(columns, rows)}\n{note}\n\n{table}")

    rows, cases = [], [("noise", x) for x in NOISE] + [item for x in PHYSICS for item in x.items()]
    columns = ["share of its own return", *(f"{algorithm} {x}" for algorithm, x in NAMES.values())]
    for what, level in cases:
        values = (values_of(others[others.run == name], level)[what] for name in NAMES)
        shares = (x / ways[key]["mean"] for x, key in zip(values, NAMES.values()))
        rows.append([f"{what} {level:g}", *(mean_interval(x).text(2) for x in shares)])
    parts.append(f"## Robustness\n\n{markdown(columns, rows)}")
    return "\n".join(parts)


if __name__ == "__main__":
    run_study(STUDY, jobs, report)
