"""Env steps per second, end to end without start-up, on one core: bash benchmark.sh speed.

The trunks under several conditions, and every script on cartpole10.
"""

import argparse
import contextlib
import csv
import io
import os
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import probes

from envs.cartpole import CartPole10

varshare = probes.load_script("varshare_ppo.py")
PLAIN = varshare.Agent, varshare.objective


class CartPole100(CartPole10):
    """The ten tasks ten times over."""

    num_tasks = 100
    all_tasks = CartPole10.all_tasks * 10
    all_names = [f"{copy}-{name}" for copy in range(10) for name in CartPole10.all_names]


class NoNoiseAgent(varshare.Agent):
    """No sampling and no KL: theta + mu_m alone."""

    def __init__(self, *args):
        super().__init__(*args)
        self.logvar.requires_grad_(False)

    def draw_noise(self, rng):
        return None


def no_noise_objective(agent, noise, batch, args):
    loss, stats = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, args)
    return loss.sum(), stats


def steps_per_second(script, **settings) -> float:
    """charts/SPS of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        folder = script.train(script.Args(eval_episodes=1, checkpoint_interval=1e9, **settings))
    with open(folder / "heartbeat.csv") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "charts/SPS"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, in turn; the best counts")
    repeats = parser.parse_args().repeats
    gym.register("cartpole100", vector_entry_point=CartPole100, max_episode_steps=500)
    cartpole = {"total_timesteps": 500_000}
    lunar = varshare.LUNARLANDER | {"env_id": "lunarlander20", "total_timesteps": 400_000}
    cases = {
        "varshare_ppo.py, no sampling, no KL": (varshare, cartpole),
        "varshare_ppo.py --compile": (varshare, cartpole | {"compile": True}),
        "varshare_ppo.py, 100 tasks": (varshare, {"env_id": "cartpole100", "total_timesteps": 2_000_000}),
        "varshare_ppo.py --env-id lunarlander20": (varshare, lunar),
    }
    cases = {name: (probes.load_script(name), cartpole) for name in probes.SCRIPTS} | cases
    if torch.cuda.is_available():
        cases["varshare_ppo.py --cuda"] = (varshare, cartpole | {"cuda": True})
    best = dict.fromkeys(cases, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for repeat in range(repeats):
            for i, (name, (script, settings)) in enumerate(cases.items()):
                bare = "no sampling" in name
                varshare.Agent, varshare.objective = (NoNoiseAgent, no_noise_objective) if bare else PLAIN
                sps = steps_per_second(script, run_name=f"{repeat}-{i}", **settings)
                best[name] = max(best[name], sps)
                print(f"{name:>40}  {sps:9,.0f} env steps/s", file=sys.stderr, flush=True)
    reference = best["baselines/hard_sharing_ppo.py"]
    print("| case | env steps/s | Hard sharing is faster by |\n|---|---|---|")
    for name, sps in best.items():
        print(f"| `{name}` | {sps:,.0f} | {'' if 'lunarlander' in name else f'{reference / sps:.2f}'} |")


if __name__ == "__main__":
    main()
