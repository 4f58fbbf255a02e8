"""Saved models played with other weights and in other physics."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bench.launch import Job
from enjoy import load_agent, load_script, read_model
from envs import make
from envs.evaluation import play_episodes, spread_seeds

EPISODES, ENSEMBLE = 20, 5
NOISE = (0.05, 0.1, 0.2, 0.4)  # standard deviation over the rms of a layer's weights, of each run
PHYSICS = [{name: factor} for name in ("gravity", "length") for factor in (0.7, 1.3)]
PRUNED = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)  # shares of an actor's residuals
BELOW = "live weights with sigma below 0.9 of the prior's"


def play(agent: nn.Module, weights: Iterable[Tensor], envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """Mean return of each task (task,), in the episodes of the run's own evaluation.

    Args:
        agent: of a script.
        weights: (task, weight), or (task * env, weight), a draw for every episode; of several policies act
            by their average.
        envs: as many of a task as episodes.
        seed: of the run.
    """
    nets = [agent.unpack(W) for W in weights]

    def policy(obs: Tensor) -> Tensor:  # (task, env, obs)
        rows = len(next(iter(nets[0].values())))
        x = obs if rows == len(obs) else obs.flatten(0, 1).unsqueeze(1)
        mean = torch.stack([agent.policy(W, x) for W in nets]).mean(0)
        return mean.flatten(0, 1).unflatten(0, obs.shape[:2])

    return play_episodes(policy, envs, spread_seeds(seed, 1, envs.num_envs)).returns.mean(1)


def change_physics(envs: gym.vector.VectorEnv, gravity: float = 1.0, length: float = 1.0) -> None:
    """Multiply gravity and pole length of all of `envs.cartpole`'s environments."""
    envs.gravity *= gravity
    envs.length *= length
    envs.polemass_length = envs.masspole * envs.length


def live_weights(agent: nn.Module) -> Tensor:
    """(task, weight) whether a weight has had a gradient."""
    return agent.h_sum > 0


def of_each(agent: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x (task, weight) after change(live ones) of each task and layer, its matrix and biases apart."""
    x = x.clone()
    parts, lives = agent.unpack(x), agent.unpack(live_weights(agent))
    for name, rows in parts.items():
        for row, live in zip(rows, lives[name]):
            row[live] = change(row[live])
    return x


def prune(theta: Tensor, mu: Tensor, score: Tensor, share: float) -> Tensor:
    """Weights (task, weight) with this share of every task's residuals, the lowest scores, set to 0.

    Residuals with an infinite score stay, and are none of those that the share is of.
    """
    number = round(share * score[0].isfinite().sum().item())
    return theta + mu.scatter(1, score.argsort(1)[:, :number], 0.0)


def played(agent: nn.Module, env_id: str, seed: int, everything: bool) -> Iterator[tuple[str, float, float]]:
    """(what, level, mean return over tasks) of a model with other weights and in other physics."""
    rng = torch.Generator().manual_seed(seed)
    mean = agent.weights()

    def returns(*weights: Tensor, **physics: float) -> float:
        envs = make(env_id, EPISODES)
        change_physics(envs, **physics)
        return play(agent, weights, envs, seed).mean().item()

    def draw(sigma: Tensor) -> Tensor:  # for every episode
        center, spread = (x.expand_as(mean).repeat_interleave(EPISODES, 0) for x in (mean, sigma))
        return center + spread * torch.randn(center.shape, generator=rng)

    yield "mean", 0, returns(mean)
    sigma = torch.as_tensor(getattr(agent, "sigma", 0.0))
    if sigma.any():
        yield "sampled", 0, returns(draw(sigma))
        yield "ensemble", 0, returns(*(draw(sigma) for _ in range(ENSEMBLE)))
    if sigma.ndim:
        layer_rms = of_each(agent, sigma, lambda x: x.square().mean().sqrt())  # as much noise
        yield "layer rms", 0, returns(draw(layer_rms))
        shuffled = of_each(agent, sigma, lambda x: x[torch.randperm(len(x), generator=rng)])
        yield "shuffled", 0, returns(draw(shuffled))
    if not everything:
        return
    parts = agent.unpack(mean).values()
    rms = torch.cat([x.square().mean().sqrt().expand_as(x).flatten(1) for x in parts], 1)
    for level in NOISE:
        yield "noise", level, returns(draw(level * rms))
    for physics in PHYSICS:
        ((name, factor),) = physics.items()
        yield name, factor, returns(mean, **physics)
    # of all (theta + c, mu_m - c), which are the same network, the one with the smallest residuals
    theta, mu = agent.theta + agent.mu.mean(0), agent.mu - agent.mu.mean(0)
    size = mu.abs()
    for name, x in agent.unpack(size).items():
        if name.startswith("critic"):  # has no part in what is played
            x.fill_(torch.inf)
    for share in PRUNED:
        yield "pruned by |mu|", share, returns(prune(theta, mu, size, share))
        if sigma.ndim:
            yield "pruned by |mu| / sigma", share, returns(prune(theta, mu, size / sigma, share))


def play_model(folder: Path, used: Collection[str]) -> None:
    """Play the model in a run's folder, in all ways if it is used; played.csv there says with what return."""
    torch.set_num_threads(1)
    model = read_model(folder)
    args = model["args"]
    agent = load_agent(model, load_script(model["script"]), make(args["env_id"], 1))
    rows = list(played(agent, args["env_id"], args["seed"], everything=args["exp_name"] in used))
    if "sigma_prior" in args and hasattr(agent, "h_sum"):
        below = agent.sigma[live_weights(agent)] < 0.9 * args["sigma_prior"]
        rows.append((BELOW, 0, below.float().mean().item()))
    pd.DataFrame(rows, columns=["what", "level", "value"]).to_csv(folder / "played.tmp", index=False)
    (folder / "played.tmp").rename(folder / "played.csv")


def play_all(jobs: list[Job], out: Path, used: Collection[str]) -> None:
    """Play what has finished and has not been played, in all ways if it is used, and write played.csv."""
    folders = [Path("runs", job.name) for job in jobs if job.finished]
    new = [folder for folder in folders if not (folder / "played.csv").exists()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, _ in enumerate(pool.map(play_model, new, [used] * len(new)), 1):
            print(f"played {i}/{len(new)}", flush=True)
    parts = []
    for folder in folders:
        args = read_model(folder)["args"]
        key = dict(run=args["exp_name"], env=args["env_id"], seed=args["seed"])
        parts.append(pd.read_csv(folder / "played.csv").assign(**key))
    if parts:
        pd.concat(parts).round(3).to_csv(out / "played.csv", index=False)
