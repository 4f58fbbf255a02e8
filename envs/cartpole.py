"""CartPole with ten physics, its null case of ten copies of the standard one, and suites with hidden goals.

The vector environment steps all environments at once in NumPy. It equals Gymnasium's CartPoleEnv bit for
bit, resets included: the same float64 operations in the same order, and one generator per environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.utils import maybe_parse_reset_bounds
from gymnasium.utils import seeding

from envs.vector import TaskVectorEnv

FIELDS = ("gravity", "masscart", "masspole", "length")  # m/s^2, kg, kg, m; length is half the pole's
TASKS = [
    dict(zip(FIELDS, values, strict=True))
    for values in (
        (9.8, 1.0, 0.1, 0.5),  # Gymnasium's
        (3.7, 0.3, 0.05, 2.0),
        (1.6, 0.2, 0.05, 1.5),
        (24.8, 5.0, 0.1, 0.2),
        (20.0, 3.0, 1.0, 0.25),
        (9.8, 5.0, 0.05, 1.0),
        (15.0, 0.5, 1.0, 1.5),
        (9.8, 0.3, 0.5, 0.2),
        (24.8, 1.0, 0.5, 2.0),
        (5.0, 4.0, 1.0, 0.3),
    )
]
NAMES = ["g{gravity:g}-m{masscart:g}-p{masspole:g}-l{length:g}".format(**task) for task in TASKS]


# Places on the track, in m, at which a goal task wants the pole held up; the cart leaves the track at 2.4 m.
GOALS = (-1.5, -1.2, -0.8, -0.5, -0.2, 0.2, 0.5, 0.8, 1.2, 1.5)
GOAL_WIDTH = 0.5  # m
SPARSE_WIDTH = 0.2  # m
GOAL_TASKS = [TASKS[0] | {"goal": goal} for goal in GOALS]
# Shuffled, so that neither follows from the other; only the two in low gravity have theirs near: from 1.2 m
# away they learn, even alone, to rush there and fall.
GOAL_PHYSICS_TASKS = [task | {"goal": GOALS[i]} for task, i in zip(TASKS, (6, 3, 5, 4, 9, 0, 8, 2, 7, 1))]


def goal_reward(x: np.ndarray | float, goal: np.ndarray | float) -> np.ndarray:
    """Reward of a step that brought the cart to x: exp(-((x - goal) / 0.5 m)^2), 1 at the goal."""
    return np.exp(-np.square((x - goal) / GOAL_WIDTH))


def sparse_goal_reward(x: np.ndarray | float, goal: np.ndarray | float) -> np.ndarray:
    """Reward of a step that brought the cart to x: 1 within 0.2 m of the goal, else 0."""
    return np.where(np.abs(x - goal) < SPARSE_WIDTH, 1.0, 0.0)


class CartPoleTask(CartPoleEnv):
    """One task as an ordinary environment: Gymnasium's CartPoleEnv with the task's physics."""

    all_tasks = TASKS

    def __init__(self, task: int = 0, render_mode: str | None = None) -> None:
        """Set the physics of task number `task`.

        Raises:
            ValueError: no such task.
        """
        super().__init__(render_mode=render_mode)
        if task not in range(len(self.all_tasks)):
            raise ValueError(f"task must be an integer from 0 to {len(self.all_tasks) - 1}, got {task}")
        for name, value in self.all_tasks[task].items():
            setattr(self, name, value)
        self.total_mass = self.masspole + self.masscart
        self.polemass_length = self.masspole * self.length


class CartPoleIdenticalTask(CartPoleTask):
    """One of the ten copies of the standard task."""

    all_tasks = [TASKS[0]] * len(TASKS)


class CartPoleGoalTask(CartPoleTask):
    """One place to hold the pole up at, which the observation does not tell: reward `goal_reward` a step."""

    all_tasks = GOAL_TASKS
    reward = staticmethod(goal_reward)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """CartPoleEnv's step, with another reward."""
        observation, _, *rest = super().step(action)
        return observation, float(self.reward(self.state[0], self.goal)), *rest

    def render(self) -> np.ndarray | None:
        """CartPoleEnv's picture; as an array it has a green line at the goal."""
        frame = super().render()
        if isinstance(frame, np.ndarray):
            column = round((0.5 + self.goal / (2 * self.x_threshold)) * frame.shape[1])
            frame[:, column - 1 : column + 2] = (0, 160, 0)
        return frame


