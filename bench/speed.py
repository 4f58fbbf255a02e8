"""Speed end to end without start-up, on one core: bash benchmark.sh speed.

Env steps per second of every PPO script on cartpole10 and of VarShare-PPO in other conditions; updates per
second of VarShare-SAC with larger networks; mt10 beside Meta-World's own vector environment.
"""

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

from bench.collect import read_run
from bench.methods import METHODS, ROOT
from bench.tables import markdown
from envs.cartpole import NAMES, TASK_SETS, TASKS, CartPole10, TaskSet


class CartPole100(CartPole10):
    """The ten tasks ten times over."""

    num_tasks = 100


names = [f"{copy}-{name}" for copy in range(10) for name in NAMES]
TASK_SETS["cartpole100"] = TaskSet(TASKS * 10, names)
kwargs = {"task_set": "cartpole100"}
gym.register("cartpole100", vector_entry_point=CartPole100, max_episode_steps=500, kwargs=kwargs)

HARD_SHARING = "baselines/hard_sharing_ppo.py"
CARTPOLE = "--env-id cartpole10 --total-timesteps 500000"
PPO = {
    m.script: CARTPOLE
    for m in METHODS.values()
    if m.script.startswith("baselines/") and m.script.endswith("_ppo.py")
}
PPO |= {  # case -> flags
    "varshare_ppo.py": CARTPOLE,
    "varshare_ppo.py --compile": CARTPOLE,
    "varshare_ppo.py --env-id bench.speed:cartpole100": "--total-timesteps 2000000",
    "varshare_ppo.py --env-id lunarlander20": "--total-timesteps 400000",
    "varshare_ppo.py --env-id mt10": "--total-timesteps 100000",
}
LARGE = "--learning-starts 128 --env-id cartpole10 --hidden-sizes 256 256"
SAC = {  # one update per step of all environments
    "varshare_sac.py": f"{LARGE} --total-timesteps 3280",
    "varshare_sac.py --compile": f"{LARGE} --total-timesteps 3280",
    "varshare_sac.py --tasks 0": f"{LARGE} --total-timesteps 2128",
    "varshare_sac.py --env-id mt10": "--learning-starts 128 --total-timesteps 1580",
}


def run(command: str) -> tuple[float, int]:
    """Env steps per second of a run, and its number of tasks."""
    more = ["--eval-episodes", "1", "--checkpoint-interval", "1e9", "--run-name", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / command.split()[0]), *command.split()[1:], *more]
        subprocess.run(argv, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        found = read_run(Path(folder, "runs/run"))
    return found.values("charts/SPS")["mean"].iloc[-1], len(found.tasks)


def measure(cases: dict[str, str], repeats: int) -> dict[str, tuple[float, int]]:
    """The best run of each case, all in turn."""
    best = dict.fromkeys(cases, (0.0, 0))
    for case, flags in [*cases.items()] * repeats:
        best[case] = max(best[case], run(f"{case} {flags}"))
        print(f"{case:>50}  {best[case][0]:9,.0f} env steps/s", file=sys.stderr, flush=True)
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
    ours, theirs = speeds.T
    rows = {"mt10, env steps/s": ours, "Meta-World/MT10, env steps/s": theirs, "ratio": ours / theirs}
    rows = [[name, *(f"{f(x):,.2f}" for f in (np.median, min, max))] for name, x in rows.items()]
    print(markdown(["", "median", "lowest", "highest"], rows))


def main(repeats: int = 3, only: Literal["ppo", "sac", "mt10", ""] = "") -> None:
    """Measure all cases in turn, and print the best of each.

    Args:
        repeats: runs of each case.
        only: one of the tables.
    """
    if only in ("", "ppo"):
        best = measure(PPO, repeats)
        rows = [[f"`{x}`", f"{s:,.0f}", f"{best[HARD_SHARING][0] / s:.2f}"] for x, (s, _) in best.items()]
        print(markdown(["case", "env steps/s", "Hard sharing is faster by"], rows))
    if only in ("", "sac"):
        best = measure(SAC, repeats)
        rows = [[f"`{x}`", f"{s / tasks:,.1f}", f"{s:,.0f}"] for x, (s, tasks) in best.items()]
        print(markdown(["case", "updates/s", "updates/s times tasks"], rows))
    if only in ("", "mt10"):
        meta_world(repeats)


if __name__ == "__main__":
    tyro.cli(main)
