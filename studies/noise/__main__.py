"""Which beta and which lambda? How noisy the weights are, at each penalty: results/studies/noise/."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.collect import EVALUATION, Run
from bench.launch import Job
from bench.methods import METHODS, ROOT, read_methods
from bench.suites import SEEDS
from bench.tables import markdown
from studies import GOALS, by_seed, job, prior, run_study, worst

FIXED = read_methods(ROOT / "studies/posterior/methods.csv")["varshare-fixed"]
CLIPPED, SIGMA = "losses/clipfrac_first_minibatch", "varshare/sigma"


def jobs() -> Iterator[Job]:
    """Penalties lambda, and for each how noisy: VarShare by beta, fixed sigmas, and L2Soft without any."""
    methods = METHODS | {FIXED.name: FIXED}
    for seed in SEEDS:
        for env in GOALS:
            for penalty in ("0.001", "0.003", "0.01", "0.03"):
                low = penalty in ("0.001", "0.003")  # the better ones
                cases = {f"l2soft@{penalty}": {"l2-coef": penalty}}
                for beta in ("0.0001",) * low + ("0.001", "0.01", "0.1") + ("1",) * (penalty == "0.01"):
                    settings = {"beta": beta, "sigma-prior": prior(float(beta), float(penalty))}
                    cases[f"varshare@{penalty},{beta}"] = settings
                for sigma in ("0.001", "0.003", "0.01", "0.03") * low:
                    cases[f"varshare-fixed@{penalty},{sigma}"] = {"l2-coef": penalty, "sigma": sigma}
                for method, settings in cases.items():
                    settings = {"learning-rate": "0.012"} | settings
                    yield job("noise", env, 500_000, method, seed, settings, methods)


def rows_of(run: Run) -> pd.DataFrame:
    """The final evaluation and sigma, and the mean over the run of what is clipped at first."""
    log = run.log.rename(columns={"global_step": "step"})
    last = log[log.metric.isin([EVALUATION, SIGMA]) & (log.step == log.step.max())]
    clipped = log[log.metric == CLIPPED].groupby(["metric", "task"]).value.mean().reset_index()
    return pd.concat([last, clipped.assign(step=log.step.max())])


def report(runs: pd.DataFrame) -> str:
    """Of every setting the final evaluation over seeds, and what else explains it; the best first."""
    rows = []
    for (method, env, setting), group in runs.groupby(["method", "env", "setting"]):
        penalty, _, noise = setting.partition(",")
        x = by_seed(group)
        cells = [method, env, penalty, noise if method == "varshare" else "-"]
        cells += [noise if method == FIXED.name else "-", str(len(x)), f"{x.mean():.1f}", f"{x.std():.1f}"]
        cells += [f"{x.min():.1f}", f"{worst(group).mean():.1f}"]
        clipped, sigma = by_seed(group, CLIPPED), by_seed(group, SIGMA)  # which not all methods have
        cells += [f"{100 * clipped.mean():.2f} %", f"{sigma.mean():.4f}" if len(sigma) else ""]
        rows.append((x.mean(), cells))
    columns = ["method", "environment", "lambda", "beta", "fixed sigma", "seeds", "return", "std over seeds"]
    columns += ["worst seed", "worst task", "clipped at first minibatch", "sigma at end"]
    return markdown(columns, [cells for _, cells in sorted(rows, key=lambda x: -x[0])])


if __name__ == "__main__":
    run_study("noise", jobs, report, rows_of)
