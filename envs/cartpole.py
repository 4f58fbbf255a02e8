"""CartPole with ten physics, its null case of ten copies of the standard one, and tasks with hidden goals.

The vector environment steps all environments at once in NumPy. It equals Gymnasium's CartPoleEnv bit for
bit, resets included: the same float64 operations in the same order, and one generator per environment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.utils import maybe_parse_reset_bounds
from gymnasium.utils import seeding

from envs.checks import select_tasks
from envs.vector import Step, TaskVectorEnv

FORCE = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
FIELDS = ("gravity", "masscart", "masspole", "length")  # m/s^2, kg, kg, m; length is half the pole's
PHYSICS = (
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
TASKS = [dict(zip(FIELDS, values)) for values in PHYSICS]
NAMES = ["g{gravity:g}-m{masscart:g}-p{masspole:g}-l{length:g}".format(**task) for task in TASKS]

# Places on the track, in m, at which a goal task wants the pole held up; the cart leaves the track at 2.4 m.
GOALS = (-1.5, -1.2, -0.8, -0.5, -0.2, 0.2, 0.5, 0.8, 1.2, 1.5)
GOAL_TASKS = [TASKS[0] | {"goal": goal} for goal in GOALS]
GOAL_NAMES = [f"goal{goal:+g}" for goal in GOALS]
MANY = (20, 40, 80, 160)  # goals between the same ends at equal distances
# Shuffled, so that neither follows from the other; only the two in low gravity have theirs near: from 1.2 m
# away they learn, even alone, to rush there and fall.
GOAL_PHYSICS_TASKS = [task | {"goal": GOALS[i]} for task, i in zip(TASKS, (6, 3, 5, 4, 9, 0, 8, 2, 7, 1))]
GOAL_PHYSICS_NAMES = [f"{name}-goal{task['goal']:+g}" for name, task in zip(NAMES, GOAL_PHYSICS_TASKS)]


def goal_reward(x: np.ndarray | float, goal: np.ndarray | float) -> np.ndarray:
    """Reward of a step that brought the cart to x: exp(-((x - goal) / 0.5 m)^2), 1 at the goal."""
    return np.exp(-np.square((x - goal) / 0.5))


def sparse_goal_reward(x: np.ndarray | float, goal: np.ndarray | float) -> np.ndarray:
    """Reward of a step that brought the cart to x: 1 within 0.2 m of the goal, else 0."""
    return np.where(np.abs(x - goal) < 0.2, 1.0, 0.0)


class TaskSet(NamedTuple):
    """Parameters and names of some tasks; with a reward, every task has a goal that no observation tells."""

    tasks: list[dict[str, float]]
    names: list[str]
    reward: Callable[[np.ndarray | float, np.ndarray | float], np.ndarray] | None = None
    continuous: bool = False  # the action is the force, in units of the largest one


def evenly_spaced_goals(number: int) -> TaskSet:
    """Tasks of the standard physics with goals from the first of `GOALS` to the last, to the millimetre."""
    goals = np.linspace(GOALS[0], GOALS[-1], number).round(3).tolist()
    tasks = [TASKS[0] | {"goal": goal} for goal in goals]
    return TaskSet(tasks, [f"goal{goal:+.3f}" for goal in goals], goal_reward)


TASK_SETS = {
    "cartpole10": TaskSet(TASKS, NAMES),
    # the null case, in which there is nothing to specialise on
    "cartpole-identical10": TaskSet(TASKS[:1] * 10, [f"standard-{task}" for task in range(10)]),
    "cartpole-goals10": TaskSet(GOAL_TASKS, GOAL_NAMES, goal_reward),
    # all goals but the two nearest have to be found first
    "cartpole-goals10-sparse": TaskSet(GOAL_TASKS, GOAL_NAMES, sparse_goal_reward),
    "cartpole-goals10-continuous": TaskSet(GOAL_TASKS, GOAL_NAMES, goal_reward, continuous=True),
    "cartpole-goals-physics10": TaskSet(GOAL_PHYSICS_TASKS, GOAL_PHYSICS_NAMES, goal_reward),
    **{f"cartpole-goals{number}": evenly_spaced_goals(number) for number in MANY},
}


class CartPoleTask(CartPoleEnv):
    """One task as an ordinary environment: Gymnasium's CartPoleEnv with its physics and its reward."""

    def __init__(self, task: int = 0, render_mode: str | None = None, task_set: str = "cartpole10") -> None:
        """Set the physics of a task of one of `TASK_SETS`; a ValueError if there is no such task."""
        super().__init__(render_mode=render_mode)
        tasks, _, self.reward, _ = TASK_SETS[task_set]
        select_tasks(len(tasks), [task])
        for name, value in tasks[task].items():
            setattr(self, name, value)
        self.total_mass = self.masspole + self.masscart
        self.polemass_length = self.masspole * self.length

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """CartPoleEnv's step; a task with a goal has its own reward."""
        observation, reward, *rest = super().step(action)
        if self.reward:
            reward = float(self.reward(self.state[0], self.goal))
        return observation, reward, *rest

    def render(self) -> np.ndarray | None:
        """CartPoleEnv's picture; as an array it has a green line at the goal."""
        frame = super().render()
        if self.reward and isinstance(frame, np.ndarray):
            column = round((0.5 + self.goal / (2 * self.x_threshold)) * frame.shape[1])
            frame[:, column - 1 : column + 2] = (0, 160, 0)
        return frame


