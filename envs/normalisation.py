"""Normalisation of observations, of the critic's targets and of rewards, the same for every script."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from envs.metrics import Episodes


class RunningNorm(nn.Module):
    """Running mean and standard deviation; x -> (x - mean) / std, and back.

    What has been seen is part of the module's state, so that models and checkpoints hold it.
    """

    def __init__(self, shape: tuple[int, ...], on: bool, decay: float = 1.0, limit: float = math.inf):
        """Start as the identity, and stay it if not `on`.

        Args:
            shape: of the mean: (obs,) for one of every dimension, (task, 1) for one of every task.
            decay: of the weight of what was seen before, at every call of `see`.
            limit: normalised numbers are clipped to -limit .. limit.
        """
        super().__init__()
        self.on, self.decay, self.limit = on, decay, limit
        # count, sum and sum of squares
        self.register_buffer("sums", torch.zeros(*shape, 3, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take in numbers of a shape that the mean's broadcasts to: (..., obs), or (task, sample)."""
        if not self.on:
            return
        x, shape = x.double(), self.mean.shape
        new = (torch.ones_like(x), x, x.square())
        self.sums.mul_(self.decay).add_(torch.stack([y.sum_to_size(shape) for y in new], dim=-1))
        mean, std = mean_and_std(self.sums)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., obs), or (task, sample)."""
        return ((x - self.mean) / self.std).clamp(-self.limit, self.limit) if self.on else x

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward`, except for the clipping."""
        return x * self.std + self.mean if self.on else x


def mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of count, sum and sum of squares, (..., 3)."""
    count, total, squares = sums.unbind(-1)
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return total / count, (variance + 1e-8).sqrt()


@torch.no_grad()
def scale_rewards(stats: Tensor, rewards: Tensor, done: Tensor, episodes: Episodes, gamma: float) -> Tensor:
    """Divide rewards by the running standard deviation of the discounted return of their task.

    Gymnasium's NormalizeReward, with one estimate for all environments of a task, brought up to date with a
    whole rollout before it is used.

    Args:
        stats: (task, 3) float64, count, sum and sum of squares of the discounted return; updated in place.
        rewards, done: (step, task, env), of a rollout.
        episodes: the running ones, whose discounted returns so far are updated in place.

    Returns:
        The scaled rewards (step, task, env).
    """
    seen, running = torch.empty_like(rewards), episodes.discounted
    for t in range(len(rewards)):
        seen[t] = running.mul_(gamma).add_(rewards[t])
        running *= 1 - done[t]
    seen = seen.transpose(0, 1).flatten(1).double()
    stats += torch.stack((torch.ones_like(seen), seen, seen.square())).sum(2).T
    return rewards / mean_and_std(stats)[1].float().unsqueeze(1)
