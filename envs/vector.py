"""Multi-task vector environments: the base class, and a plain loop over single environments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space


def select_tasks(num_tasks: int, tasks: Sequence[int] | None) -> list[int]:
    """Check a choice of task indices and return it as a list (all tasks for None).

    Raises:
        ValueError: no task, a duplicate, or an index that is not an integer in [0, num_tasks).
    """
    if tasks is None:
        return list(range(num_tasks))
    try:
        chosen = [operator.index(task) for task in tasks]
    except TypeError as error:
        raise ValueError(f"tasks must be a sequence of integers, got {tasks!r}") from error
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= task < num_tasks for task in chosen):
        raise ValueError(
            f"tasks must be one or more different integers from 0 to {num_tasks - 1}, got {chosen}"
        )
    return chosen


def read_spaces(observation_space: gym.Space, action_space: gym.Space) -> tuple[int, int, bool]:
    """Sizes of what a plain network reads and acts in.

    Returns:
        Numbers in an observation; numbers in an action, or the number of discrete actions; whether they are
        discrete.

    Raises:
        ValueError: observations that are not a flat Box, or actions that are neither Discrete (from 0) nor a
            flat Box with finite bounds.
    """
    if not isinstance(observation_space, gym.spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(f"observations must be a one-dimensional Box, got {_describe(observation_space)}")
    if isinstance(action_space, gym.spaces.Discrete):
        if action_space.start != 0:
            raise ValueError(f"discrete actions must start at 0, got {action_space}")
    elif not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(f"actions must be Discrete or a one-dimensional Box, got {_describe(action_space)}")
    elif not action_space.is_bounded():
        raise ValueError(f"actions must have finite bounds, got {_describe(action_space)} without")
    else:
        return observation_space.shape[0], action_space.shape[0], False
    return observation_space.shape[0], int(action_space.n), True


def clip_actions(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """Box actions within their bounds, as Gymnasium's ClipAction: a Gaussian policy knows no bounds."""
    return np.clip(actions, space.low, space.high) if isinstance(space, gym.spaces.Box) else actions


def _describe(space: gym.Space) -> str:
    return f"{type(space).__name__} of shape {space.shape}" if space.shape else type(space).__name__


def _as_float32(space: gym.spaces.Box) -> gym.spaces.Box:
    return gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)


def final_success(infos: dict[str, Any]) -> np.ndarray | float:
    """Of a step that ended episodes: success of every environment (n,), NaN where none is reported."""
    final = infos["final_info"]
    return np.where(final["_success"], final["success"], np.nan) if "_success" in final else np.nan