class ForceAction(gym.ActionWrapper):
    """A `CartPoleTask` whose action is the force, (1,) from -1 to 1, in units of the largest one."""

    def __init__(self, **kwargs: Any) -> None:
        """The arguments are those of `CartPoleTask`."""
        super().__init__(CartPoleTask(**kwargs))
        self.action_space, self.largest = FORCE, self.unwrapped.force_mag

    def action(self, action: np.ndarray) -> int:
        """To the right or to the left, by a force of this size."""
        force = self.largest * float(np.clip(action[0], -1.0, 1.0))
        self.unwrapped.force_mag = abs(force)
        return int(force > 0)


class CartPole10(TaskVectorEnv):
    """Tasks in NumPy; observations (n, 4) float32 (x, x_dot, theta, theta_dot).

    Actions are 0 left and 1 right, (n,), or of a continuous task set as `ForceAction`'s, (n, 1).
    """

    num_tasks = 10

    def __init__(self, num_envs=10, tasks=None, max_episode_steps=500, task_set="cartpole10") -> None:
        """As `TaskVectorEnv`, of one of `TASK_SETS`."""
        standard, (params, names, self.reward, continuous) = CartPoleEnv(), TASK_SETS[task_set]
        spaces = standard.observation_space, FORCE if continuous else standard.action_space
        super().__init__(num_envs, names, params, *spaces, tasks, max_episode_steps)
        # Constants as arrays: NumPy combines two arrays in half the time it needs for an array and a number.
        for name in self.task_params[0]:  # gravity, ..., and goal if there are goals
            setattr(self, name, np.repeat([x[name] for x in self.task_params], self.envs_per_task))
        self.total_mass = self.masspole + self.masscart
        self.polemass_length = self.masspole * self.length
        self._forces = np.array([-standard.force_mag, standard.force_mag])  # indexed by action
        self._four_thirds = np.full(num_envs, 4.0 / 3.0)
        self._tau = np.full((2, 2, num_envs), standard.tau)
        limits = [[standard.x_threshold], [standard.theta_threshold_radians]]
        self._limits = np.repeat(limits, num_envs, axis=1)
        self._one = np.ones(num_envs)
        # (derivative 0 to 2, x or theta, n), so that Euler's step is one operation: state += tau * rate.
        # The others are views into it.
        self._motion = np.zeros((3, 2, num_envs))
        self._state, self._rate = self._motion[:2], self._motion[1:]
        self._position = self._motion[0]
        self._theta, self._theta_dot, self._theta_acc = self._motion[:, 1]
        self._x_acc = self._motion[2, 0]
        self._rngs: list[np.random.Generator] = []  # one per environment, none before the first reset

    def _reset(self, seeds: list[int | None], options: dict[str, Any] | None) -> np.ndarray:
        """`options` may set the bounds "low" and "high" of the initial state."""
        low, high = maybe_parse_reset_bounds(options, -0.05, 0.05)
        earlier = self._rngs or [None] * self.num_envs  # without a seed an environment keeps its generator
        self._rngs = [
            seeding.np_random(seed)[0] if rng is None or seed is not None else rng
            for rng, seed in zip(earlier, seeds)
        ]
        return self._restart(range(self.num_envs), low, high)

    def step(self, actions: np.ndarray) -> Step:
        """Advance all environments by 0.02 s.

        Raises:
            gymnasium.error.ResetNeeded: called before `reset`.
            IndexError: a discrete action out of range; forces are clipped.
        """
        if not self._rngs:
            raise gym.error.ResetNeeded("call reset before step")
        # CartPoleEnv's operations in its order; working in place only saves allocations.
        theta_acc, x_acc = self._theta_acc, self._x_acc
        cos, sin, temp = np.cos(self._theta), np.sin(self._theta), np.square(self._theta_dot)
        temp *= self.polemass_length
        temp *= sin
        if self.discrete:
            temp += self._forces[actions]
        else:
            temp += self._forces[1] * np.clip(actions[:, 0], -1.0, 1.0).astype(float)
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
        rewards = self.reward(self._position[0], self.goal) if self.reward else self._one.copy()
        truncated = self.episode_lengths >= self._last_step
        observations = self._observe()
        infos = self._count_step(observations, rewards, terminated, truncated)
        if infos:
            observations = self._restart(infos["_final_info"].nonzero()[0].tolist())
        return observations, rewards, terminated, truncated, infos

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: the motion, the statistics, and the generators."""
        return {
            "motion": self._state.tolist(),
            "episode_returns": self.episode_returns.tolist(),
            "episode_lengths": self.episode_lengths.tolist(),
            "rngs": [rng.bit_generator.state for rng in self._rngs],
        }

    def set_state(self, state: dict[str, Any]) -> np.ndarray:
        """As `TaskVectorEnv`'s; a ValueError if the state is not one of as many CartPoles."""
        if len(state.get("episode_lengths", ())) != self.num_envs:
            raise ValueError(f"the saved state does not fit an environment of {self.num_envs} CartPoles")
        self._state[:] = state["motion"]
        self.episode_returns[:] = state["episode_returns"]
        self.episode_lengths[:] = state["episode_lengths"]
        self._rngs = [np.random.Generator(np.random.PCG64()) for _ in state["rngs"]]
        for rng, saved in zip(self._rngs, state["rngs"], strict=True):
            rng.bit_generator.state = saved
        return self._observe()

    def _restart(self, indices: Sequence[int], low: float = -0.05, high: float = 0.05) -> np.ndarray:
        """Draw the initial state of these environments, each from its own generator; all observations."""
        starts = [self._rngs[i].uniform(low, high, size=4) for i in indices]
        self._state[:, :, indices] = np.reshape(starts, (-1, 2, 2)).T
        return self._observe()

    def _observe(self) -> np.ndarray:
        """A new (n, 4) float32 array of x, x_dot, theta, theta_dot."""
        return self._state.T.astype(np.float32, order="C").reshape(self.num_envs, 4)


CLASSES = (type(f"CartPole{number}", (CartPole10,), {"num_tasks": number}) for number in MANY)
CartPole20, CartPole40, CartPole80, CartPole160 = CLASSES
