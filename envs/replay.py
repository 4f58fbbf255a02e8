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
    """The newest transitions of every task, a ring: (task, step % capacity, env, number).

    A transition is one row of float32, in which discrete actions are exact: what is drawn lies together.

    Attributes:
        steps: steps of all environments that it has seen.
    """

    def __init__(self, envs: gym.vector.VectorEnv, capacity: int, device: torch.device):
        obs, space = envs.single_observation_space.shape, envs.single_action_space
        self.shapes = {"obs": obs, "next_obs": obs, "actions": space.shape, "rewards": (), "terminated": ()}
        self.widths = [math.prod(shape) for shape in self.shapes.values()]
        ring = (envs.num_tasks, capacity, envs.envs_per_task, sum(self.widths))
        gibibytes, total = 4 * math.prod(ring) / 2**30, memory(device) / 2**30
        if 2 * gibibytes > total:  # a checkpoint takes a copy
            needed = f"the replay buffer needs {gibibytes:,.1f} GiB, and as much while it is saved"
            fail(f"{needed}; here are {total:.1f}: reduce --buffer-size")
        print(f"replay buffer: {ring[1] * ring[2]:,} transitions of each task, {gibibytes:.3f} GiB")
        self.data = torch.zeros(ring, device=device)
        self.capacity, self.steps = capacity, 0
        self.first = torch.arange(envs.num_tasks, device=device).unsqueeze(1) * capacity * envs.envs_per_task

    def add(self, *transition: Tensor) -> None:
        """Store what one step of all environments has seen: obs, ..., terminated, (task, env, ...) each."""
        columns = [x.reshape(*x.shape[:2], -1) for x in transition]
        torch.cat(columns, 2, out=self.data[:, self.steps % self.capacity])
        self.steps += 1

    def clear(self) -> None:
        """Forget everything."""
        self.steps = 0

    def num_stored(self) -> int:
        """N_m, the transitions of each task that are in it."""
        return min(self.steps, self.capacity) * self.data.shape[2]

    def sample(self, batch_size: int, rng: torch.Generator) -> dict[str, Tensor]:
        """So many transitions of every task, drawn with replacement, (task, sample, ...)."""
        size = len(self.data), batch_size
        inds = self.first + torch.randint(self.num_stored(), size, generator=rng, device=rng.device)
        columns = self.data.flatten(0, 2).index_select(0, inds.flatten()).split(self.widths, dim=1)
        sample = {name: x.reshape(*size, *self.shapes[name]) for name, x in zip(self.shapes, columns)}
        if self.shapes["actions"] == ():  # discrete
            sample["actions"] = sample["actions"].long()
        return sample

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint: what is filled."""
        return {"steps": self.steps, "data": self.data[:, : self.steps].clone()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """From a checkpoint."""
        self.steps = state["steps"]
        self.data[:, : state["data"].shape[1]] = state["data"]
