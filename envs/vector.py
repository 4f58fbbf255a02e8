"""Multi-task vector environments: the base class, a loop over single ones, and a wrapper of others."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

Seeds = int | Sequence[int | None] | None
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


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
        limits = f"from 0 to {num_tasks - 1}, got {chosen}"
        raise ValueError(f"tasks must be one or more different integers {limits}")
    return chosen


def check_task(num_tasks: int, task: int) -> None:
    """Raise a ValueError if the index of a task is not an integer in [0, num_tasks)."""
    if task not in range(num_tasks):
        raise ValueError(f"task must be an integer from 0 to {num_tasks - 1}, got {task!r}")


def check_spaces(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Refuse what a plain network can neither read nor act in.

    Observations must be a flat Box. Actions must be Discrete from 0, or a flat Box with finite bounds. Else a
    ValueError says what they are.
    """
    for name, space in (("observations", observation_space), ("actions", action_space)):
        discrete = isinstance(space, Discrete) and name == "actions"
        if not discrete and not (isinstance(space, Box) and len(space.shape) == 1):
            wanted = "Discrete or a one-dimensional Box" if name == "actions" else "a one-dimensional Box"
            got = type(space).__name__ + (f" of shape {space.shape}" if space.shape else "")
            raise ValueError(f"{name} must be {wanted}, got {got}")
    if isinstance(action_space, Discrete) and action_space.start != 0:
        raise ValueError(f"discrete actions must start at 0, got {action_space}")
    if isinstance(action_space, Box) and not action_space.is_bounded():
        raise ValueError(f"actions must have finite bounds, got {action_space}")