class TaskVectorEnv(gym.vector.VectorEnv):
    """Vector environment of several tasks: environment i belongs to task i // envs_per_task.

    An environment whose episode ends is reset in the same step (autoreset mode SAME_STEP): the observation
    returned is the first of its next episode, and `infos`, empty otherwise, holds what the episode ended with
    (n = num_envs):

        final_obs           (n, obs) float32   last observation; the current one where no episode ended
        _final_obs          (n,) bool          True where an episode ended
        final_info          {"episode": {"r": (n,) float64 return, "l": (n,) int64 length in steps,
                             "_r": mask, "_l": mask}, "_episode": mask}; zero where no episode ended;
                             "success": (n,) bool, "_success": mask, where an environment reports it at the
                             end of an episode
        _final_info         (n,) bool          the same mask

    which is Gymnasium's layout (SyncVectorEnv over RecordEpisodeStatistics) except that final_obs is dense.

    Attributes:
        num_envs, num_tasks, envs_per_task: sizes.
        obs_dim, act_dim: numbers in an observation, and in an action, or the number of discrete actions.
        discrete: whether actions are Discrete, else a Box.
        task_names: one short name per task.
        task_params: one dictionary per task, what makes the task different.
        episode_returns: (n,) float64, sum of rewards of the running episodes.
        episode_lengths: (n,) int64, steps of the running episodes.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int,
        task_names: Sequence[str],
        task_params: Sequence[dict[str, Any]],
        observation_space: gym.spaces.Box,
        action_space: gym.Space,
        tasks: Sequence[int] | None = None,
    ) -> None:
        """Set sizes, names and spaces.

        Args:
            num_envs: environments in all, a positive multiple of the number of chosen tasks.
            task_names, task_params: of all tasks.
            observation_space, action_space: of one environment.
            tasks: indices of the tasks to keep, in this order; None keeps all.

        Raises:
            ValueError: num_envs or tasks are not as above, or the spaces are not supported.
        """
        chosen = select_tasks(len(task_names), tasks)
        if num_envs < 1 or num_envs % len(chosen):
            raise ValueError(
                f"num_envs must be a positive multiple of the {len(chosen)} tasks, got {num_envs}"
            )
        self.num_envs = num_envs
        self.num_tasks = len(chosen)
        self.envs_per_task = num_envs // len(chosen)
        self.task_names = [task_names[task] for task in chosen]
        self.task_params = [dict(task_params[task]) for task in chosen]
        self.obs_dim, self.act_dim, self.discrete = read_spaces(observation_space, action_space)
        self.single_observation_space = _as_float32(observation_space)
        self.single_action_space = action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.episode_returns = np.zeros(num_envs)
        self.episode_lengths = np.zeros(num_envs, dtype=np.int64)

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

    def _start_episodes(
        self, seed: int | Sequence[int | None] | None, options: dict | None
    ) -> list[int | None]:
        """Clear the statistics and return one seed per environment: seed + i as in SyncVectorEnv.

        Raises:
            ValueError: a list of seeds of the wrong length, or Gymnasium's reset_mask (not supported).
        """
        if options is not None and "reset_mask" in options:
            raise ValueError(
                "options['reset_mask'] is not supported: episodes restart within the step they end in"
            )
        if seed is None:
            seeds: list[int | None] = [None] * self.num_envs
        elif isinstance(seed, int):
            seeds = [seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"expected one seed for each of the {self.num_envs} environments, got {len(seeds)}"
            )
        self.episode_returns[:] = 0.0
        self.episode_lengths[:] = 0
        return seeds

    def _finish_episodes(self, done: np.ndarray, final_obs: np.ndarray) -> dict[str, Any]:
        """Infos of a step that ended episodes, done (n,) bool; clears their statistics."""
        infos = _final_infos(done, final_obs, self.episode_returns, self.episode_lengths)
        self.episode_returns[done] = 0.0
        self.episode_lengths[done] = 0
        return infos


def _final_infos(
    done: np.ndarray, final_obs: np.ndarray, returns: np.ndarray, lengths: np.ndarray
) -> dict[str, Any]:
    episode = {"r": np.where(done, returns, 0.0), "l": np.where(done, lengths, 0), "_r": done, "_l": done}
    return {
        "final_obs": final_obs,
        "_final_obs": done,
        "final_info": {"episode": episode, "_episode": done},
        "_final_info": done,
    }


class LoopVectorEnv(TaskVectorEnv):
    """Single environments stepped one after the other; observations become float32.

    Of the infos of the single environments "success" is kept.
    """

    def __init__(
        self,
        num_envs: int,
        make_env: Callable[[int], gym.Env],
        task_names: Sequence[str],
        task_params: Sequence[dict[str, Any]],
        tasks: Sequence[int] | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        """Build `num_envs` environments, the same number for each task.

        Args:
            num_envs: environments in all, a positive multiple of the number of chosen tasks.
            make_env: builds one environment of the task with the given index.
            task_names, task_params: of all tasks.
            tasks: indices of the tasks to keep, in this order; None keeps all.
            max_episode_steps: steps after which an episode is truncated, None if the environments do it.

        Raises:
            ValueError: num_envs or tasks are not as above, or the spaces are not supported.
        """
        chosen = select_tasks(len(task_names), tasks)
        first = make_env(chosen[0])
        super().__init__(
            num_envs, task_names, task_params, first.observation_space, first.action_space, tasks
        )
        self.envs = [first, *(make_env(chosen[i // self.envs_per_task]) for i in range(1, num_envs))]
        self.max_episode_steps = max_episode_steps

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every environment anew.

        Returns:
            Observations (n, obs) float32, and an empty dictionary.

        Raises:
            ValueError: a list of seeds of the wrong length.
        """
        seeds = self._start_episodes(seed, options)
        observations = np.empty(self.observation_space.shape, dtype=np.float32)
        for i, (env, env_seed) in enumerate(zip(self.envs, seeds, strict=True)):
            observations[i] = env.reset(seed=env_seed, options=options)[0]
        return observations, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment; the ones whose episode ends are reset at once.

        Args:
            actions: (n,) integers, or (n, act) floats, which are clipped to the bounds of the action space.

        Returns:
            Observations (n, obs) float32, rewards (n,) float64, terminated and truncated (n,) bool, infos.
        """
        # Lists first, arrays once at the end: storing numbers one by one in an array takes longer.
        single_actions = actions.tolist() if self.discrete else clip_actions(actions, self.action_space)
        steps = [env.step(action) for env, action in zip(self.envs, single_actions, strict=True)]
        rows, reward_list, terminated_list, truncated_list, info_list = zip(*steps, strict=True)
        observations = np.concatenate(rows, dtype=np.float32, casting="same_kind").reshape(self.num_envs, -1)
        rewards = np.array(reward_list, dtype=np.float64)
        terminated = np.array(terminated_list, dtype=np.bool_)
        truncated = np.array(truncated_list, dtype=np.bool_)
        self.episode_returns += rewards
        self.episode_lengths += 1
        if self.max_episode_steps is not None:
            truncated |= self.episode_lengths >= self.max_episode_steps
        done = terminated | truncated
        if not done.any():
            return observations, rewards, terminated, truncated, {}
        infos = self._finish_episodes(done, observations)
        if any("success" in info for info in info_list):
            reported = done & ["success" in info for info in info_list]
            success = reported & [bool(info.get("success", False)) for info in info_list]
            infos["final_info"] |= {"success": success, "_success": reported}
        observations = observations.copy()
        for i in done.nonzero()[0].tolist():
            observations[i] = self.envs[i].reset()[0]
        return observations, rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()


class TaskVectorWrapper(gym.vector.VectorWrapper):
    """Gives the attributes and infos of `TaskVectorEnv` to another vector environment of several tasks.

    Observations become float32, `final_obs` dense, and episode statistics are added where they are missing.
    """

    def __init__(self, env: gym.vector.VectorEnv, num_tasks: int) -> None:
        """Wrap `env`, whose environment i must belong to task i // (num_envs / num_tasks).

        Its attributes `task_names` and `task_params` are taken over if it has them.

        Raises:
            ValueError: it is not in autoreset mode SAME_STEP, names and parameters do not fit the number of
                tasks, or the spaces are not supported.
        """
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"the autoreset mode must be SAME_STEP, got {mode}")
        spaces = env.single_observation_space, env.single_action_space
        self.obs_dim, self.act_dim, self.discrete = read_spaces(*spaces)
        self.num_tasks = num_tasks
        self.envs_per_task = env.num_envs // num_tasks
        self.task_names = list(getattr(env.unwrapped, "task_names", [f"task{i}" for i in range(num_tasks)]))
        self.task_params = list(getattr(env.unwrapped, "task_params", [{}] * num_tasks))
        if not len(self.task_names) == len(self.task_params) == num_tasks:
            raise ValueError(f"{num_tasks} tasks need as many task_names and task_params")
        self.single_observation_space = _as_float32(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.episode_returns = np.zeros(env.num_envs)
        self.episode_lengths = np.zeros(env.num_envs, dtype=np.int64)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every environment anew; observations (n, obs) float32 and the environment's own infos."""
        self.episode_returns[:] = 0.0
        self.episode_lengths[:] = 0
        observations, infos = self.env.reset(seed=seed, options=options)
        return observations.astype(np.float32), infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every environment, with the infos of `TaskVectorEnv` added to the environment's own.

        Raises:
            ValueError: an episode ended and the environment gave no `final_obs`.
        """
        actions = clip_actions(actions, self.env.action_space)
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        observations = observations.astype(np.float32)
        self.episode_returns += rewards
        self.episode_lengths += 1
        done = terminated | truncated
        if not done.any():
            return observations, rewards, terminated, truncated, infos
        if "final_obs" not in infos:
            raise ValueError(f"{self.env} ended an episode without giving final_obs in its infos")
        final_obs = observations.copy()
        final_obs[done] = np.stack([infos["final_obs"][i] for i in np.flatnonzero(done)])
        added = _final_infos(done, final_obs, self.episode_returns, self.episode_lengths)
        # Its own statistics come first: they may be of rewards before some scaling.
        added["final_info"] |= infos.get("final_info", {})
        self.episode_returns[done] = 0.0
        self.episode_lengths[done] = 0
        return observations, rewards, terminated, truncated, {**infos, **added}

    def get_state(self) -> None:
        """None: the environment cannot be saved."""
