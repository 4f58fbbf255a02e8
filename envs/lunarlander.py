"""LunarLander under twenty gravities and winds, and under five of them with a hidden place to land at.

`LunarLanderTask` is Gymnasium's LunarLander with less Python around the physics: the same seed and actions
give the same numbers, bit for bit. `LunarLanderGoalTask` moves the pad, which the observation does not tell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.envs.box2d.lunar_lander import (
    FPS,
    LEG_DOWN,
    MAIN_ENGINE_POWER,
    MAIN_ENGINE_Y_LOCATION,
    SCALE,
    SIDE_ENGINE_AWAY,
    SIDE_ENGINE_HEIGHT,
    SIDE_ENGINE_POWER,
    VIEWPORT_H,
    VIEWPORT_W,
    LunarLander,
    heuristic,
)
from gymnasium.utils import EzPickle

from envs.vector import LoopVectorEnv

# Gravity in m/s^2, the largest force of the wind in N, the largest torque of the turbulence in N m. No task
# is hopeless: the mean return of Gymnasium's hand-written controller over 100 episodes is from 38 to 285 with
# discrete and from 108 to 284 with continuous actions (python -m envs.lunarlander). Low gravity takes it 500
# to 620 steps an episode.
FIELDS = ("gravity", "wind_power", "turbulence_power")
TASKS = [
    dict(zip(FIELDS, values, strict=True))
    for values in (
        (-1.6, 0.0, 0.0),  # the Moon's
        (-1.6, 5.0, 0.5),
        (-2.5, 10.0, 1.0),
        (-3.7, 0.0, 0.0),  # Mars's
        (-3.7, 10.0, 1.0),
        (-3.7, 15.0, 1.5),
        (-5.0, 0.0, 2.0),
        (-5.0, 5.0, 0.5),
        (-7.0, 0.0, 0.0),
        (-7.0, 10.0, 1.0),
        (-7.0, 20.0, 2.0),
        (-8.9, 5.0, 0.5),
        (-8.9, 15.0, 0.5),
        (-10.0, 0.0, 0.0),  # Gymnasium's
        (-10.0, 10.0, 1.0),
        (-10.0, 20.0, 1.0),
        (-11.0, 10.0, 0.0),
        (-11.0, 15.0, 1.5),
        (-11.9, 5.0, 0.5),
        (-11.9, 15.0, 1.5),
    )
]
NAMES = ["g{:g}-w{:g}-t{:g}".format(-task["gravity"], *list(task.values())[1:]) for task in TASKS]

# Of each discrete action: power of the main engine, direction of the side engine (-1 left, 1 right, 0 none).
ENGINES = ((0.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0))
HALF_W, HALF_H = VIEWPORT_W / SCALE / 2, VIEWPORT_H / SCALE / 2

# Places of the pad in half widths of the picture, 10 m, and half of the pad's own width; the terrain is flat
# there, as it is under Gymnasium's pad at 0. In winds of 15 N and more hardly any controller lands on a pad;
# here Gymnasium's, told the pad, has a mean return from 99 to 287 (python -m envs.lunarlander).
CHUNK, PADS = 0.2, (-0.6, -0.2, 0.2, 0.6)
GOAL_PHYSICS = ((-3.7, 0.0, 0.0), (-5.0, 5.0, 0.5), (-7.0, 10.0, 1.0), (-10.0, 0.0, 0.0), (-10.0, 10.0, 1.0))
GOAL_TASKS = [dict(zip((*FIELDS, "pad"), (*physics, pad))) for physics in GOAL_PHYSICS for pad in PADS]
GOAL_NAMES = ["g{:g}-w{:g}-t{:g}-pad{:+g}".format(-g, *others) for g, *others in map(dict.values, GOAL_TASKS)]


class LunarLanderTask(LunarLander):
    """One task as an ordinary environment; observations (8,), 4 discrete actions or 2 continuous ones."""

    all_tasks = TASKS
    pad = 0.0  # its middle
    pad_half_width = math.inf  # beyond which touching the ground ends the episode

    def __init__(self, task: int = 0, continuous: bool = False, render_mode: str | None = None) -> None:
        """Set gravity, wind and turbulence of task number `task`.

        Raises:
            ValueError: no such task.
        """
        if task not in range(len(self.all_tasks)):
            raise ValueError(f"task must be an integer from 0 to {len(self.all_tasks) - 1}, got {task}")
        params = dict(self.all_tasks[task])
        self.pad = params.pop("pad", self.pad)
        windy = params["wind_power"] > 0.0 or params["turbulence_power"] > 0.0
        super().__init__(render_mode=render_mode, continuous=continuous, enable_wind=windy, **params)
        EzPickle.__init__(self, task, continuous, render_mode)  # LunarLander has recorded its own arguments

    def step(self, action: int | np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Advance by 0.02 s: LunarLander.step, trimmed, with shaping that leads to the pad.

        The numbers are the same because the operations and their order are. Left out is what surrounds them:
        checks, NumPy on single numbers, reading the same attribute of a Box2D object twice.

        Args:
            action: 0 nothing, 1 left, 2 main, 3 right engine; or two floats in [-1, 1], main and side engine.

        Returns:
            Observation (8,) float32, reward, terminated, False, empty dictionary.

        Raises:
            IndexError: a discrete action above 3.
        """
        if self.continuous:
            main, side = float(action[0]), float(action[1])
            m_power = (min(main, 1.0) + 1.0) * 0.5 if main > 0.0 else 0.0  # 0, or 0.5 to 1
            s_power = min(abs(side), 1.0) if abs(side) > 0.5 else 0.0
            direction = math.copysign(1.0, side)
        else:
            m_power, direction = ENGINES[action]
            s_power = abs(direction)
        if self.render_mode is None:
            self._move(m_power, s_power, direction)
        else:  # the same, with particles of the engines in the picture
            prev_shaping = self.prev_shaping
            super().step(action)
            self.prev_shaping = prev_shaping
        return self._outcome(m_power, s_power)

    def _move(self, m_power: float, s_power: float, direction: float) -> None:
        """Wind, engines and physics."""
        lander = self.lander
        left_leg, right_leg = self.legs
        if self.enable_wind and not (left_leg.ground_contact or right_leg.ground_contact):
            k = int(self.wind_idx)  # drawn as a NumPy integer, with which all that follows would be slow
            wind = math.tanh(math.sin(0.02 * k) + math.sin(math.pi * 0.01 * k)) * self.wind_power
            self.wind_idx = k + 1
            lander.ApplyForceToCenter((wind, 0.0), True)
            k = int(self.torque_idx)
            torque = math.tanh(math.sin(0.02 * k) + math.sin(math.pi * 0.01 * k)) * self.turbulence_power
            self.torque_idx = k + 1
            lander.ApplyTorque(torque, True)

        random = self.np_random.random
        dispersion_0 = (-1.0 + 2.0 * random()) / SCALE  # what uniform(-1, 1) computes
        dispersion_1 = (-1.0 + 2.0 * random()) / SCALE
        if m_power or s_power:
            angle = lander.angle
            tip_x, tip_y = math.sin(angle), math.cos(angle)
            side_x, side_y = -tip_y, tip_x
            position = lander.position
            x, y = position.x, position.y
            if m_power:
                along = MAIN_ENGINE_Y_LOCATION / SCALE + 2 * dispersion_0
                ox = tip_x * along + side_x * dispersion_1
                oy = -tip_y * along - side_y * dispersion_1
                lander.ApplyLinearImpulse(
                    (-ox * MAIN_ENGINE_POWER * m_power, -oy * MAIN_ENGINE_POWER * m_power),
                    (x + ox, y + oy),
                    True,
                )
            if s_power:
                across = 3 * dispersion_1 + direction * SIDE_ENGINE_AWAY / SCALE
                ox = tip_x * dispersion_0 + side_x * across
                oy = -tip_y * dispersion_0 - side_y * across
                lander.ApplyLinearImpulse(
                    (-ox * SIDE_ENGINE_POWER * s_power, -oy * SIDE_ENGINE_POWER * s_power),
                    (x + ox - tip_x * 17 / SCALE, y + oy + tip_y * SIDE_ENGINE_HEIGHT / SCALE),
                    True,
                )

        self.world.Step(1.0 / FPS, 6 * 30, 2 * 30)

    def _outcome(
        self, m_power: float, s_power: float
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Observation, reward and end of the step that has been made."""
        lander = self.lander
        left_leg, right_leg = self.legs
        position, velocity = lander.position, lander.linearVelocity
        x = (position.x - HALF_W) / HALF_W
        y = (position.y - (self.helipad_y + LEG_DOWN / SCALE)) / HALF_H
        x_dot = velocity.x * HALF_W / FPS
        y_dot = velocity.y * HALF_H / FPS
        angle = lander.angle
        left = 1.0 if left_leg.ground_contact else 0.0
        right = 1.0 if right_leg.ground_contact else 0.0
        state = (x, y, x_dot, y_dot, angle, 20.0 * lander.angularVelocity / FPS, left, right)

        across = x - self.pad
        shaping = (
            -100 * math.sqrt(across * across + y * y)
            - 100 * math.sqrt(x_dot * x_dot + y_dot * y_dot)
            - 100 * abs(angle)
            + 10 * left
            + 10 * right
        )
        reward = 0.0 if self.prev_shaping is None else shaping - self.prev_shaping
        self.prev_shaping = shaping
        reward -= m_power * 0.30
        reward -= s_power * 0.03

        terminated = False
        off_pad = (left or right) and abs(across) > self.pad_half_width
        if self.game_over or abs(x) >= 1.0 or off_pad:
            terminated, reward = True, -100.0
        if not lander.awake:
            terminated, reward = True, 100.0
        return np.array(state, dtype=np.float32), reward, terminated, False, {}


class LunarLanderGoalTask(LunarLanderTask):
    """One physics and one pad, which the observation does not tell: its x is from the middle of the picture.

    The terrain is rolled so that it is flat at the pad, and shaping is relative to the pad. A leg that
    touches the ground while the lander's centre is not above the pad ends the episode with a reward of -100.
    info["success"] says whether the lander has come to rest, which by this rule it does on the pad only.
    """

    all_tasks = GOAL_TASKS
    pad_half_width = CHUNK

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """As LunarLander's, with the terrain rolled."""
        observation, info = super().reset(**kwargs)
        chunks = round(self.pad / CHUNK)
        if chunks:
            xs = [left[0] for left, *_ in self.sky_polys] + [self.sky_polys[-1][1][0]]
            ys = [left[1] for left, *_ in self.sky_polys] + [self.sky_polys[-1][1][1]]
            ground = list(zip(xs, np.roll(ys, chunks).tolist()))
            # the first is the bottom of the picture; from the last on, as Box2D then gives the new ones the
            # places of the old ones, on which the order of contacts, and so rounding, depends
            for fixture in reversed(self.moon.fixtures[1:]):
                self.moon.DestroyFixture(fixture)
            self.sky_polys = []
            for p1, p2 in itertools.pairwise(ground):
                self.moon.CreateEdgeFixture(vertices=[p1, p2], density=0, friction=0.1)
                self.sky_polys.append([p1, p2, (p2[0], 2 * HALF_H), (p1[0], 2 * HALF_H)])
            middle = len(xs) // 2 + chunks
            self.helipad_x1, self.helipad_x2 = xs[middle - 1], xs[middle + 1]  # where its flags are drawn
        return observation, info

    def step(self, action: int | np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """LunarLanderTask's, with info["success"]."""
        *result, _ = super().step(action)
        return *result, {"success": not self.lander.awake}


class LunarLander20(LoopVectorEnv):
    """The twenty tasks; observations (n, 8), actions (n,) from 0 to 3, or (n, 2) in [-1, 1] if continuous."""

    task_class, names = LunarLanderTask, NAMES
    num_tasks = len(TASKS)

    def __init__(
        self,
        num_envs: int = len(TASKS),
        tasks: Sequence[int] | None = None,
        continuous: bool = False,
        max_episode_steps: int = 1000,
    ) -> None:
        """Build `num_envs` environments, the same number for each task.

        Args:
            num_envs: a positive multiple of the number of tasks.
            tasks: indices of the tasks to keep, in this order; None keeps all twenty.
            continuous: continuous throttle instead of four actions.
            max_episode_steps: steps after which an episode is truncated.

        Raises:
            ValueError: num_envs or tasks are not as above.
        """
        super().__init__(
            num_envs,
            lambda task: self.task_class(task, continuous),
            self.names,
            self.task_class.all_tasks,
            tasks,
            max_episode_steps,
        )


class LunarLander20Goals(LunarLander20):
    """Five physics times four hidden pads, see `LunarLanderGoalTask`."""

    task_class, names = LunarLanderGoalTask, GOAL_NAMES


def main(episodes: int = 100) -> None:
    """Print tables of what Gymnasium's hand-written controller reaches in each task.

    Of a pad it is told by moving the origin of its observation there.
    """
    for suite in (LunarLander20, LunarLander20Goals):
        print_controller(suite, episodes)


def print_controller(suite: type[LunarLander20], episodes: int) -> None:
    """Print the table of one suite."""
    print("| task | return, discrete | landed | return, continuous | landed |\n|---|---|---|---|---|")
    for task, name in enumerate(suite.names):
        cells = []
        for continuous in (False, True):
            env, returns, landed = suite.task_class(task, continuous), np.zeros(episodes), 0
            for episode in range(episodes):
                obs, _ = env.reset(seed=episode)
                for _ in range(1000):
                    obs[0] -= env.pad
                    obs, reward, terminated, _, _ = env.step(heuristic(env, obs))
                    returns[episode] += reward
                    if terminated:
                        landed += reward == 100
                        break
            cells.append(f"{returns.mean():.0f} | {100 * landed / episodes:.0f} %")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
