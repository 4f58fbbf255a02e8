"""Normalisation of observations and of the critic's targets, the same for every script."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """Running mean and standard deviation; x -> (x - mean) / std, and back.

    Nothing changes the numbers until `see` has seen some, nor ever if it is switched off. What has been seen
    is part of the module's state, so that models and checkpoints hold it.
    """

    def __init__(self, shape: tuple[int, ...], on: bool, decay: float = 1.0, limit: float = math.inf):
        """Start as the identity.

        Args:
            shape: of the mean, e.g. (obs,) for a mean of every dimension.
            on: else it stays the identity.
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
        """Take in numbers (..., *shape)."""
        if not self.on:
            return
        x = x.reshape(-1, *self.mean.shape).double()
        new = torch.stack((torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)), dim=-1)
        self.sums.mul_(self.decay).add_(new)
        count, total, squares = self.sums.unbind(-1)
        self.mean.copy_(total / count)
        self.std.copy_(((squares / count - (total / count).square()).clamp(min=0) + 1e-8).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., *shape)."""
        return ((x - self.mean) / self.std).clamp(-self.limit, self.limit) if self.on else x

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward`, but for the clipping."""
        return x * self.std + self.mean if self.on else x
