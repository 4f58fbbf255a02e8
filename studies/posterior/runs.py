"""The runs of the study posterior, and what is collected of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from bench import methods
from bench.collect import Run, evaluations, read_run
from bench.launch import Job
from bench.methods import ROOT, read_methods
from studies import GOALS, job, prior

STUDY = "posterior"
METHODS = methods.METHODS | read_methods(ROOT / "studies/posterior/methods.csv")
POINT, FIXED, LEARNED = LADDER = ("l2soft@mean", "varshare-fixed@mean", "varshare@mean")
WARM, WARM_FIXED, WARM_SHUFFLED = "varshare@warm", "varshare-fixed@warm", "varshare-shuffled@warm"
USED = (*LADDER, WARM, WARM_FIXED, WARM_SHUFFLED)  # those that are played in all ways
SPARSE = "cartpole-goals10-sparse"
SAC = "varshare-sac@mean"
SHOWN = (*USED, "varshare@sample")  # whose training is drawn; of the others its last tenth is kept
TRAINING = "training"  # mean return of the training episodes that ended in a tenth of the run
SIGMA_PRIOR = prior(0.001, 0.003)  # of LEARNED
SIGMAS = "varshare/sigma_q"  # quantiles by layer, of LEARNED and SAC


def jobs() -> Iterator[Job]:
    """What a learned sigma buys, at lambda 0.003; "warm": ten times the sigma; SAC at its defaults."""
    seeds = range(21, 31)
    base = {"learning-rate": "0.012", "eval-interval": "100000"}
    point = {"l2-coef": "0.003"}
    fixed = point | {"sigma": "0.003"}  # the best of the study noise
    as_wide = point | {"sigma": "0.0128"}  # as the median of those learned
    learned = {"beta": "0.001", "sigma-prior": SIGMA_PRIOR}
    warm, warm_fixed = {"beta": "0.1", "sigma-prior": prior(0.1, 0.003)}, point | {"sigma": "0.1"}
    act, recentred = {"rollout-weights": "sample"}, {"reptile-alpha": "0.1"}
    entropy = {"ent-coef": "0.01"}
    ladder = {  # method@setting -> its flags
        "l2soft@mean": point,
        "l2soft@mean-recentred": recentred | point,
        "varshare-fixed@mean": fixed,
        "varshare-fixed@sample": act | fixed,
        "varshare-fixed@mean-recentred": recentred | fixed,
        "varshare-fixed@sample-recentred": recentred | act | fixed,
        "varshare@mean": learned,
        "varshare@sample": act | learned,
        "varshare@mean-recentred": recentred | learned,
        "varshare@sample-recentred": recentred | act | learned,
        "varshare-shuffled@mean": learned,
        "varshare-samples@mean": learned,
        "varshare-samples@sample": act | learned,
        "varshare-fixed@as-wide": as_wide,
        "varshare-fixed@warm": warm_fixed,
        "varshare@warm": warm,
        "varshare-shuffled@warm": warm,
    }
    sparse = {
        "task-blind@mean": {},
        "l2soft@mean": point,
        "varshare@mean": learned,
        "l2soft@entropy": entropy | point,
        "varshare@entropy": entropy | learned,
        "varshare@sample": act | learned,
        "varshare-fixed@sample": act | fixed,
        "varshare@sample-warm": act | warm,
        "varshare-fixed@sample-warm": act | warm_fixed,
    }
    for seed in seeds:
        for env, cases in {**dict.fromkeys(GOALS, ladder), SPARSE: sparse}.items():
            for method, own in cases.items():
                yield job(STUDY, env, 500_000, method, seed, base | own, METHODS)
    sac = {"eval-interval": "40000", "learning-rate": "0.001", "beta": "0.1", "sigma-prior": "0.01"}
    cases = {"varshare-sac@mean": {"sigma-decay": "0.99"}, "varshare-fixed-sac@mean": {"sigma": "0.01"}}
    for seed in seeds[:3]:
        for method, own in cases.items():
            yield job(STUDY, GOALS[0], 200_000, method, seed, sac | own, METHODS)


def tenths(run: Run, prefix: str) -> pd.DataFrame:
    """Means over tenths of a run of the metrics, over all tasks, that begin so."""
    log, tenth = run.log, run.config["args"]["total_timesteps"] / 10
    log = log[(log.task == "mean") & log.metric.str.startswith(prefix)]
    step = (np.ceil(log.global_step / tenth).clip(upper=10) * tenth).astype(int)
    return log.assign(step=step).groupby(["metric", "step"]).value.mean().reset_index()


def rows_of(run: Run) -> pd.DataFrame:
    """Evaluations, and training returns by tenths; on the way of those only that are drawn."""
    training = tenths(run, "charts/episodic_return").assign(metric=TRAINING, task="mean")
    parts = [evaluations(run), training]
    args = run.config["args"]
    if args["exp_name"] not in SHOWN or args["env_id"] == SPARSE:
        parts = [rows[rows.step == rows.step.max()] for rows in parts]
    return pd.concat(parts)


def collect_sigma(jobs: list[Job], out: Path) -> None:
    """sigma.csv: quantiles of the learned sigma by layer and tenth, mean over runs; of SAC at the end."""
    parts = []
    for run in (read_run(Path("runs", x.name)) for x in jobs if x.finished):
        args = run.config["args"]
        if args["exp_name"] in (LEARNED, SAC):
            rows = tenths(run, SIGMAS)
            if args["exp_name"] == SAC:
                rows = rows[rows.step == rows.step.max()]
            method, _, setting = args["exp_name"].partition("@")
            parts.append(rows.assign(env=args["env_id"], method=method, setting=setting))
    if parts:
        key = ["env", "method", "setting", "metric", "step"]
        means = pd.concat(parts).groupby(key, sort=False).value.mean().reset_index()
        means.to_csv(out / "sigma.csv", index=False, float_format="%.5g")
