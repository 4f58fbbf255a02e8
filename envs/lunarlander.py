"""LunarLander under twenty gravities and winds, and under five of them with a hidden place to land at.

`LunarLanderTask` is Gymnasium's LunarLander with less Python around the physics: the same seed and actions
give the same numbers, bit for bit. `LunarLanderGoalTask` moves the pad, which the observation does not tell.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from gymnasium.envs.box2d import lunar_lander
from gymnasium.envs.box2d.lunar_lander import FPS, LEG_DOWN, SCALE, LunarLander
from gymnasium.utils import EzPickle

from envs.checks import select_tasks
from envs.vector import LoopVectorEnv

# Largest force of the wind in N, and largest torque of the turbulence in N m, by gravity in m/s^2. No task is
# hopeless: the mean return of Gymnasium's hand-written controller over 100 episodes is from 38 to 285 with
# discrete and from 108 to 284 with continuous actions (studies/lander_controller.py). In low gravity it takes
# 500 to 620 steps an episode.
FIELDS = ("gravity", "wind_power", "turbulence_power")
PHYSICS = {
    -1.6: ((0.0, 0.0), (5.0, 0.5)),  # the Moon's
    -2.5: ((10.0, 1.0),),
    -3.7: ((0.0, 0.0), (10.0, 1.0), (15.0, 1.5)),  # Mars's
    -5.0: ((0.0, 2.0), (5.0, 0.5)),
    -7.0: ((0.0, 0.0), (10.0, 1.0), (20.0, 2.0)),
    -8.9: ((5.0, 0.5), (15.0, 0.5)),
    -10.0: ((0.0, 0.0), (10.0, 1.0), (20.0, 1.0)),  # Gymnasium's
    -11.0: ((10.0, 0.0), (15.0, 1.5)),
    -11.9: ((5.0, 0.5), (15.0, 1.5)),
}
TASKS = [dict(zip(FIELDS, (gravity, *air))) for gravity, airs in PHYSICS.items() for air in airs]
NAMES = ["g{:g}-w{:g}-t{:g}".format(-task["gravity"], *list(task.values())[1:]) for task in TASKS]

# Of each discrete action: power of the main engine, direction of the side engine (-1 left, 1 right, 0 none).
ENGINES = ((0.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0))
MAIN_POWER, SIDE_POWER = lunar_lander.MAIN_ENGINE_POWER, lunar_lander.SIDE_ENGINE_POWER
MAIN_Y, SIDE_HEIGHT = lunar_lander.MAIN_ENGINE_Y_LOCATION / SCALE, lunar_lander.SIDE_ENGINE_HEIGHT
HALF_W, HALF_H = lunar_lander.VIEWPORT_W / SCALE / 2, lunar_lander.VIEWPORT_H / SCALE / 2

# Places of the pad in half widths of the picture, 10 m, and half of the pad's own width; the terrain is flat
# there, as it is under Gymnasium's pad at 0. In winds of 15 N and more hardly any controller lands on a pad;
# here Gymnasium's, told the pad, has a mean return from 99 to 287.
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
        """Set gravity, wind and turbulence of a task; a ValueError if there is no such task."""
        select_tasks(len(self.all_tasks), [task])
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
        lander, (left_leg, right_leg) = self.lander, self.legs
        if self.enable_wind and not (left_leg.ground_contact or right_leg.ground_contact):
            # drawn as a NumPy integer, with which all that follows would be slow
            k, self.wind_idx = int(self.wind_idx), int(self.wind_idx) + 1
            wind = math.tanh(math.sin(0.02 * k) + math.sin(math.pi * 0.01 * k)) * self.wind_power
            lander.ApplyForceToCenter((wind, 0.0), True)
            k, self.torque_idx = int(self.torque_idx), int(self.torque_idx) + 1
            torque = math.tanh(math.sin(0.02 * k) + math.sin(math.pi * 0.01 * k)) * self.turbulence_power
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
                along = MAIN_Y + 2 * dispersion_0
                ox = tip_x * along + side_x * dispersion_1
                oy = -tip_y * along - side_y * dispersion_1
                impulse = (-ox * MAIN_POWER * m_power, -oy * MAIN_POWER * m_power)
                lander.ApplyLinearImpulse(impulse, (x + ox, y + oy), True)
            if s_power:
                across = 3 * dispersion_1 + direction * lunar_lander.SIDE_ENGINE_AWAY / SCALE
                ox = tip_x * dispersion_0 + side_x * across
                oy = -tip_y * dispersion_0 - side_y * across
                impulse = (-ox * SIDE_POWER * s_power, -oy * SIDE_POWER * s_power)
                place = (x + ox - tip_x * 17 / SCALE, y + oy + tip_y * SIDE_HEIGHT / SCALE)
                lander.ApplyLinearImpulse(impulse, place, True)
        self.world.Step(1.0 / FPS, 6 * 30, 2 * 30)

    def _outcome(self, m_power: float, s_power: float) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Observation, reward and end of the step that has been made."""
        lander, (left_leg, right_leg) = self.lander, self.legs
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
        distance, speed = math.sqrt(across * across + y * y), math.sqrt(x_dot * x_dot + y_dot * y_dot)
        shaping = -100 * distance - 100 * speed - 100 * abs(angle) + 10 * left + 10 * right
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
            xs, ys = zip(*(left for left, *_ in self.sky_polys), self.sky_polys[-1][1])
            ground = zip(xs, np.roll(ys, chunks).tolist())
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

    def __init__(self, num_envs=20, tasks=None, continuous=False, max_episode_steps=1000) -> None:
        """As `TaskVectorEnv`; continuous throttle instead of four actions if `continuous`."""
        params, make_env = self.task_class.all_tasks, lambda task: self.task_class(task, continuous)
        super().__init__(num_envs, make_env, self.names, params, tasks, max_episode_steps)


class LunarLander20Goals(LunarLander20):
    """Five physics times four hidden pads, see `LunarLanderGoalTask`."""

    task_class, names = LunarLanderGoalTask, GOAL_NAMES