class CartPoleGoalPhysicsTask(CartPoleGoalTask):
    """One of the ten physics, with a goal."""

    all_tasks = GOAL_PHYSICS_TASKS


class CartPoleSparseGoalTask(CartPoleGoalTask):
    """The same places, with reward `sparse_goal_reward`: all but the two nearest have to be found first."""

    reward = staticmethod(sparse_goal_reward)


class CartPole10(TaskVectorEnv):
    """The ten tasks in NumPy; observations (n, 4) float32, actions (n,) of 0 (left) and 1 (right)."""

    all_tasks = TASKS
    all_names = NAMES
    num_tasks = len(TASKS)

    def __init__(
        self, num_envs: int = len(TASKS), tasks: Sequence[int] | None = None, max_episode_steps: int = 500
    ) -> None:
        """Build `num_envs` environments, the same number for each task.

        Args:
            num_envs: a positive multiple of the number of tasks.
            tasks: indices of the tasks to keep, in this order; None keeps all ten.
            max_episode_steps: steps after which an episode is truncated.

        Raises:
            ValueError: num_envs or tasks are not as above.
        """
        standard = CartPoleEnv()
        super().__init__(
            num_envs, self.all_names, self.all_tasks, standard.observation_space, standard.action_space, tasks
        )
        # Constants as arrays: NumPy combines two arrays in half the time it needs for an array and a number.
        self.gravity, self.masscart, self.masspole, self.length = (
            np.repeat([params[name] for params in self.task_params], self.envs_per_task) for name in FIELDS
        )
        self.total_mass = self.masspole + self.masscart
        self.polemass_length = self.masspole * self.length
        self._forces = np.array([-standard.force_mag, standard.force_mag])  # indexed by action
        self._four_thirds = np.full(num_envs, 4.0 / 3.0)
        self._tau = np.full((2, 2, num_envs), standard.tau)
        self._limits = np.repeat(
            [[standard.x_threshold], [standard.theta_threshold_radians]], num_envs, axis=1
        )
        self._step_limit = np.full(num_envs, max_episode_steps)
        self._one, self._one_step = np.ones(num_envs), np.ones(num_envs, dtype=np.int64)
        # (derivative 0 to 2, x or theta, n), so that Euler's step is one operation: state += tau * rate.
        # The others are views into it.
        self._motion = np.zeros((3, 2, num_envs))
        self._state, self._rate = self._motion[:2], self._motion[1:]
        self._position = self._motion[0]
        self._theta, self._theta_dot, self._theta_acc = self._motion[:, 1]
        self._x_acc = self._motion[2, 0]
        self._rngs: list[np.random.Generator] = []  # one per environment, none before the first reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every environment anew; `options` may set the bounds "low" and "high" of the initial state.

        Returns:
            Observations (n, 4) float32 (x, x_dot, theta, theta_dot), and an empty dictionary.

        Raises:
            ValueError: a list of seeds of the wrong length, or bounds in the wrong order.
        """
        seeds = self._start_episodes(seed, options)
        low, high = maybe_parse_reset_bounds(options, -0.05, 0.05)
        if not self._rngs:
            self._rngs = [seeding.np_random(env_seed)[0] for env_seed in seeds]
        else:  # without a seed an environment keeps its generator
            self._rngs = [
                rng if env_seed is None else seeding.np_random(env_seed)[0]
                for rng, env_seed in zip(self._rngs, seeds, strict=True)
            ]
        self._restart(np.arange(self.num_envs), low, high)
        return self._observe(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance all environments by 0.02 s; the ones whose episode ends are reset at once.

        Args:
            actions: (n,) integers, 0 pushes left and 1 right.

        Returns:
            Observations (n, 4) float32, rewards (n,) float64, terminated (n,) and truncated (n,) bool, infos.

        Raises:
            gymnasium.error.ResetNeeded: called before `reset`.
            IndexError: an action out of range.
        """
        if not self._rngs:
            raise gym.error.ResetNeeded("call reset before step")
        # CartPoleEnv's operations in its order; working in place only saves allocations.
        theta_acc, x_acc = self._theta_acc, self._x_acc
        cos, sin, temp = np.cos(self._theta), np.sin(self._theta), np.square(self._theta_dot)
        temp *= self.polemass_length
        temp *= sin
        temp += self._forces[actions]
        temp /= self.total_mass
        np.multiply(self.gravity, sin, out=theta_acc)
        theta_acc -= cos * temp
        inertia = np.square(cos)
        inertia *= self.masspole
        inertia /= self.total_mass
        np.subtract(self._four_thirds, inertia, out=inertia)
        inertia *= self.length
        theta_acc /= inertia
        np.multiply(self.polemass_length, theta_acc, out=x_acc)
        x_acc *= cos
        x_acc /= self.total_mass
        np.subtract(temp, x_acc, out=x_acc)
        self._state += self._tau * self._rate

        beyond = np.abs(self._position) > self._limits
        terminated = beyond[0] | beyond[1]
        rewards = self._rewards()
        self.episode_returns += rewards
        self.episode_lengths += self._one_step
        truncated = self.episode_lengths >= self._step_limit
        done = terminated | truncated
        observations = self._observe()
        if not np.count_nonzero(done):  # a quarter of the time of done.any()
            return observations, rewards, terminated, truncated, {}
        infos = self._finish_episodes(done, observations)
        self._restart(done.nonzero()[0])
        return self._observe(), rewards, terminated, truncated, infos

    def _rewards(self) -> np.ndarray:
        """Of the step that led to the current state, (n,) float64."""
        return self._one.copy()

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: the motion, the statistics, and the generators."""
        return {
            "motion": self._state.tolist(),
            "episode_returns": self.episode_returns.tolist(),
            "episode_lengths": self.episode_lengths.tolist(),
            "rngs": [rng.bit_generator.state for rng in self._rngs],
        }

    def set_state(self, state: dict[str, Any]) -> np.ndarray:
        """Continue from a `get_state()` of an environment built with the same arguments.

        Returns:
            The current observations (n, 4) float32.

        Raises:
            ValueError: the state is not one of a CartPole environment of this size.
        """
        missing = {"motion", "episode_returns", "episode_lengths", "rngs"} - state.keys()
        if missing or len(state["episode_lengths"]) != self.num_envs:
            raise ValueError(f"the saved state does not fit an environment of {self.num_envs} CartPoles")
        self._state[:] = state["motion"]
        self.episode_returns[:] = state["episode_returns"]
        self.episode_lengths[:] = state["episode_lengths"]
        self._rngs = [np.random.Generator(np.random.PCG64()) for _ in state["rngs"]]
        for rng, saved in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = saved
        return self._observe()

    def _restart(self, indices: np.ndarray, low: float = -0.05, high: float = 0.05) -> None:
        """Draw the initial state of the environments with these indices, each from its own generator."""
        starts = [self._rngs[i].uniform(low, high, size=4) for i in indices.tolist()]
        self._state[:, :, indices] = np.reshape(starts, (-1, 2, 2)).T

    def _observe(self) -> np.ndarray:
        """A new (n, 4) float32 array of x, x_dot, theta, theta_dot."""
        return self._state.T.astype(np.float32, order="C").reshape(self.num_envs, 4)


class CartPoleIdentical10(CartPole10):
    """Ten copies of the standard task: the null case, where there is nothing to specialise on."""

    all_tasks = CartPoleIdenticalTask.all_tasks
    all_names = [f"standard-{task}" for task in range(len(TASKS))]


class CartPoleGoals10(CartPole10):
    """The standard physics and ten hidden goals, see `CartPoleGoalTask`."""

    all_tasks = GOAL_TASKS
    all_names = ["goal{goal:+g}".format(**task) for task in GOAL_TASKS]
    reward = staticmethod(goal_reward)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `CartPole10`."""
        super().__init__(*args, **kwargs)
        self.goal = np.repeat([params["goal"] for params in self.task_params], self.envs_per_task)

    def _rewards(self) -> np.ndarray:
        return self.reward(self._position[0], self.goal)


class CartPoleSparseGoals10(CartPoleGoals10):
    """The same, see `CartPoleSparseGoalTask`."""

    reward = staticmethod(sparse_goal_reward)


class CartPoleGoalsPhysics10(CartPoleGoals10):
    """The ten physics of `CartPole10`, each with a hidden goal."""

    all_tasks = GOAL_PHYSICS_TASKS
    all_names = [f"{name}-goal{task['goal']:+g}" for name, task in zip(NAMES, GOAL_PHYSICS_TASKS)]
