"""Env steps per second of the scripts, end to end without start-up, on one core: bash benchmark.sh speed."""

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
import varshare_ppo as script
from envs.cartpole import CartPole10


class CartPole100(CartPole10):
    """The ten tasks ten times over."""

    num_tasks = 100
    all_tasks = CartPole10.all_tasks * 10
    all_names = [f"{copy}-{name}" for copy in range(10) for name in CartPole10.all_names]


class NoNoiseAgent(script.Agent):
    """No sampling and no KL: theta + mu_m alone."""

    def __init__(self, *args):
        super().__init__(*args)
        self.logvar.requires_grad_(False)

    def draw_noise(self, rng):
        return None


def no_noise_loss(agent, noise, batch, args):
    loss, stats = script.ppo_loss(agent, agent.unpack(agent.weights()), batch, args)
    return loss.sum(), stats


def steps_per_second(**settings) -> float:
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
    lunar = script.LUNARLANDER | {"env_id": "lunarlander20", "total_timesteps": 400_000}
    cases = {
        "cartpole10": {"total_timesteps": 500_000},
        "cartpole10, no sampling, no KL": {"total_timesteps": 500_000},
        "cartpole10 --compile": {"total_timesteps": 500_000, "compile": True},
        "100 tasks": {"env_id": "cartpole100", "total_timesteps": 2_000_000},
        "lunarlander20": lunar,
    }
    if torch.cuda.is_available():
        cases["cartpole10 --cuda"] = {"total_timesteps": 500_000, "cuda": True}
    best = dict.fromkeys(cases, 0.0)
    plain = script.Agent, script.objective
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for repeat in range(repeats):
            for i, (name, settings) in enumerate(cases.items()):
                bare = "no sampling" in name
                script.Agent, script.objective = (NoNoiseAgent, no_noise_loss) if bare else plain
                sps = steps_per_second(run_name=f"{repeat}-{i}", **settings)
                best[name] = max(best[name], sps)
                print(f"{name:>32}  {sps:9,.0f} env steps/s", file=sys.stderr, flush=True)
    print("| case | env steps/s |\n|---|---|")
    for name, sps in best.items():
        print(f"| {name} | {sps:,.0f} |")


if __name__ == "__main__":
    main()
