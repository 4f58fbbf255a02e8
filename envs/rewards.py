"""Scaling of rewards, the same for every script."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def scale_rewards(stats: Tensor, rewards: Tensor, done: Tensor, running: Tensor, gamma: float) -> Tensor:
    """Divide rewards by the running standard deviation of the discounted return of their task.

    As Gymnasium's NormalizeReward, but with one estimate for all environments of a task, brought up to date
    with a whole rollout before it is used.

    Args:
        stats: (task, 3) float64, count, sum and sum of squares of the discounted return; updated in place.
        rewards, done: (step, task, env), of a rollout.
        running: (task, env), the discounted return so far of the running episodes; updated in place.
        gamma: discount.

    Returns:
        The scaled rewards (step, task, env).
    """
    seen = torch.empty_like(rewards)
    for t in range(len(rewards)):
        seen[t] = running.mul_(gamma).add_(rewards[t])
        running *= 1 - done[t]
    seen = seen.transpose(0, 1).flatten(1).double()
    stats += torch.stack((torch.ones_like(seen), seen, seen.square())).sum(2).T
    count, total, squares = stats.T
    std = ((squares / count - (total / count).square()).clamp(min=0) + 1e-8).sqrt()
    return rewards / std.float().unsqueeze(1)
