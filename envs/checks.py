"""What is refused of environments, in one line each: spaces, names and parameters of tasks, the interface."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


def select_tasks(num_tasks: int, tasks: Sequence[int] | None) -> list[int]:
    """Check a choice of task indices and return it as a list (all tasks for None).

    Raises:
        ValueError: no task, a duplicate, or an index that is not an integer in [0, num_tasks).
    """
    try:
        chosen = [operator.index(task) for task in (range(num_tasks) if tasks is None else tasks)]
    except TypeError as error:
        raise ValueError(f"tasks must be a sequence of integers, got {tasks!r}") from error
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(num_tasks)):
        raise ValueError(f"tasks must be different integers from 0 to {num_tasks - 1}, got {chosen}")
    return chosen


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Refuse what a plain network can neither read nor act in.

    Observations must be a flat Box. Actions must be Discrete from 0, or a flat Box of floats with finite
    bounds. Else a ValueError says what they are.
    """
    for name, space in (("observations", observation_space), ("actions", action_space)):
        discrete = isinstance(space, Discrete) and name == "actions"
        if not discrete and not (isinstance(space, Box) and len(space.shape) == 1):
            wanted = "Discrete or a one-dimensional Box" if name == "actions" else "a one-dimensional Box"
            got = type(space).__name__ + (f" of shape {space.shape}" if space.shape else "")
            raise ValueError(f"{name} must be {wanted}, got {got}")
    if isinstance(action_space, Discrete):
        if action_space.start != 0:
            raise ValueError(f"discrete actions must start at 0, got {action_space}")
        return
    if action_space.dtype.kind != "f":
        raise ValueError(f"actions of a Box must be floats, got {action_space.dtype}")
    with np.errstate(over="ignore"):
        width = action_space.high.astype(np.float32) - action_space.low.astype(np.float32)
    if not (np.isfinite(width).all() and (width > 0).all()):
        raise ValueError(f"actions must have finite bounds, low below high, got {one_line(action_space)}")


def one_line(x: object) -> str:
    """Its text; that of an array can have several lines."""
    return " ".join(str(x).split())


def common_spaces(envs: Sequence[gym.Env], names: Sequence[str]) -> tuple[gym.Space, gym.Space]:
    """The observation and the action space that all of these single environments have.

    Args:
        envs: the environments of all tasks.
        names: name of the task of each.

    Raises:
        ValueError: which task has other spaces than the first, and what differs. Bounds of observations may:
            no network looks at them, and the widest are returned.
    """
    for env, name in zip(envs, names):
        check_spaces(env.observation_space, env.action_space)
        shape, first = env.observation_space.shape, envs[0].observation_space.shape
        if shape != first:
            raise ValueError(f"observations of task {name} have shape {shape}, those of {names[0]} {first}")
        own, first = env.action_space, envs[0].action_space
        if own != first:
            raise ValueError(one_line(f"actions of task {name} are {own}, those of {names[0]} {first}"))
    space = envs[0].observation_space
    low = np.min([env.observation_space.low for env in envs], 0)
    high = np.max([env.observation_space.high for env in envs], 0)
    return Box(low, high, dtype=space.dtype), envs[0].action_space


def plain(value: Any) -> Any:
    """A parameter of a task as numbers, strings and lists of Python's own, which any file can hold.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, str):
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    raise ValueError(f"task_params must be numbers and texts, got {type(value).__name__}")


def check_tasks(names: Sequence[str], params: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict]]:
    """Names and parameters of tasks in plain Python.

    A name is the key of a task in logs, models, figures and names of files.

    Raises:
        ValueError: a name is no printable text, is there twice or has a meaning of its own; or see `plain`.
    """
    if len(names) != len(params):
        raise ValueError(f"{len(names)} task_names, but {len(params)} task_params")
    names = [str(name) if isinstance(name, str) else name for name in names]
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or name.strip() != name or not name:
            raise ValueError(f"task_names must be printable text, got {name!r}")
        if name in ("mean", "all-tasks") or "|" in name or "$" in name:
            raise ValueError(f"no task can be called {name!r}: the word, | or $ has a meaning of its own")
        if names.count(name) > 1:
            raise ValueError(f"task_names must differ, got {name!r} twice")
    return names, [plain(dict(x)) for x in params]


def try_out(env: gym.Env, name: str) -> None:
    """Refuse a single environment that does not keep to Gymnasium's interface, by a reset and a step.

    Raises:
        ValueError: what is to change.
    """
    about, shape = f"an environment of task {name}", env.observation_space.shape
    try:
        inspect.signature(env.unwrapped.reset).bind(seed=0, options=None)
    except TypeError as error:
        raise ValueError(f"{about}: reset must take seed and options as keywords ({error})") from error
    space = env.action_space
    action = 0 if isinstance(space, Discrete) else ((space.low + space.high) / 2).astype(space.dtype)
    for what, call, wanted in (
        ("reset", env.reset, "(observation, info)"),  # without a seed: a later reset would go on from it
        ("step", lambda: env.step(action), "(observation, reward, terminated, truncated, info)"),
    ):
        result = call()
        if not isinstance(result, tuple) or len(result) != len(wanted.split(",")):
            raise ValueError(f"{about}: {what} must return {wanted}")
        if (got := np.shape(result[0])) != shape:
            raise ValueError(f"{about}: {what} gives observations of shape {got}, its space is {shape}")
        if not isinstance(result[-1], dict):
            raise ValueError(f"{about}: {what} must give a dictionary as info, got {result[-1]!r}")
    for what, x in zip(("reward", "terminated", "truncated"), result[1:4]):
        if np.shape(x) != ():
            raise ValueError(f"{about}: {what} must be a single value, got shape {np.shape(x)}")
