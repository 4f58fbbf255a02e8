"""The runs of the suites that are no comparison of searched methods.

A run's --exp-name is method@setting. The tables are made by bench/controls.py and bench/posterior.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bench.launch import Job, job
from bench.methods import Settings, parse_flags
from bench.suites import SEEDS, Suite

GOALS = ("cartpole-goals10", "cartpole-goals-physics10")


def prior(beta: float, penalty: float, samples: int = 1024) -> str:
    """The sigma_prior at which lambda = beta / (2 N_m sigma_prior^2) is this penalty."""
    return f"{math.sqrt(beta / (2 * samples * penalty)):.3g}"


def power() -> Iterator[Job]:
    """CartPoles at three step sizes, of which each method's best counts; landers at one."""
    for seed in range(1, 6):
        for env in ("cartpole10", "cartpole-identical10", *GOALS):
            for rate in ("0.003", "0.006", "0.012"):
                for method in ("task-blind", "independent", "hard-sharing", "varshare"):
                    settings = {"learning-rate": rate, "eval-interval": "50000"}
                    yield of_setting("power", env, 500_000, f"{method}@{rate}", seed, settings)
    for seed in range(1, 4):
        for env in ("lunarlander20-goals", "lunarlander20"):
            for method in ("task-blind", "hard-sharing", "varshare"):
                settings = {"learning-rate": "0.003", "eval-interval": "200000"}
                yield of_setting("power", env, 2_000_000, f"{method}@0.003", seed, settings)


def of_setting(suite: str, env: str, steps: int, method: str, seed: int, settings: Settings) -> Job:
    """A run of a suite."""
    return job(f"{suite}__{env}__{steps}__{method}", method, env, steps, seed, settings)


def ceilings() -> Iterator[Job]:
    """A million steps of each task, an agent of its own."""
    for seed in (1, 2, 3):
        for env in (*GOALS, "lunarlander20-goals"):
            steps = 20_000_000 if env.startswith("lunar") else 10_000_000
            yield of_setting("ceilings", env, steps, "independent", seed, {"ent-coef": "0.01"})


def normalisation() -> Iterator[Job]:
    """With and without --norm-obs and --norm-value; L2Soft and VarShare with the same penalty."""
    for env in (*GOALS, "lunarlander20-goals"):
        lander = env.startswith("lunar")
        steps, rate = (2_000_000, "0.003") if lander else (500_000, "0.006")
        own = {"l2soft": {"l2-coef": "0.01"}}
        own["varshare"] = {"beta": "0.001", "sigma-prior": prior(0.001, 0.01, 512 if lander else 1024)}
        for seed in SEEDS:
            for setting in ("none", "obs", "value", "obs+value"):
                settings = {"learning-rate": rate}
                for name in ("obs", "value"):
                    settings[f"norm-{name}" if name in setting else f"no-norm-{name}"] = ""
                for method in ("task-blind", "hard-sharing", "l2soft", "varshare"):
                    named = f"{method}@{setting}"
                    yield of_setting("normalisation", env, steps, named, seed, settings | own.get(method, {}))


def noise() -> Iterator[Job]:
    """Penalties lambda, and beyond each how noisy: VarShare by beta, fixed sigmas, and L2Soft without any."""
    rate = {"learning-rate": "0.012"}
    for seed in SEEDS:
        for env in GOALS:
            for penalty in ("0.001", "0.003", "0.01", "0.03"):
                yield of_setting(
                    "noise", env, 500_000, f"l2soft@{penalty}", seed, rate | {"l2-coef": penalty}
                )
                low = penalty in ("0.001", "0.003")  # the better ones
                for beta in ("0.0001",) * low + ("0.001", "0.01", "0.1") + ("1",) * (penalty == "0.01"):
                    settings = rate | {"beta": beta, "sigma-prior": prior(float(beta), float(penalty))}
                    yield of_setting("noise", env, 500_000, f"varshare@{penalty},{beta}", seed, settings)
                for sigma in ("0.001", "0.003", "0.01", "0.03") * low:
                    settings = rate | {"l2-coef": penalty, "sigma": sigma}
                    yield of_setting(
                        "noise", env, 500_000, f"varshare-fixed@{penalty},{sigma}", seed, settings
                    )