def clip_actions(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """Box actions within their bounds, as Gymnasium's ClipAction: a Gaussian policy knows no bounds."""
    return np.clip(actions, space.low, space.high) if isinstance(space, Box) else actions


def final_success(infos: dict[str, Any]) -> np.ndarray | float:
    """Of a step that ended episodes: success of every environment (n,), NaN if none is reported."""
    final = infos["final_info"]
    return np.where(final["_success"], final["success"], np.nan) if "_success" in final else np.nan


class TaskVectorEnv(gym.vector.VectorEnv):
    """Vector environment of several tasks: environment i belongs to task i // envs_per_task.

    `step` takes actions (n,) integers, or (n, act) floats; n is num_envs. It returns observations (n, obs)
    float32, rewards (n,) float64, terminated and truncated (n,) bool, and infos. An environment whose episode
    ends is reset in the same step (autoreset mode SAME_STEP): the observation returned is the first of its
    next episode, and `infos`, empty otherwise, holds what the episode ended with:

        final_obs           (n, obs) float32   last observation; the current one if no episode ended
        _final_obs          (n,) bool          True if an episode ended
        final_info          {"episode": {"r": (n,) float64 return, "l": (n,) int64 length in steps,
                             "_r": mask, "_l": mask}, "_episode": mask}; zero if no episode ended;
                             "success": (n,) bool, "_success": mask, if an environment reports it at the
                             end of an episode
        _final_info         (n,) bool          the same mask

    which is Gymnasium's layout (SyncVectorEnv over RecordEpisodeStatistics) except that final_obs is dense.

    Attributes:
        num_envs, num_tasks, envs_per_task: sizes.
        obs_dim, act_dim: numbers in an observation, and in an action, or the number of discrete actions.
        discrete: whether actions are Discrete, else a Box.
        task_names, task_params: of each task a short name, and a dictionary of what makes it different.
        episode_returns, episode_lengths: (n,) float64 and int64, of the running episodes.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int,
        task_names: Sequence[str],
        task_params: Sequence[dict[str, Any]],
        observation_space: gym.Space,
        action_space: gym.Space,
        tasks: Sequence[int] | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        """Set the attributes.

        Args:
            num_envs: environments in all, a positive multiple of the number of chosen tasks.
            task_names, task_params: of all tasks.
            observation_space, action_space: of one environment.
            tasks: indices of the tasks to keep, in this order; None keeps all.
            max_episode_steps: steps after which an episode is truncated, None if the environments do it.

        Raises:
            ValueError: num_envs or tasks are not as above, or the spaces are not supported.
        """
        chosen = select_tasks(len(task_names), tasks)
        if num_envs < 1 or num_envs % len(chosen):
            raise ValueError(
                f"num_envs must be a positive multiple of the {len(chosen)} tasks, got {num_envs}"
            )
        check_spaces(observation_space, action_space)
        self.num_envs, self.num_tasks, self.envs_per_task = num_envs, len(chosen), num_envs // len(chosen)
        self.task_names = [task_names[task] for task in chosen]
        self.task_params = [dict(task_params[task]) for task in chosen]
        self.discrete = isinstance(action_space, Discrete)
        self.obs_dim = observation_space.shape[0]
        self.act_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        low, high = observation_space.low.astype(np.float32), observation_space.high.astype(np.float32)
        self.single_observation_space = Box(low, high, dtype=np.float32)
        self.single_action_space = action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.episode_returns = np.zeros(num_envs)
        self.episode_lengths = np.zeros(num_envs, dtype=np.int64)
        self.max_episode_steps = max_episode_steps
        # as arrays: NumPy combines two arrays in half the time it needs for an array and a number
        self._last_step = np.full(num_envs, (max_episode_steps or np.iinfo(np.int64).max) - 1)
        self._one_step = np.ones(num_envs, dtype=np.int64)

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start every environment anew, environment i with seed + i as in SyncVectorEnv, or with seed[i].

        Returns:
            Observations (n, obs) float32, and an empty dictionary.

        Raises:
            ValueError: a list of seeds of the wrong length, or Gymnasium's reset_mask (not supported).
        """
        if options is not None and "reset_mask" in options:
            raise ValueError(
                "options['reset_mask'] is not supported: episodes restart in the step they end in"
            )
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        elif len(seeds := list(seed)) != self.num_envs:
            raise ValueError(
                f"expected one seed for each of the {self.num_envs} environments, got {len(seeds)}"
            )
        self.episode_returns[:] = self.episode_lengths[:] = 0
        return self._reset(seeds, options), {}  # the subclass's: observations (n, obs) float32

    def get_state(self) -> dict[str, Any] | None:
        """Everything needed to continue bit for bit (numbers, strings and lists only), None if impossible."""
        return None

    def set_state(self, state: dict[str, Any]) -> np.ndarray:
        """Continue from a `get_state()` of an environment built with the same arguments.

        Returns:
            The current observations (n, obs) float32.

        Raises:
            ValueError: the state does not fit, or this environment cannot be saved.
        """
        raise ValueError(f"{type(self).__name__} cannot restore a state")

    def _count_step(
        self, final_obs: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> dict[str, Any]:
        """Count a step of all environments; its infos. Statistics of episodes that ended are cleared."""
        self.episode_returns += rewards
        self.episode_lengths += self._one_step
        done = terminated | truncated
        if not np.count_nonzero(done):  # a quarter of the time of done.any()
            return {}
        returns, lengths = np.where(done, self.episode_returns, 0.0), np.where(done, self.episode_lengths, 0)
        self.episode_returns[done], self.episode_lengths[done] = 0.0, 0
        final_info = {"episode": {"r": returns, "l": lengths, "_r": done, "_l": done}, "_episode": done}
        return {"final_obs": final_obs, "_final_obs": done, "final_info": final_info, "_final_info": done}


class LoopVectorEnv(TaskVectorEnv):
    """Single environments stepped one after the other; of their infos "success" is kept."""

    def __init__(self, num_envs, make_env, task_names, task_params, tasks=None, max_episode_steps=None):
        """As `TaskVectorEnv`; make_env(task) builds one environment of the task with this index."""
        chosen = select_tasks(len(task_names), tasks)
        first = make_env(chosen[0])
        spaces = first.observation_space, first.action_space
        super().__init__(num_envs, task_names, task_params, *spaces, chosen, max_episode_steps)
        self.envs = [first, *(make_env(chosen[i // self.envs_per_task]) for i in range(1, num_envs))]

    def _reset(self, seeds: list[int | None], options: dict[str, Any] | None) -> np.ndarray:
        rows = [env.reset(seed=seed, options=options)[0] for env, seed in zip(self.envs, seeds)]
        return np.array(rows, dtype=np.float32)

    def step(self, actions: np.ndarray) -> Step:
        """Step every environment; actions that are floats are clipped to the bounds of the action space."""
        # Lists first, arrays once at the end: storing numbers one by one in an array takes longer.
        single_actions = actions.tolist() if self.discrete else clip_actions(actions, self.action_space)
        steps = [env.step(action) for env, action in zip(self.envs, single_actions, strict=True)]
        rows, reward_list, terminated_list, truncated_list, info_list = zip(*steps)
        observations = np.concatenate(rows, dtype=np.float32, casting="same_kind").reshape(self.num_envs, -1)
        rewards = np.array(reward_list, dtype=np.float64)
        terminated = np.array(terminated_list, dtype=np.bool_)
        truncated = np.array(truncated_list, dtype=np.bool_)
        truncated |= self.episode_lengths >= self._last_step
        infos = self._count_step(observations, rewards, terminated, truncated)
        if infos:
            reported = infos["_final_info"] & ["success" in info for info in info_list]
            if reported.any():
                success = reported & [bool(info.get("success", False)) for info in info_list]
                infos["final_info"] |= {"success": success, "_success": reported}
            observations = observations.copy()
            for i in infos["_final_info"].nonzero()[0].tolist():
                observations[i] = self.envs[i].reset()[0]
        return observations, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()


class TaskVectorWrapper(TaskVectorEnv):
    """Gives the attributes and infos of `TaskVectorEnv` to another vector environment of several tasks.

    Observations become float32, `final_obs` dense, and episode statistics are added if they are missing.
    """

    def __init__(self, env: gym.vector.VectorEnv, num_tasks: int) -> None:
        """Wrap `env`, with its attributes `task_names` and `task_params` if it has them.

        Raises:
            ValueError: it is not in autoreset mode SAME_STEP, names and parameters do not fit the number of
                tasks, or the spaces are not supported.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"the autoreset mode must be SAME_STEP, got {mode}")
        names = getattr(env.unwrapped, "task_names", [f"task{i}" for i in range(num_tasks)])
        params = getattr(env.unwrapped, "task_params", [{}] * num_tasks)
        if not len(names) == len(params) == num_tasks:
            raise ValueError(f"{num_tasks} tasks need as many task_names and task_params")
        super().__init__(env.num_envs, names, params, env.single_observation_space, env.single_action_space)
        self.env, self.spec = env, env.spec

    @property
    def unwrapped(self) -> gym.vector.VectorEnv:
        """The environment itself."""
        return self.env.unwrapped

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start every environment anew; observations (n, obs) float32 and the environment's own infos."""
        self.episode_returns[:] = self.episode_lengths[:] = 0
        observations, infos = self.env.reset(seed=seed, options=options)
        return observations.astype(np.float32), infos

    def step(self, actions: np.ndarray) -> Step:
        """Step every environment, with the infos of `TaskVectorEnv` added to the environment's own.

        Raises:
            ValueError: an episode ended and the environment gave no `final_obs`.
        """
        actions = clip_actions(actions, self.action_space)
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        observations = observations.astype(np.float32)
        final_obs, ended = observations.copy(), np.flatnonzero(terminated | truncated)
        if ended.size and "final_obs" not in infos:
            raise ValueError(f"{self.env} ended an episode without giving final_obs in its infos")
        for i in ended:
            final_obs[i] = infos["final_obs"][i]
        added = self._count_step(final_obs, rewards, terminated, truncated)
        if added:  # its own statistics come first: they may be of rewards before some scaling
            added["final_info"] |= infos.get("final_info", {})
        return observations, rewards, terminated, truncated, {**infos, **added}

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment."""
        self.env.close(**kwargs)
