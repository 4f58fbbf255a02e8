"""What runs measure, the same for every script: episodes, means over updates, sharing, sigma."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from envs.vector import check_reports, final_success

# a value of each task (task,), or none, and one of all
Metrics = dict[str, tuple[Tensor | None, float]]


class Episodes:
    """Returns, lengths and successes of the training episodes of each task, between two logs.

    Attributes:
        latest: (3, task), their means at the latest log with an episode of the task; NaN before, and where
            environments report no success.
        discounted: (task, env), the discounted return so far of the running episodes, for `scale_rewards`.
    """

    def __init__(self, envs: gym.vector.VectorEnv, device: torch.device | None = None):
        # since the last log: returns, lengths, successes, number of episodes
        self.sums = np.zeros((4, envs.num_envs))
        self.latest = np.full((3, envs.num_tasks), np.nan)
        self.discounted = torch.zeros(envs.num_tasks, envs.envs_per_task, device=device)

    def add(self, infos: dict[str, Any]) -> None:
        """Count the episodes that ended in a step of `envs.vector.TaskVectorEnv`."""
        if "final_info" in infos:
            ended, episode = infos["_final_info"], infos["final_info"]["episode"]
            for total, x in zip(self.sums, (episode["r"], episode["l"], final_success(infos), 1)):
                total += np.where(ended, x, 0)

    def means(self) -> np.ndarray:
        """Mean return, length and success (3, task) since the last call, NaN where no episode ended."""
        check_reports(self.sums[2, self.sums[3] > 0])
        *sums, number = self.sums.reshape(4, len(self.latest[0]), -1).sum(2)
        new = number > 0
        self.latest[:, new] = np.stack(sums)[:, new] / number[new]
        self.sums[:] = 0
        return np.where(new, self.latest, np.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        finished = {"sums": torch.from_numpy(self.sums), "latest": torch.from_numpy(self.latest)}
        return finished | {"discounted": self.discounted}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.sums[:], self.latest[:] = state["sums"].numpy(), state["latest"].numpy()
        self.discounted.copy_(state["discounted"])


class Means:
    """Running means of what minibatches say to log, (task,) each.

    Attributes:
        first: what the first of them said.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.count = 0

    def add(self, stats: dict[str, Tensor]) -> None:
        """Count the numbers of one minibatch."""
        self.first = self.first or stats
        self.count += 1
        for name, x in stats.items():
            self.sums[name] = self.sums[name].to(x) + x if name in self.sums else x

    def pop(self) -> dict[str, Tensor]:
        """The means since the last call; empty where there was no minibatch."""
        means = {name: x / self.count for name, x in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint."""
        return {"count": self.count, **self.sums}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """From a checkpoint."""
        self.sums = dict(state)
        self.count = self.sums.pop("count")


def explained_variance(values: Tensor, advantages: Tensor) -> tuple[Tensor, float]:
    """1 - Var(advantages) / Var(values + advantages) of (task, sample); for all tasks of summed variances."""
    unexplained, variance = advantages.var(1), (values + advantages).var(1)
    return 1 - unexplained / variance, (1 - unexplained.sum() / variance.sum()).item()


def conflicts(grads: Tensor) -> Tensor:
    """Share of the other tasks whose gradients point against a task's: (task, weight) -> (task,)."""
    against = (grads @ grads.T < 0).float().sum(1)
    return against / max(1, len(grads) - 1)


def sharing(
    theta: dict[str, Tensor], mu: dict[str, Tensor], start: Tensor | None, frozen: bool = False
) -> Metrics:
    """|theta|, |theta - start|, |mu_m|, and of every layer |theta|^2 / (|theta|^2 + |mu_m|^2).

    The latter, the sharing ratio, is for all tasks with mean_m |mu_m|^2. theta + c with mu_m - c is the same
    network, so theta is measured as theta + mean_m(mu_m), and mu_m as mu_m - mean_m(mu_m), unless theta is
    frozen.

    Args:
        theta, mu: weights by name, of all tasks (1, ...) and of each (task, ...). mu may have factors
            "layer.B" and "layer.A" in place of their product "layer.weight".
        start: all of theta at the start of the run (weight,); None if that is not known.
        frozen: theta is not trained.
    """
    squares: dict[str, Tensor] = {}  # by layer: |theta|^2, and |mu_m|^2 of each task, (1 + task,)
    centred = []
    for name, x in theta.items():
        layer = _layer(name)
        if name in mu:
            residuals = mu[name].double()
            mean = residuals.mean(0)
        else:  # one product at a time: (task, out, in) may be too large
            B, A = mu[f"{layer}.B"].double(), mu[f"{layer}.A"].double()
            residuals = (b @ a for b, a in zip(B, A))
            mean = torch.einsum("tor,tri->oi", B, A) / len(B)
        mean = mean * (not frozen)
        shared = x[0].double() + mean
        norms = [shared.square().sum(), *((y - mean).square().sum() for y in residuals)]
        squares[layer] = squares.get(layer, 0) + torch.stack(norms)
        centred.append(shared.flatten())
    mu_norms = sum(squares.values())[1:].sqrt()
    metrics = {"varshare/theta_norm": (None, torch.cat(centred).norm().item())}
    if start is not None:
        metrics["varshare/theta_moved"] = None, (torch.cat(centred) - start).norm().item()
    metrics["varshare/mu_norm"] = mu_norms, mu_norms.mean().item()
    for layer, x in squares.items():
        theta2, mu2 = x[0], x[1:]
        ratio = theta2 / (theta2 + mu2)
        metrics[f"varshare/sharing_ratio/{layer}"] = ratio, (theta2 / (theta2 + mu2.mean())).item()
    return metrics


def sigma_quantiles(theta: dict[str, Tensor], sigma: dict[str, Tensor], live: dict[str, Tensor]) -> Metrics:
    """sigma among live weights: its median, per task, and quantiles of every layer, all tasks pooled.

    A weight is dead for a task if it had no gradient in the last update (PPO: all minibatches over a rollout,
    SAC: one), behind or before a ReLU that is off at all samples: nothing determines it, and it would blur
    the quantiles. The share of dead weights is measured too.

    Args:
        theta, sigma, live: weights by name, of all tasks (1, ...) and of each (task, ...); live is 0 if dead.
    """
    sigmas, lives = _by_layer(sigma), {layer: x != 0 for layer, x in _by_layer(live).items()}
    rows = zip(torch.cat([*sigmas.values()], 1), torch.cat([*lives.values()], 1))
    median = torch.stack([x[on if on.any() else ...].median() for x, on in rows])  # all, before an update
    size = torch.cat([x.flatten() for x in theta.values()]).abs().median()
    metrics = {"varshare/sigma": (median, median.mean().item())}
    metrics["varshare/sigma_over_theta"] = median / size, (median / size).mean().item()
    for layer, x in sigmas.items():
        on = lives[layer]
        among = x[on if on.any() else ...].cpu().numpy()  # NumPy's quantile takes any number
        for q in (1, 50, 99):
            metrics[f"varshare/sigma_q{q}/{layer}"] = None, np.quantile(among, q / 100)
        dead = 1 - on.float().mean(1)
        metrics[f"varshare/dead/{layer}"] = dead, dead.mean().item()
    return metrics


def _layer(name: str) -> str:
    """ "actor.0.weight" -> "actor.0"; a log standard deviation is a layer of its own."""
    return name.rpartition(".")[0] or name


def _by_layer(W: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of weights by name, (row, ...) each, those of every layer, (row, weight): actor.0 has two kinds."""
    layers: dict[str, list[Tensor]] = {}
    for name, x in W.items():
        layers.setdefault(_layer(name), []).append(x.flatten(1))
    return {layer: torch.cat(parts, 1) for layer, parts in layers.items()}