def posterior() -> Iterator[Job]:
    """What a learned sigma buys, at lambda 0.003; "warm": ten times the sigma; SAC at its defaults."""
    seeds = range(21, 31)
    base = {"learning-rate": "0.012", "eval-interval": "100000"}
    point = {"l2-coef": "0.003"}
    fixed = point | {"sigma": "0.003"}  # the best of the noise suite
    as_wide = point | {"sigma": "0.0128"}  # as the median of those learned
    learned = {"beta": "0.001", "sigma-prior": prior(0.001, 0.003)}
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
        for env, methods in {**dict.fromkeys(GOALS, ladder), "cartpole-goals10-sparse": sparse}.items():
            for method, own in methods.items():
                yield of_setting("posterior", env, 500_000, method, seed, base | own)
    for seed in seeds[:3]:
        for method, own in {"varshare-sac": {}, "varshare-fixed-sac": {"sigma": "0.01"}}.items():
            settings = {"eval-interval": "40000"} | own
            yield of_setting("posterior", GOALS[0], 200_000, f"{method}@mean", seed, settings)


def serial() -> Iterator[Job]:
    """One environment of each task or eight, different tasks or identical ones; settings of one search."""
    chosen = Suite("cartpole-goals10").chosen
    for seed in range(1, 11):
        for env in ("cartpole-goals10", "cartpole-identical10"):
            for method in ("task-blind", "hard-sharing", "contextual", "l2soft", "varshare"):
                for number in ("1", "8"):
                    settings = chosen[method] | {"envs-per-task": number, "eval-interval": "50000"}
                    settings |= {"norm-value": ""}  # on both
                    yield of_setting("serial", env, 500_000, f"{method}@{number}", seed, settings)


def ranks() -> Iterator[Job]:
    """LoRA by its rank, with the settings that the search chose but for it, and VarShare of full rank."""
    suite = Suite("cartpole-goals-physics10")
    for seed in range(1, 11):
        for rank in ("1", "2", "4", "8"):
            settings = suite.complete(suite.chosen["varshare-lora"] | {"rank": rank})
            yield of_setting("ranks", suite.env_id, suite.steps, f"varshare-lora@{rank}", seed, settings)
        settings = suite.complete(suite.chosen["varshare"])
        yield of_setting("ranks", suite.env_id, suite.steps, "varshare@full", seed, settings)


RECIPES = {  # setting -> what differs from the scripts' settings for mt10 and lambda 0.95
    "base": "",
    "no critic norm": "--no-norm-critic",
    "2 environments": "--envs-per-task 2",
    "16 epochs": "--update-epochs 16",
    "annealed": "--anneal-lr",
    "entropy 0.003": "--ent-coef 0.003",
    "lambda 0.97": "--gae-lambda 0.97",
    "lambda 0.99": "--gae-lambda 0.99",
    "lambda 0.97 entropy 0.003": "--gae-lambda 0.97 --ent-coef 0.003",
    "256 x 256": "--hidden-sizes 256 256",
    "clip norm 10": "--max-grad-norm 10",
}


def recipe() -> Iterator[Job]:
    """What helps PPO on Meta-World, a change at a time: of a baseline, so that VarShare is not favoured."""
    for seed in SEEDS:
        for setting, flags in RECIPES.items():
            settings = {"gae-lambda": "0.95", "eval-episodes": "20"} | parse_flags(flags)
            method = f"hard-sharing@{setting.replace(' ', '-')}"
            yield of_setting("recipe", "mt10", 1_000_000, method, seed, settings)


STUDIES = (power, ceilings, normalisation, noise, posterior, serial, ranks, recipe)
STUDIES = {f.__name__: f for f in STUDIES}
