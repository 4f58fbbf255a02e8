"""The suite `posterior` of benchmark.sh: what a learned sigma buys. runs/posterior__* -> results/posterior/.

Every finished model is played with other weights and in other physics, once (played.csv in its folder). A
run's --exp-name is method@setting. Tables and figures are made from runs.csv and played.csv alone, which are
made anew where there are runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor, nn

from bench.controls import KEY, RETURN, by_seed, ceiling, collect, suites, worst
from bench.statistics import BLIND, MARGIN, can_tell, difference, holm, margin, mean_interval, verdict
from bench.style import BLACK, BLUE, GREEN, ORANGE, RED, SKY, STYLE
from bench.tables import markdown
from enjoy import load_agent, load_script, read_model
from envs import make
from envs.evaluation import play_episodes, spread_seeds

SUITE = "posterior"
POINT, FIXED, LEARNED = LADDER = ("l2soft@mean", "varshare-fixed@mean", "varshare@mean")
WARM, WARM_FIXED, WARM_SHUFFLED = "varshare@warm", "varshare-fixed@warm", "varshare-shuffled@warm"
USED = (*LADDER, WARM, WARM_FIXED, WARM_SHUFFLED)  # those that are played in all ways
EPISODES, ENSEMBLE = 20, 5
NOISE = (0.05, 0.1, 0.2, 0.4)  # standard deviation over the rms of a layer's weights, of each run
PHYSICS = [{name: factor} for name in ("gravity", "length") for factor in (0.7, 1.3)]
PRUNED = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)  # shares of an actor's residuals
KEPT_RETURN = 0.95
FACTOR = 1.25  # two shares of residuals that are kept are the same if they differ by less
SPARSE = "cartpole-goals10-sparse"
FOUND = 50.0  # return of a task, of 500, from which its goal counts as found
AT_HAND = ("goal-0.2", "goal+0.2")  # what half of the starts are within reach of
TRAINING = "training"  # mean return of the training episodes that ended in a tenth of the run


# Playing


def play(agent: nn.Module, weights: Iterable[Tensor], envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """Mean return of each task (task,), in the episodes of the run's own evaluation.

    Args:
        agent: of a script.
        weights: (task, weight), or (task * env, weight), a draw for every episode; of several policies act
            by their average.
        envs: as many of a task as episodes.
        seed: of the run.
    """
    nets = [agent.unpack(W) for W in weights]

    def policy(obs: Tensor) -> Tensor:  # (task, env, obs)
        rows = len(next(iter(nets[0].values())))
        x = obs if rows == len(obs) else obs.flatten(0, 1).unsqueeze(1)
        mean = torch.stack([agent.policy(W, x) for W in nets]).mean(0)
        return mean.flatten(0, 1).unflatten(0, obs.shape[:2])

    return play_episodes(policy, envs, spread_seeds(seed, 1, envs.num_envs)).returns.mean(1)


def change_physics(envs: gym.vector.VectorEnv, gravity: float = 1.0, length: float = 1.0) -> None:
    """Multiply gravity and pole length of all of `envs.cartpole`'s environments."""
    envs.gravity *= gravity
    envs.length *= length
    envs.polemass_length = envs.masspole * envs.length


