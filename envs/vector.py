"""Multi-task vector environments: the base class, a loop over single ones, and a wrapper of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from envs.checks import check_spaces, check_tasks, common_spaces, select_tasks, try_out

SUCCESS = ("success", "is_success")  # names of it in an environment's infos
Seeds = int | Sequence[int | None] | None
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def final_success(infos: dict[str, Any]) -> np.ndarray | float:
    """Of a step that ended episodes: success of every environment (n,), 0 or 1, NaN if none is reported.

    A ValueError if one reports something else.
    """
    final = infos["final_info"]
    name = next((x for x in SUCCESS if f"_{x}" in final), None)
    if name is None:
        return np.nan
    reported = final[f"_{name}"]
    if odd := set(np.asarray(final[name])[reported].tolist()) - {0, 1}:
        raise ValueError(f"{name} must be True or False, an environment reports {odd.pop()!r}")
    return np.where(reported, final[name], np.nan)


def check_reports(successes: np.ndarray) -> None:
    """Refuse successes of episodes that are NaN for some: a rate would be that of the others."""
    if np.isnan(successes).any() and not np.isnan(successes).all():
        raise ValueError("infos must have success, True or False, at the end of every episode or of none")


class TaskVectorEnv(gym.vector.VectorEnv):
    """Vector environment of several tasks: environment i belongs to task i // envs_per_task.

    `step` takes actions (n,) integers, or (n, act) floats; n is num_envs. It returns observations (n, obs)
    float32, rewards (n,) float64, terminated and truncated (n,) bool, new arrays, and infos. When an episode
    ends it is reset in the same step (autoreset mode SAME_STEP): the observation returned is the first of its
    next episode, and `infos`, empty otherwise, holds what the episode ended with:

        final_obs           (n, obs) float32   last observation; the current one if no episode ended
        _final_obs          (n,) bool          True if an episode ended
        final_info          {"episode": {"r": (n,) float64 return, "l": (n,) int64 length in steps,
                             "_r": mask, "_l": mask}, "_episode": mask}; zero if no episode ended;
                             "success": (n,) True or False, "_success": mask, if an environment reports it
                             at the end of an episode
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
            ValueError: num_envs or tasks are not as above, the spaces are not supported; or `check_tasks`.
        """
        chosen = select_tasks(len(task_names), tasks)
        if num_envs < 1 or num_envs % len(chosen):
            raise ValueError(f"num_envs={num_envs} is no positive multiple of the {len(chosen)} tasks")
        check_spaces(observation_space, action_space)
        self.num_envs, self.num_tasks, self.envs_per_task = num_envs, len(chosen), num_envs // len(chosen)
        names, params = check_tasks(task_names, task_params)
        self.task_names = [names[task] for task in chosen]
        self.task_params = [params[task] for task in chosen]
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
            raise ValueError("options['reset_mask'] is not supported: episodes restart where they end")
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        elif len(seeds := list(seed)) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need as many seeds, got {len(seeds)}")
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
    """Single environments stepped one after the other; of their infos success is kept."""

    def __init__(self, num_envs, make_env, task_names, task_params, tasks=None, max_episode_steps=None):
        """As `TaskVectorEnv`; make_env(task) builds one environment of the task with this index."""
        chosen = select_tasks(len(task_names), tasks)
        first = make_env(chosen[0])
        spaces = first.observation_space, first.action_space
        super().__init__(num_envs, task_names, task_params, *spaces, chosen, max_episode_steps)
        self.envs = [first, *(make_env(chosen[i // self.envs_per_task]) for i in range(1, num_envs))]
        if len({id(env.unwrapped) for env in self.envs}) < num_envs:
            raise ValueError("make_env gave the same environment twice: it must build one at every call")
        names = np.repeat(self.task_names, self.envs_per_task).tolist()
        observations, _ = common_spaces(self.envs, names)  # the widest bounds
        self.single_observation_space = Box(observations.low, observations.high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        for env, name in zip(self.envs[:: self.envs_per_task], self.task_names):
            try_out(env, name)

    def _reset(self, seeds: list[int | None], options: dict[str, Any] | None) -> np.ndarray:
        rows = [env.reset(seed=seed, options=options)[0] for env, seed in zip(self.envs, seeds)]
        return np.array(rows, dtype=np.float32)

    def step(self, actions: np.ndarray) -> Step:
        """Step every environment."""
        # Lists first, arrays once at the end: storing numbers one by one in an array takes longer.
        single_actions = actions.tolist() if self.discrete else actions
        steps = [env.step(action) for env, action in zip(self.envs, single_actions, strict=True)]
        rows, reward_list, terminated_list, truncated_list, info_list = zip(*steps)
        observations = np.concatenate(rows, dtype=np.float32, casting="same_kind")
        observations = observations.reshape(self.num_envs, self.obs_dim)
        rewards = np.array(reward_list, dtype=np.float64)
        terminated = np.array(terminated_list, dtype=np.bool_)
        truncated = np.array(truncated_list, dtype=np.bool_)
        truncated |= self.episode_lengths >= self._last_step
        infos = self._count_step(observations, rewards, terminated, truncated)
        if infos:
            found = [next((info[x] for x in SUCCESS if x in info), None) for info in info_list]
            reported = infos["_final_info"] & [x is not None for x in found]
            if reported.any():
                success = [x if here else False for x, here in zip(found, reported)]
                infos["final_info"] |= {"success": np.array(success), "_success": reported}
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

    one_seed = False  # its `reset` takes one integer: of a list it gets the first

    def __init__(self, env: gym.vector.VectorEnv, tasks: Sequence[int]) -> None:
        """Wrap `env` of these tasks, with its attributes `task_names` and `task_params` if it has them.

        Raises:
            ValueError: it is not in autoreset mode SAME_STEP, names and parameters do not fit the number of
                tasks, or the spaces are not supported.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"the autoreset mode must be SAME_STEP, got {mode}")
        num_tasks = len(tasks)
        names = getattr(env.unwrapped, "task_names", [f"task{i}" for i in tasks])
        params = getattr(env.unwrapped, "task_params", [{}] * num_tasks)
        if not len(names) == len(params) == num_tasks:
            raise ValueError(f"{num_tasks} tasks need as many task_names and task_params")
        spaces = env.single_observation_space, env.single_action_space
        check_spaces(*spaces)
        if singles := getattr(env.unwrapped, "envs", None):  # as SyncVectorEnv has them
            names, params = check_tasks(names, params)
            common_spaces(singles, np.repeat(names, len(singles) // num_tasks).tolist())
        limit = env.spec.max_episode_steps if env.spec else None
        super().__init__(env.num_envs, names, params, *spaces, max_episode_steps=limit)
        self.env, self.spec = env, env.spec

    @property
    def unwrapped(self) -> gym.vector.VectorEnv:
        """The environment itself."""
        return self.env.unwrapped

    def reset(self, *, seed: Seeds = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start every environment anew; observations (n, obs) float32 and the environment's own infos."""
        self.episode_returns[:] = self.episode_lengths[:] = 0
        if self.one_seed and isinstance(seed, Sequence):
            seed = seed[0]
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._check_observations(observations), infos

    def try_out(self) -> None:
        """A reset and a step, which raise a ValueError if what they give cannot be used."""
        try:
            self.reset(seed=[0] * self.num_envs)
        except (gym.error.Error, TypeError, ValueError):
            self.one_seed = True  # as `gym.vector.VectorEnv` has it; what else is wrong is seen again
            self.reset(seed=[0])
        actions = [0] * self.num_envs if self.discrete else [self.single_action_space.low] * self.num_envs
        self.step(np.array(actions))

    def _check_observations(self, observations: np.ndarray) -> np.ndarray:
        if np.shape(observations) != (self.num_envs, self.obs_dim):
            wanted = f"({self.num_envs}, {self.obs_dim})"
            raise ValueError(f"{self.env}: observations must be {wanted}, got {np.shape(observations)}")
        return np.array(observations, dtype=np.float32)  # a copy: it may use its arrays again

    def step(self, actions: np.ndarray) -> Step:
        """Step every environment, with the infos of `TaskVectorEnv` added to the environment's own.

        Raises:
            ValueError: its arrays have other shapes, or no `final_obs` when an episode ends.
        """
        result = self.env.step(actions.copy())  # it may change them
        if len(result) != 5:
            raise ValueError(f"{self.env}: step must return 5 values, terminated and truncated apart")
        observations, rewards, terminated, truncated, infos = result
        for name, x in zip(("rewards", "terminated", "truncated"), result[1:4]):
            if np.shape(x) != (self.num_envs,):
                raise ValueError(f"{self.env}: {name} must be ({self.num_envs},), got shape {np.shape(x)}")
        observations, rewards = self._check_observations(observations), np.array(rewards)
        terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        final_obs, ended = observations.copy(), np.flatnonzero(terminated | truncated)
        if ended.size and "final_obs" not in infos:
            raise ValueError(f"{self.env} ended an episode without giving final_obs in its infos")
        for i in ended:
            final_obs[i] = infos["final_obs"][i]
        added = self._count_step(final_obs, rewards, terminated, truncated)
        if added:  # its own statistics come first: they may be of rewards before some scaling
            added["final_info"] |= infos.get("final_info", {})
        else:  # what it says of ends at every step
            infos = {name: x for name, x in infos.items() if not name.lstrip("_").startswith("final_")}
        return observations, rewards, terminated, truncated, {**infos, **added}

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment."""
        self.env.close(**kwargs)


class UnitActions(gym.vector.VectorActionWrapper):
    """Lets Box actions be in units in which the environment's bounds are -1 and 1, and clips them there.

    A Gaussian policy starts around 0 with a standard deviation of 1, and knows no bounds. The attributes are
    those of the `TaskVectorEnv` inside.
    """

    def __init__(self, env: TaskVectorEnv) -> None:
        """Wrap an environment with Box actions."""
        super().__init__(env)
        self.low, self.high = env.single_action_space.low, env.single_action_space.high
        self.in_units = (self.low == -1).all() and (self.high == 1).all()
        self.single_action_space = Box(-1.0, 1.0, self.low.shape, np.float32)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the environment."""
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """From -1 to 1, (n, act), to the environment's bounds."""
        actions = np.clip(actions, -1.0, 1.0)
        if self.in_units:
            return actions
        share = (actions.astype(np.float64) + 1) / 2
        scaled = (1 - share) * self.low + share * self.high
        return scaled.astype(self.low.dtype)
