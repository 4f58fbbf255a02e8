"""The replay buffer of the off-policy scripts."""

from __future__ import annotations

import math
import os

import gymnasium as gym
import torch
from torch import Tensor

from envs.settings import fail


def memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class ReplayBuffer:
    """The newest transitions of every task, a ring: (task, step % capacity, env, ...).

    Attributes:
        steps: steps of all environments that it has seen.
    """

    def __init__(self, envs: gym.vector.VectorEnv, capacity: int, device: torch.device):
        obs, space = envs.single_observation_space.shape, envs.single_action_space
        shapes = {"obs": obs, "next_obs": obs, "actions": space.shape, "rewards": (), "terminated": ()}
        dtypes = {"actions": torch.int64} if isinstance(space, gym.spaces.Discrete) else {}
        ring = (envs.num_tasks, capacity, envs.envs_per_task)
        numbers = sum(math.prod(shape) * (1 + (name in dtypes)) for name, shape in shapes.items())
        gibibytes, total = 4 * math.prod(ring) * numbers / 2**30, memory(device) / 2**30
        if 2 * gibibytes > total:  # a checkpoint takes a copy
            needed = f"the replay buffer needs {gibibytes:,.1f} GiB, and as much while it is saved"
            fail(f"{needed}; here are {total:.1f}: reduce --buffer-size")
        each = f"{capacity * envs.envs_per_task:,} transitions of each task"
        print(f"replay buffer: {each}, {gibibytes:.3f} GiB")
        self.data = {
            name: torch.zeros(*ring, *shape, dtype=dtypes.get(name), device=device)
            for name, shape in shapes.items()
        }
        self.capacity, self.steps = capacity, 0
        self.task = torch.arange(envs.num_tasks, device=device).unsqueeze(1)

    def add(self, *transition: Tensor) -> None:
        """Store what one step of all environments has seen: obs, ..., terminated, (task, env, ...) each."""
        for x, new in zip(self.data.values(), transition, strict=True):
            x[:, self.steps % self.capacity] = new.view_as(x[:, 0])
        self.steps += 1

    def clear(self) -> None:
        """Forget everything."""
        self.steps = 0

    def num_stored(self) -> int:
        """N_m, the transitions of each task that are in it."""
        return min(self.steps, self.capacity) * self.data["rewards"].shape[2]

    def sample(self, batch_size: int, rng: torch.Generator) -> dict[str, Tensor]:
        """So many transitions of every task, drawn with replacement, (task, sample, ...)."""
        size = len(self.task), batch_size
        inds = torch.randint(self.num_stored(), size, generator=rng, device=rng.device)
        return {name: x.flatten(1, 2)[self.task, inds] for name, x in self.data.items()}

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint: what is filled."""
        filled = min(self.steps, self.capacity)
        return {"steps": self.steps, **{name: x[:, :filled].clone() for name, x in self.data.items()}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """From a checkpoint."""
        self.steps = state["steps"]
        for name, x in self.data.items():
            x[:, : state[name].shape[1]] = state[name]
