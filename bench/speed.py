"""Speed end to end without start-up, on one core: bash benchmark.sh speed.

Env steps per second of every PPO script on cartpole10 and of VarShare-PPO in other conditions; updates per
second of VarShare-SAC with larger networks. Every case is a run of its own, from the script's command line.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
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


def main(repeats: int = 3) -> None:
    """Measure all cases in turn, and print the best of each.

    Args:
        repeats: runs of each case.
    """
    best = dict.fromkeys((*PPO, *SAC), 0.0)
    for _ in range(repeats):
        for name, command in (PPO | SAC).items():
            best[name] = max(best[name], steps_per_second(command))
            print(f"{name:>40}  {best[name]:9,.0f} env steps/s", file=sys.stderr, flush=True)
    print("| case | env steps/s |\n|---|---|")
    for name in PPO:
        print(f"| `{name}` | {best[name]:,.0f} |")
    print("\n| varshare_sac.py | updates/s | updates/s times tasks |\n|---|---|---|")
    for name in SAC:
        print(f"| {name} | {best[name] / int(name.split()[0]):,.1f} | {best[name]:,.0f} |")


if __name__ == "__main__":
    tyro.cli(main)
