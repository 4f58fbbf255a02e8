"""Speed end to end without start-up, on one core: bash benchmark.sh speed.

Env steps per second of every PPO script on cartpole10 and of VarShare-PPO in other conditions; updates per
second of VarShare-SAC with larger networks; mt10 beside Meta-World's own vector environment. Every case
of the first two is a run of its own, from the script's command line.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import tyro

from bench.methods import METHODS, ROOT
from envs.cartpole import CartPole10


class CartPole100(CartPole10):
    """The ten tasks ten times over."""

    num_tasks = 100
    all_tasks = CartPole10.all_tasks * 10
    all_names = [f"{copy}-{name}" for copy in range(10) for name in CartPole10.all_names]


gym.register("cartpole100", vector_entry_point=CartPole100, max_episode_steps=500)

CARTPOLE = "--env-id cartpole10 --total-timesteps 500000"
PPO = {  # case -> script and flags
    **{m.script: f"{m.script} {CARTPOLE}" for m in METHODS.values() if m.script.startswith("baselines/")},
    "varshare_ppo.py": f"varshare_ppo.py {CARTPOLE}",
    "varshare_ppo.py --compile": f"varshare_ppo.py {CARTPOLE} --compile",
    "100 tasks": "varshare_ppo.py --env-id bench.speed:cartpole100 --total-timesteps 2000000",
    "lunarlander20": "varshare_ppo.py --env-id lunarlander20 --total-timesteps 400000",
    "mt10": "varshare_ppo.py --env-id mt10 --total-timesteps 100000",
}
ELSEWHERE = ("lunarlander20", "mt10")  # not on CartPoles
LARGE = "varshare_sac.py --env-id cartpole10 --learning-starts 128 --hidden-sizes 256 256"
SAC = {  # one update per step of all environments
    "10 tasks": f"{LARGE} --total-timesteps 3280",
    "10 tasks --compile": f"{LARGE} --total-timesteps 3280 --compile",
    "1 task": f"{LARGE} --total-timesteps 2128 --tasks 0",
    "10 tasks of mt10": "varshare_sac.py --env-id mt10 --learning-starts 128 --total-timesteps 1580",
}


def steps_per_second(command: str) -> float:
    """charts/SPS of a run."""
    more = ["--eval-episodes", "1", "--checkpoint-interval", "1e9", "--run-name", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / command.split()[0]), *command.split()[1:], *more]
        subprocess.run(argv, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        with open(Path(folder, "runs/run/heartbeat.csv")) as file:
            return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "charts/SPS"][-1]


def measure(cases: dict[str, str], repeats: int) -> dict[str, float]:
    """Best steps per second of each case, all in turn."""
    best = dict.fromkeys(cases, 0.0)
    for _ in range(repeats):
        for name, command in cases.items():
            best[name] = max(best[name], steps_per_second(command))
            print(f"{name:>40}  {best[name]:9,.0f} env steps/s", file=sys.stderr, flush=True)
    return best


def meta_world(repeats: int, steps: int = 400) -> None:
    """Four environments of each task, and one as Meta-World has it; random actions, resets, in turns."""
    own = gym.make_vec("metaworld:Meta-World/MT10", vector_strategy="sync", seed=0)
    envs = [gym.make_vec("mt10", 40), own]
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
        print(f"| {name} | {np.median(x):,.2f} | {x.min():,.2f} | {x.max():,.2f} |")


def main(repeats: int = 3, only: Literal["ppo", "sac", "mt10", ""] = "") -> None:
    """Measure all cases in turn, and print the best of each.

    Args:
        repeats: runs of each case.
        only: one of the tables.
    """
    if only in ("", "ppo"):
        best = measure(PPO, repeats)
        reference = best["baselines/hard_sharing_ppo.py"]
        print("| case | env steps/s | Hard sharing is faster by |\n|---|---|---|")
        for name, x in best.items():
            print(f"| `{name}` | {x:,.0f} | {'' if name in ELSEWHERE else f'{reference / x:.2f}'} |")
    if only in ("", "sac"):
        print("| varshare_sac.py | updates/s | updates/s times tasks |\n|---|---|---|")
        for name, x in measure(SAC, repeats).items():
            print(f"| {name} | {x / int(name.split()[0]):,.1f} | {x:,.0f} |")
    if only in ("", "mt10"):
        meta_world(repeats)


if __name__ == "__main__":
    tyro.cli(main)
