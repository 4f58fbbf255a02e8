"""Speed end to end without start-up, on one core: bash benchmark.sh speed.

Env steps per second of the PPO trunk under several conditions and of every PPO script on cartpole10; updates
per second of the SAC trunk with larger networks; env steps per second of mt10 and of Meta-World's own.
"""

import argparse
import contextlib
import csv
import importlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import probes

from envs.cartpole import NAMES, SUITES, TASKS, CartPole10, Suite

varshare, sac = map(probes.load_script, ("varshare_ppo.py", "varshare_sac.py"))


class CartPole100(CartPole10):
    """The ten tasks ten times over."""

    num_tasks = 100


def steps_per_second(script, **settings) -> float:
    """charts/SPS of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        folder = script.train(script.Args(**settings | {"eval_episodes": 1, "checkpoint_interval": 1e9}))
    with open(folder / "heartbeat.csv") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "charts/SPS"][-1]


def measure(cases: dict, repeats: int) -> dict[str, float]:
    """Best SPS of each case, (script, settings), all in turn."""
    best = dict.fromkeys(cases, 0.0)
    for repeat in range(repeats):
        for i, (name, (script, settings)) in enumerate(cases.items()):
            sps = steps_per_second(script, run_name=f"{script.__name__}-{repeat}-{i}", **settings)
            best[name] = max(best[name], sps)
            print(f"{name:>40}  {sps:9,.0f} env steps/s", file=sys.stderr, flush=True)
    return best


def ppo(repeats: int) -> None:
    SUITES["cartpole100"] = Suite(TASKS * 10, [f"{copy}-{name}" for copy in range(10) for name in NAMES])
    kwargs = {"suite": "cartpole100"}
    gym.register("cartpole100", vector_entry_point=CartPole100, max_episode_steps=500, kwargs=kwargs)
    cartpole = {"total_timesteps": 500_000}
    lunar = varshare.LUNARLANDER | {"env_id": "lunarlander20", "total_timesteps": 400_000}
    metaworld = varshare.METAWORLD | {"env_id": "mt10", "total_timesteps": 100_000}
    cases = {
        "varshare_ppo.py --compile": (varshare, cartpole | {"compile": True}),
        "varshare_ppo.py, 100 tasks": (varshare, {"env_id": "cartpole100", "total_timesteps": 2_000_000}),
        "varshare_ppo.py --env-id lunarlander20": (varshare, lunar),
        "varshare_ppo.py --env-id mt10": (varshare, metaworld),
    }
    cases = {name: (probes.load_script(name), cartpole) for name in probes.SCRIPTS} | cases
    if torch.cuda.is_available():
        cases["varshare_ppo.py --cuda"] = (varshare, cartpole | {"cuda": True})
    best = measure(cases, repeats)
    reference = best["baselines/hard_sharing_ppo.py"]
    print("| case | env steps/s | Hard sharing is faster by |\n|---|---|---|")
    for name, sps in best.items():
        print(f"| `{name}` | {sps:,.0f} | {'' if '--env-id' in name else f'{reference / sps:.2f}'} |")


def soft_actor_critic(repeats: int) -> None:
    """256 x 256, batches of 128 per task: ten tasks at once, one task ten times as often; mt10 as it is."""
    size = {"hidden_sizes": (256, 256), "learning_starts": 128}
    ten = size | {"total_timesteps": 10 * (128 + 200)}
    one = size | {"tasks": (0,), "total_timesteps": 128 + 2000}
    metaworld = sac.METAWORLD | {"env_id": "mt10", "learning_starts": 128, "total_timesteps": 10 * (128 + 30)}
    cases = {
        "10 tasks": (sac, ten),
        "10 tasks --compile": (sac, ten | {"compile": True}),
        "1 task": (sac, one),
        "10 tasks --env-id mt10": (sac, metaworld),
    }
    if torch.cuda.is_available():
        cases["10 tasks --cuda"] = (sac, ten | {"cuda": True})
    best = measure(cases, repeats)
    print("| varshare_sac.py | updates/s | updates/s times tasks |\n|---|---|---|")
    for name, sps in best.items():  # one update per step of all environments
        print(f"| {name} | {sps / int(name.split()[0]):,.1f} | {sps:,.0f} |")


def meta_world(repeats: int, steps: int = 400) -> None:
    """Four environments of each task, and one as Meta-World has it; random actions, resets, in turns."""
    importlib.import_module("metaworld")  # which registers its own
    envs = [gym.make_vec("mt10", 40), gym.make_vec("Meta-World/MT10", vector_strategy="sync", seed=0)]
    for env in envs:
        env.reset(seed=0)
        env.action_space.seed(0)
    speeds = np.zeros((5 * repeats, 2))
    for repeat, i in np.ndindex(speeds.shape):
        begin = time.perf_counter()
        for _ in range(steps * 10 // envs[i].num_envs):
            envs[i].step(envs[i].action_space.sample())
        speeds[repeat, i] = steps * 10 / (time.perf_counter() - begin)
    print("| | median | lowest | highest |\n|---|---|---|---|")
    rows = {"mt10, env steps/s": speeds[:, 0], "Meta-World/MT10, env steps/s": speeds[:, 1]}
    for name, x in (rows | {"ratio": speeds[:, 0] / speeds[:, 1]}).items():
        digits = 2 if name == "ratio" else 0
        print(f"| {name} |", " | ".join(f"{y:,.{digits}f}" for y in (np.median(x), x.min(), x.max())), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, in turn; the best counts")
    parser.add_argument("--only", choices=("ppo", "sac", "mt10"), help="one of the tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, measure_all in (("ppo", ppo), ("sac", soft_actor_critic), ("mt10", meta_world)):
            if args.only in (None, name):
                measure_all(args.repeats)


if __name__ == "__main__":
    main()
