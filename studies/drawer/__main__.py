"""Why does the drawer of MT10 stay shut? Saved models act, then a script presses down and pulls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro

import enjoy
from envs import make
from envs.metaworld import make_task

DRAWER, NUMBER_OF_TASKS = 4, 10
ACTS, PULLS = 250, 80  # steps of the policy, and of pulling
DOWN = (0, 10)  # steps of pressing down before pulling
GOALS = range(0, 50, 10)

Policy = Callable[[np.ndarray], np.ndarray]  # observation -> action


def policy_of(run: Path) -> Policy:
    """That of a saved model for opening the drawer, with mean weights."""
    model = enjoy.read_model(run)
    agent = enjoy.load_agent(model, enjoy.load_script(model["script"]), make("mt10", 1))
    W = agent.unpack(agent.weights())

    def policy(obs: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(obs).float().expand(NUMBER_OF_TASKS, 1, len(obs))
        return agent.policy(W, x)[DRAWER, 0].numpy().clip(-1, 1)

    return policy


def pull(policy: Policy, goal: int, down: int) -> tuple[float, float, float]:
    """Reward when the policy stops, the lowest from there on, and by how many cm the drawer has opened."""
    env, rewards = make_task(DRAWER), []
    obs = start = env.restart(goal)
    for step in range(ACTS + down + PULLS):
        if step < ACTS:
            action = policy(obs)
        else:
            action = np.float32([0, 0, -1, 0] if step < ACTS + down else [0, -1, 0, 0])
        obs, reward, *_ = env.step(action)
        rewards.append(reward)
    return rewards[ACTS - 1], min(rewards[ACTS:]), 100 * (start[5] - obs[5])


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Pull the drawer from where saved models of mt10 leave the hand.

    Args:
        runs: folders of finished runs
    """
    for run in runs:
        policy = policy_of(run)
        for goal in GOALS:
            for down in DOWN:
                at_rest, lowest, opened = pull(policy, goal, down)
                print(f"{run.name} {goal} {down} reward {at_rest:.1f}, then at least {lowest:.1f}, ", end="")
                print(f"opened {opened:.1f} cm")


if __name__ == "__main__":
    tyro.cli(main)
