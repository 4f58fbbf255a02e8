"""How every script is evaluated: one protocol, so that no method can have a kinder one."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np
import torch

from envs.vector import check_reports, final_success

# (task, episode) each; successes are NaN where environments do not report any
Evaluation = namedtuple("Evaluation", "returns lengths successes")
MAX_STEPS = 10_000  # of an episode, where an environment is registered without a max_episode_steps


def spread_seeds(seed: int, stream: int, num_envs: int) -> list[int]:
    """Independent seeds for the environments of one run, from its seed and the number of a stream.

    Gymnasium's own seed + i would give runs of neighbouring seeds almost the same episodes.
    """
    return np.random.SeedSequence([seed, stream]).generate_state(num_envs).tolist()


def greedy(policy: torch.Tensor, space: gym.Space) -> torch.Tensor:
    """The deterministic action of a policy: the likeliest of (..., action) probabilities, or Box actions."""
    if isinstance(space, gym.spaces.Discrete):
        return policy.argmax(-1)
    low, high = (torch.from_numpy(x).to(policy) for x in (space.low, space.high))
    return policy.clamp(low, high)


@torch.no_grad()
def play_episodes(
    policy: Callable[[torch.Tensor], torch.Tensor], envs: gym.vector.VectorEnv, seeds: Sequence[int]
) -> Evaluation:
    """Play one episode in each environment, with deterministic actions.

    One episode an environment, not the first episodes to end, which would favour short ones. An episode
    that does not end is cut after the steps that its environment is registered with, or `MAX_STEPS`.

    Args:
        policy: observations (task, env, obs) -> what `greedy` takes, (task, env, action).
        envs: from `envs.make`; its environments are reset, with these seeds.

    Returns:
        Undiscounted returns, lengths in steps, and successes as final_info's "success" reports them.
    """
    obs, _ = envs.reset(seed=list(seeds))
    returns, lengths, successes = np.full((3, envs.num_envs), np.nan)
    running = np.ones(envs.num_envs, dtype=bool)
    limit, step = envs.max_episode_steps or MAX_STEPS, 0
    while running.any() and step < limit:
        policies = policy(torch.from_numpy(obs).view(envs.num_tasks, envs.envs_per_task, -1))
        actions = greedy(policies, envs.single_action_space)
        obs, _, terminated, truncated, infos = envs.step(actions.flatten(0, 1).cpu().numpy())
        step += 1
        first = (terminated | truncated) & running
        if first.any():
            episode = infos["final_info"]["episode"]
            returns[first], lengths[first] = episode["r"][first], episode["l"][first]
            successes[first] = np.broadcast_to(final_success(infos), envs.num_envs)[first]
            running &= ~first
    if running.any():
        returns[running], lengths[running] = envs.episode_returns[running], envs.episode_lengths[running]
        line = f"evaluation: {running.sum()} of {envs.num_envs} episodes were cut after {limit:,} steps"
        print(f"{line}; an environment is registered with its max_episode_steps", file=sys.stderr)
        successes[running] = 0 if np.isfinite(successes).any() else np.nan
    check_reports(successes)
    return Evaluation(*(x.reshape(envs.num_tasks, -1) for x in (returns, lengths, successes)))


def evaluate(agent: torch.nn.Module, envs: gym.vector.VectorEnv, seed: int) -> Evaluation:
    """Play with an agent's mean weights, one episode in each environment; the environments are reset.

    The episodes are those of the run's stream 1, whose seeds training does not use: the same whenever it is
    asked during a run.
    """
    W = agent.unpack(agent.weights().detach())
    device = next(agent.parameters()).device
    seeds = spread_seeds(seed, 1, envs.num_envs)
    return play_episodes(lambda obs: agent.policy(W, obs.to(device)), envs, seeds)