def of_each(agent: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x (task, weight) after change(live ones) of each task and layer, its matrix and biases apart."""
    x = x.clone()
    parts, lives = agent.unpack(x), agent.unpack(agent.live)
    for name, rows in parts.items():
        for row, live in zip(rows, lives[name]):
            row[live] = change(row[live])
    return x


def prune(theta: Tensor, mu: Tensor, score: Tensor, share: float) -> Tensor:
    """Weights (task, weight) with this share of every task's residuals, the lowest scores, set to 0.

    Residuals with an infinite score stay, and are none of those that the share is of.
    """
    number = round(share * score[0].isfinite().sum().item())
    return theta + mu.scatter(1, score.argsort(1)[:, :number], 0.0)


def played(agent: nn.Module, env_id: str, seed: int, everything: bool) -> Iterator[tuple[str, float, float]]:
    """(what, level, mean return over tasks) of a model with other weights and in other physics."""
    rng = torch.Generator().manual_seed(seed)
    mean = agent.weights()

    def returns(*weights: Tensor, **physics: float) -> float:
        envs = make(env_id, EPISODES)
        change_physics(envs, **physics)
        return play(agent, weights, envs, seed).mean().item()

    def draw(sigma: Tensor) -> Tensor:  # for every episode
        center, spread = (x.expand_as(mean).repeat_interleave(EPISODES, 0) for x in (mean, sigma))
        return center + spread * torch.randn(center.shape, generator=rng)

    yield "mean", 0, returns(mean)
    sigma = torch.as_tensor(getattr(agent, "sigma", 0.0))
    if sigma.any():
        yield "sampled", 0, returns(draw(sigma))
        yield "ensemble", 0, returns(*(draw(sigma) for _ in range(ENSEMBLE)))
    if sigma.ndim:
        layer_rms = of_each(agent, sigma, lambda x: x.square().mean().sqrt())  # as much noise
        yield "layer rms", 0, returns(draw(layer_rms))
        shuffled = of_each(agent, sigma, lambda x: x[torch.randperm(len(x), generator=rng)])
        yield "shuffled", 0, returns(draw(shuffled))
    if not everything:
        return
    parts = agent.unpack(mean).values()
    rms = torch.cat([x.square().mean().sqrt().expand_as(x).flatten(1) for x in parts], 1)
    for level in NOISE:
        yield "noise", level, returns(draw(level * rms))
    for physics in PHYSICS:
        ((name, factor),) = physics.items()
        yield name, factor, returns(mean, **physics)
    # of all (theta + c, mu_m - c), which are the same network, the one with the smallest residuals
    theta, mu = agent.theta + agent.mu.mean(0), agent.mu - agent.mu.mean(0)
    size = mu.abs()
    for name, x in agent.unpack(size).items():
        if name.startswith("critic"):  # has no part in what is played
            x.fill_(torch.inf)
    for share in PRUNED:
        yield "pruned by |mu|", share, returns(prune(theta, mu, size, share))
        if sigma.ndim:
            yield "pruned by |mu| / sigma", share, returns(prune(theta, mu, size / sigma, share))


def play_model(folder: Path) -> None:
    """Play the model in a run's folder; played.csv there says with what return."""
    torch.set_num_threads(1)
    model = read_model(folder)
    args = model["args"]
    agent = load_agent(model, load_script(model["script"]), make(args["env_id"], 1))
    rows = list(played(agent, args["env_id"], args["seed"], everything=args["exp_name"] in USED))
    if "sigma_prior" in args and hasattr(agent, "live"):
        below = agent.sigma[agent.live] < 0.9 * args["sigma_prior"]
        rows.append(("live weights with sigma below 0.9 of the prior's", 0, below.float().mean().item()))
    pd.DataFrame(rows, columns=["what", "level", "value"]).to_csv(folder / "played.tmp", index=False)
    (folder / "played.tmp").rename(folder / "played.csv")


# Collecting


def collect_training(folder: Path) -> pd.DataFrame:
    """Training returns and quantiles of sigma, of all tasks, by tenths of all finished runs."""
    parts = []
    for model in sorted(folder.glob(f"{SUITE}__*/model.pt")):
        config = read_model(model.parent)
        args, log = config["args"], pd.read_csv(model.parent / "heartbeat.csv")
        log = log[(log.task == "mean") & log.metric.str.match("charts/episodic_return|varshare/sigma_q")]
        tenth = args["total_timesteps"] / 10
        step = (np.ceil(log.global_step / tenth).clip(upper=10) * tenth).astype(int)
        log = log.assign(step=step, metric=log.metric.replace("charts/episodic_return", TRAINING))
        means = log.groupby(["metric", "step"]).value.mean().reset_index()
        method, _, setting = args["exp_name"].partition("@")
        if args["exp_name"] not in (LEARNED, "varshare-sac@mean"):  # whose sigma is shown
            means = means[means.metric == TRAINING]
        key = (args["env_id"], args["total_timesteps"], method, setting, args["seed"])
        parts.append(means.assign(**dict(zip(KEY, key)), task="mean"))
    return pd.concat(parts)


def refresh(runs: Path, out: Path) -> None:
    """Play what has not been played, and write runs.csv and played.csv."""
    models = sorted(runs.glob(f"{SUITE}__*/model.pt"))
    new = [x.parent for x in models if not (x.parent / "played.csv").exists()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, _ in enumerate(pool.map(play_model, new), 1):
            print(f"played {i}/{len(new)}", flush=True)
    table = pd.concat((collect(runs, SUITE), collect_training(runs)))
    table["value"] = table["value"].map("{:.5g}".format)
    table.to_csv(out / "runs.csv", index=False)
    parts = []
    for model in models:
        args = read_model(model.parent)["args"]
        key = dict(run=args["exp_name"], env=args["env_id"], seed=args["seed"])
        parts.append(pd.read_csv(model.parent / "played.csv").assign(**key))
    pd.concat(parts).round(3).to_csv(out / "played.csv", index=False)


# Tables


Groups = dict[str, pd.Series]  # name of runs, or of a way to play them -> a number of each seed
# first cells of rows, groups, and pairs of their names
Case = tuple[list[str], Groups, Iterable[tuple[str, str]]]


def compare(cases: Iterable[Case], within: float | None = None) -> list[list[str]]:
    """Rows of a table: the difference of means of each pair, p by Holm over all of them, and the verdict.

    Pairs of which one is missing are left out. within: what counts as the same; by default 5 % of the best.
    """
    rows, differences, margins = [], [], []
    for cells, groups, pairs in cases:
        for x, y in pairs:
            if x in groups and y in groups:
                rows.append([*cells, f"{x} minus {y}"])
                differences.append(difference(groups[x], groups[y]))
                margins.append(within or margin(z.mean() for z in groups.values()))
    corrected = holm([d.p for d in differences])
    return [
        [*row, d.interval.text(1 if within is None else 3), f"{p:.2g}", verdict(d, p, limit)]
        for row, d, p, limit in zip(rows, differences, corrected, margins)
    ]


COMPARED = ["difference", "mean", "p (Holm)", "verdict"]


def final(runs: pd.DataFrame, metric: str = RETURN) -> dict[str, pd.Series]:
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
    return f"{markdown(columns, rows)}\n{markdown(COMPARED, compare([([], values, pairs)]))}"


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
    compared = compare([(["evaluation"], groups, pairs), (["training"], training, trained)])
    return f"{markdown(columns, rows)}\n{markdown(['of', *COMPARED], compared)}"


def values_of(of_run: pd.DataFrame, level: float = 0) -> Groups:
    """Of the rows of one run: way to play -> return by seed."""
    return {x: rows.set_index("seed").value for x, rows in of_run[of_run.level == level].groupby("what")}


def noise_controls(others: pd.DataFrame) -> str:
    """Trained with a learned sigma, played with it, with as much noise in each layer, and shuffled there."""
    names, rows, cases = ("mean", "sampled", "layer rms", "shuffled"), [], []
    below = "live weights with sigma below 0.9 of the prior's"
    for run in (LEARNED, WARM):
        groups = values_of(others[others.run == run])
        if groups:
            cells = [mean_interval(groups[name]).text() for name in names]
            rows.append([run, *cells, f"{groups[below].mean():.0%}"])
            compared = {name: groups[name] for name in names}
            cases.append(([run], compared, [("sampled", name) for name in names if name != "sampled"]))
    return f"{markdown(['run', *names, below], rows)}\n{markdown(['run', *COMPARED], compare(cases))}"


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
    return f"{table}\n{markdown(['case', *COMPARED], compare(cases, MARGIN))}"


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
    compared = compare([([], groups, pairs)], float(np.log10(FACTOR)))
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
    tasks = runs[(runs.metric == RETURN) & ~runs.task.isin(["mean", *AT_HAND])]
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
    able, why = can_tell({x.partition("@")[0] if BLIND in x else x: y for x, y in values.items()}, None)
    head = f"This suite {'can tell' if able else '**cannot tell**'}: {why}.\n"
    return f"{head}\n{markdown(columns, rows)}\n{markdown(COMPARED, compare([([], values, pairs)]))}"


def with_sac(runs: pd.DataFrame) -> str:
    """Returns of fixed and learned sigma, and quantiles of the latter, with SAC."""
    values, training = final(runs), final(runs, TRAINING)
    rows = [
        [name, str(len(x)), mean_interval(x).text(), mean_interval(training[name]).text()]
        for name, x in values.items()
    ]
    quantiles = []
    last = runs[(runs.step == runs.step.max()) & runs.metric.str.startswith("varshare/sigma_q")]
    for layer, of_layer in last.groupby(last.metric.str.rpartition("/")[2]):
        q = of_layer.groupby(of_layer.metric.str.extract("_q([0-9]+)/")[0].astype(int)).value.mean()
        quantiles.append([layer, *(f"{q[x]:.2g}" for x in (1, 50, 99))])
    pairs = [("varshare-sac@mean", "varshare-fixed-sac@mean")]
    text = markdown(["run", "runs", "evaluation", "training, last tenth"], rows)
    text += f"\n{markdown(COMPARED, compare([([], values, pairs)]))}"
    table = markdown(["layer", "1 %", "50 %", "99 %"], quantiles)
    return f"{text}\nSigma among live weights at the end:\n\n{table}"


# Figures

STEPS_OF_LADDER = {
    "l2soft@mean": ("L2Soft", SKY, "-"),
    "varshare-fixed@mean": ("sigma fixed", ORANGE, "-"),
    "varshare@mean": ("sigma learned", BLUE, "-"),
    "varshare@sample": ("sigma learned, samples act", BLUE, ":"),
    WARM: ("ten times sigma, learned", GREEN, "-"),
    WARM_SHUFFLED: ("ten times sigma, shuffled", RED, "--"),
    WARM_FIXED: ("sigma fixed at 0.1", BLACK, ":"),
}


def dense(runs: pd.DataFrame) -> list[str]:
    """The suites but for the one with sparse rewards."""
    return [env for env, _ in suites(runs[~runs.method.str.endswith("-sac")]) if env != SPARSE]


def plot_ladder(runs: pd.DataFrame) -> Figure:
    """Training and evaluation over steps, 95 % intervals, on each suite."""
    envs = dense(runs)
    figure = Figure(figsize=(8.5, 3.2 * len(envs)), layout="constrained")
    axes = figure.subplots(len(envs), 2, squeeze=False)
    names = runs.method + "@" + runs.setting
    for (env, metric), ax in zip(((e, m) for e in envs for m in (TRAINING, RETURN)), axes.flat):
        there = set(names[runs.env == env])
        for name, (label, color, style) in ((x, y) for x, y in STEPS_OF_LADDER.items() if x in there):
            rows = runs[(runs.env == env) & (names == name) & (runs.metric == metric) & (runs.task == "mean")]
            curve = rows.pivot(index="seed", columns="step", values="value")
            mean, low, high = np.array([mean_interval(x) for x in curve.to_numpy().T]).T
            ax.plot(curve.columns, mean, style, color=color, lw=1.8, label=label)
            ax.fill_between(curve.columns, low, high, color=color, alpha=0.12, lw=0)
        if metric == RETURN and (highest := ceiling(env)) is not None:
            ax.axhline(highest, color="0.6", lw=1, ls=":", label="what the tasks allow")
        what = "training episodes" if metric == TRAINING else "evaluations, mean weights"
        ax.set_title(f"{env}: {what}")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    lines, labels = axes[0, 1].get_legend_handles_labels()
    for ax in axes[-1]:
        ax.set_xlabel("environment steps, all tasks together", fontsize=9)
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    return figure


def plot_use(runs: pd.DataFrame, others: pd.DataFrame) -> Figure:
    """Sigma of every layer over training; return under noise, and with residuals set to 0."""
    envs = dense(runs)
    figure = Figure(figsize=(12, 3.3 * len(envs)), layout="constrained")
    axes = figure.subplots(len(envs), 3, squeeze=False)
    for (posterior, noise, pruned), env in zip(axes, envs):
        log = runs[(runs.env == env) & (runs.method == "varshare") & (runs.setting == "mean")]
        layers = [x.rpartition("/")[2] for x in log.metric.unique() if "/sigma_q50/" in x]
        for layer, color in zip(layers, (SKY, BLUE, BLACK, ORANGE, RED, GREEN)):
            q1, q50, q99 = (
                log[log.metric == f"varshare/sigma_q{q}/{layer}"].groupby("step").value.mean()
                for q in (1, 50, 99)
            )
            posterior.plot(q50, color=color, label=layer)
            posterior.fill_between(q1.index, q1, q99, color=color, alpha=0.1, lw=0)
        posterior.set_yscale("log")
        posterior.set_title(f"{env}: sigma among live weights,\nmedian, and 1 to 99 %")
        posterior.xaxis.set_major_formatter(EngFormatter(sep=""))
        posterior.legend(fontsize=7, ncols=2)
        for run in USED:
            label, color, _ = STEPS_OF_LADDER[run]
            of_run = others[(others.env == env) & (others.run == run)]
            curves = {what: rows.groupby("level").value.mean() for what, rows in of_run.groupby("what")}
            if curves:
                noise.plot(pd.concat((curves["mean"], curves["noise"])), marker=".", color=color, label=label)
            for what, style in (("pruned by |mu|", "-"), ("pruned by |mu| / sigma", "--")):
                if what in curves and run in (POINT, LEARNED, WARM):
                    curve = curves[what].iloc[:-1]  # of the last nothing is kept
                    name = what.removeprefix("pruned ").replace("mu", r"$\mu$").replace("sigma", r"$\sigma$")
                    pruned.plot(
                        100 * (1 - curve.index),
                        curve,
                        style,
                        marker=".",
                        color=color,
                        label=f"{label}, {name}",
                    )
        noise.set_title("return under noise, over the size of the weights")
        pruned.set_title("return with so many % of the actor's residuals")
        pruned.set_xscale("log")
        pruned.invert_xaxis()
        pruned.xaxis.set_major_formatter("{x:g}")
        for ax in (noise, pruned):
            ax.set_ylim(bottom=0)
            ax.legend(fontsize=7)
    return figure


def report(runs: pd.DataFrame, others: pd.DataFrame) -> str:
    """All tables."""
    parts = [
        "Whether a suite with dense rewards can tell methods apart is in results/power; it has the control.\n"
    ]
    is_sac = runs.method.str.endswith("-sac")
    for (env, _), rows in suites(runs[~is_sac]).items():
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
            f"## Soft actor-critic: {', '.join(runs[is_sac].env.unique())}\n\n{with_sac(runs[is_sac])}"
        )
    return "\n".join(parts)


def main() -> str:
    """Play and collect, where runs exist, and make tables and figures; returns the tables."""
    out = Path("results", SUITE)
    out.mkdir(parents=True, exist_ok=True)
    if list(Path("runs").glob(f"{SUITE}__*/model.pt")):
        refresh(Path("runs"), out)
    runs, others = pd.read_csv(out / "runs.csv", keep_default_na=False), pd.read_csv(out / "played.csv")
    text = f"{report(runs, others)}\n{len(runs[KEY].drop_duplicates())} runs, one core each"
    hardware, commits = (", ".join(sorted(set(runs[x]) - {""})) for x in ("hardware", "commit"))
    text += f" ({hardware}; commit {commits}).\n"
    (out / "table.md").write_text(text)
    with rc_context(STYLE):
        plot_ladder(runs).savefig(out / "ladder.png")
        plot_use(runs, others).savefig(out / "posterior.png")
    return text
