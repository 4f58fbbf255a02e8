"""The multi-task environments, registered with Gymnasium, and the two functions the scripts call.

    import envs

    vector_env = envs.make("cartpole10", envs_per_task=8)  # all ten tasks, 80 environments, SAME_STEP
    single_env = envs.make_single("cartpole10", task=3, render_mode="rgb_array")  # one task, for a video

Any Gymnasium id works too: an ordinary one is a single task, and one whose vector environment has an
attribute `num_tasks` has that many. "my_module:MyEnv-v0" first imports my_module, which registers MyEnv-v0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from envs.checks import check_tasks, select_tasks
from envs.vector import LoopVectorEnv, TaskVectorEnv, TaskVectorWrapper, UnitActions
from envs.workers import WorkerVectorEnv

__all__ = ["ENV_IDS", "make", "make_single"]

# single environment, vector environment, steps of an episode, arguments of both
_CARTPOLE = "cartpole:CartPoleTask", "cartpole:CartPole10", 500
_FORCES = "cartpole:ForceAction", "cartpole:CartPole10", 500
_LANDER = "lunarlander:LunarLanderTask", "lunarlander:LunarLander20", 1000
_LANDER_GOALS = "lunarlander:LunarLanderGoalTask", "lunarlander:LunarLander20Goals", 1000
_ENVIRONMENTS = {
    "cartpole10": (*_CARTPOLE, {}),
    "cartpole-identical10": (*_CARTPOLE, {"task_set": "cartpole-identical10"}),
    "cartpole-goals10": (*_CARTPOLE, {"task_set": "cartpole-goals10"}),
    "cartpole-goals10-sparse": (*_CARTPOLE, {"task_set": "cartpole-goals10-sparse"}),
    "cartpole-goals10-continuous": (*_FORCES, {"task_set": "cartpole-goals10-continuous"}),
    "cartpole-goals-physics10": (*_CARTPOLE, {"task_set": "cartpole-goals-physics10"}),
    "lunarlander20": (*_LANDER, {}),
    "lunarlander20-continuous": (*_LANDER, {"continuous": True}),
    "lunarlander20-goals": (*_LANDER_GOALS, {}),
    "lunarlander20-goals-continuous": (*_LANDER_GOALS, {"continuous": True}),
    "mt10": ("metaworld:make_task", "metaworld:MT10", 500, {}),
    "mt10-reward-v1": ("metaworld:make_task", "metaworld:MT10", 500, {"reward": "v1"}),
    "mt50": ("metaworld:make_mt50_task", "metaworld:MT50", 500, {}),
}
# the number of tasks as an axis
for _number in (20, 40, 80, 160):
    _id = f"cartpole-goals{_number}"
    _ENVIRONMENTS[_id] = "cartpole:CartPoleTask", f"cartpole:CartPole{_number}", 500, {"task_set": _id}
ENV_IDS: tuple[str, ...] = tuple(_ENVIRONMENTS)

for _env_id, (_single, _vector, _steps, _kwargs) in _ENVIRONMENTS.items():
    if _env_id not in gym.registry:  # a second registration, after a reload, would make Gymnasium warn
        _points = {"entry_point": f"envs.{_single}", "vector_entry_point": f"envs.{_vector}"}
        gym.register(_env_id, max_episode_steps=_steps, kwargs=_kwargs, **_points)


def make(
    env_id: str, envs_per_task: int, tasks: Sequence[int] | None = None, workers: int = 1
) -> gym.vector.VectorEnv:
    """Build the vector environment of an id; environment i belongs to task i // envs_per_task.

    Args:
        env_id: one of `ENV_IDS` or any Gymnasium id.
        envs_per_task: environments of each task.
        tasks: indices of the tasks to build, in this order; None builds all.
        workers: processes that step the environments, see `envs.workers`; 1 is this one alone.

    Returns:
        A vector environment with the attributes and infos of `envs.vector.TaskVectorEnv`. Box actions are in
        units in which the bounds of the environment are -1 and 1.

    Raises:
        ValueError: one line on what is wrong with the id, the numbers, the spaces, the tasks' names and
            parameters, what a reset and a step of the environment give, or the installation.
    """
    if isinstance(envs_per_task, bool) or not isinstance(envs_per_task, int) or envs_per_task < 1:
        raise ValueError(f"envs_per_task must be a positive integer, got {envs_per_task!r}")
    spec = _find(env_id)
    num_tasks = _count_tasks(spec)
    chosen = select_tasks(num_tasks or 1, tasks)
    if workers > 1:
        return WorkerVectorEnv(functools.partial(make, env_id, envs_per_task), chosen, workers)
    num_envs = len(chosen) * envs_per_task
    with _one_line_errors(env_id):
        if num_tasks is None:
            limit = spec.max_episode_steps
            env = LoopVectorEnv(num_envs, lambda _: _make(spec), [spec.id], [{}], max_episode_steps=limit)
        else:
            kwargs = {} if chosen == [*range(num_tasks)] else {"tasks": chosen}
            env = gym.make_vec(spec, num_envs, "vector_entry_point", **kwargs)
        if env.num_envs != num_envs:
            raise ValueError(f"it has {env.num_envs} environments where {num_envs} are asked for")
        if isinstance(env, TaskVectorEnv):  # a subclass may have changed them
            if env.num_tasks != len(chosen):
                raise ValueError(f"it has {env.num_tasks} tasks where {len(chosen)} are asked for")
            env.task_names, env.task_params = check_tasks(env.task_names, env.task_params)
        else:
            env = TaskVectorWrapper(env, chosen)
            env.try_out()
        return env if env.discrete else UnitActions(env)


def make_single(env_id: str, task: int = 0, render_mode: str | None = None) -> gym.Env:
    """Build one task as an ordinary environment, for a video or a closer look; render_mode is Gymnasium's.

    Raises:
        ValueError: one line on what is wrong with the id, the task, or the installation.
    """
    spec = _find(env_id)
    num_tasks = _count_tasks(spec)
    select_tasks(num_tasks or 1, [task])
    kwargs = {} if num_tasks is None else {"task": task}
    kwargs |= {} if render_mode is None else {"render_mode": render_mode}
    with _one_line_errors(env_id):
        return _make(spec, **kwargs)


def _make(spec: EnvSpec, **kwargs: Any) -> gym.Env:
    return gym.make(spec, disable_env_checker=True, **kwargs)


def _find(env_id: str) -> EnvSpec:
    module, _, name = env_id.rpartition(":")
    try:
        if module.startswith("."):
            raise ImportError("the name of its module is relative")
        if module:
            importlib.import_module(module)
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        known = f"choose {', '.join(ENV_IDS)} or any Gymnasium id"
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"unknown environment {env_id!r}, {known} ({reason})") from error


def _count_tasks(spec: EnvSpec) -> int | None:
    """Number of tasks of a vector environment, None for an ordinary environment."""
    if spec.vector_entry_point is None:
        return None
    with _one_line_errors(spec.id):
        creator = spec.vector_entry_point
        if isinstance(creator, str):
            creator = load_env_creator(creator)
        num_tasks = getattr(creator, "num_tasks", None)
        if not isinstance(
            num_tasks, int | np.integer
        ):  # an attribute of the instances only, a property, or none
            probe = gym.make_vec(spec, 1, "vector_entry_point")
            num_tasks = getattr(probe.unwrapped, "num_tasks", None)
            probe.close()
    if num_tasks is None and spec.entry_point is None:
        raise ValueError(f"the vector environment {spec.id} has no attribute num_tasks")
    return num_tasks


@contextmanager
def _one_line_errors(env_id: str) -> Iterator[None]:
    """Turn what building an environment can raise into a ValueError of one line."""
    try:
        yield
    except (gym.error.Error, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot build {env_id}: {reason}") from error
