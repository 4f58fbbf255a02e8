"""Meta-World's MT10 and MT50, bit for bit, at twice the speed of its own vector environment.

Every task is Meta-World's own class (metaworld 3.1.1, mujoco 3.3.0) with less Python around the same physics.
All environments of a task share one MjModel and one MjData: each puts its state there before its step.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from metaworld import env_dict
from metaworld.utils import reward_utils

from envs.checks import select_tasks
from envs.vector import LoopVectorEnv

GOALS = 50  # training goals of every task
STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # all that the next step depends on


class Rotation(NamedTuple):
    """What the tasks use of scipy's Rotation, for one matrix (3, 3) that is orthogonal, in plain Python."""

    matrix: np.ndarray

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> Rotation:
        """As scipy's."""
        return cls(matrix)

    def as_quat(self) -> np.ndarray:
        """Quaternion (x, y, z, w), by scipy's operations in scipy's order: rounding is the same."""
        m = self.matrix.tolist()
        trace = m[0][0] + m[1][1] + m[2][2]
        candidates = [m[0][0], m[1][1], m[2][2], trace]
        i = candidates.index(max(candidates))
        quat = [m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1], 1 + trace]
        if i < 3:
            j, k = (i + 1) % 3, (i + 2) % 3
            quat[i], quat[3] = 1 - trace + 2 * m[i][i], m[k][j] - m[j][k]
            quat[j], quat[k] = m[j][i] + m[i][j], m[k][i] + m[i][k]
        x, y, z, w = quat
        length = math.sqrt(x * x + y * y + z * z + w * w)
        return np.array((x / length, y / length, z / length, w / length))


def tolerance(x, bounds=(0.0, 0.0), margin=0.0, sigmoid="gaussian", value_at_margin=0.1) -> float:
    """reward_utils.tolerance of a number; without arrays for the sigmoid that most rewards use."""
    if sigmoid != "long_tail" or margin <= 0:
        return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)
    lower, upper = bounds
    if lower <= x <= upper:
        return 1.0
    distance = float((lower - x if x < lower else x - upper) / margin)
    return 1 / ((distance * math.sqrt(1 / value_at_margin - 1)) ** 2 + 1)


def copy_module(name: str) -> ModuleType:
    """A module of Meta-World executed once more: a copy, in which what is slow is replaced for us alone."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.reward_utils = SimpleNamespace(**vars(reward_utils) | {"tolerance": tolerance})
    module.Rotation = Rotation
    return module


class Start(NamedTuple):
    """A task after its reset to a goal: attributes, MuJoCo's state, body_pos and site_pos, observation."""

    attributes: dict[str, Any]
    state: np.ndarray
    places: tuple[np.ndarray, np.ndarray]
    obs: np.ndarray


class FastSawyer(copy_module("metaworld.sawyer_xyz_env").SawyerXYZEnv):
    """Meta-World's base class with less to do; `load_benchmark` puts it under every task.

    What Meta-World's constructor makes is the `first` of a task, which is reset to every goal once. The
    environments are its twins: they share its model, data and starts, not its attributes and state.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model, data = super()._initialize_simulation()
        # arrays that MuJoCo writes to and reads from: to look them up by name takes longer than their use
        self.body_pos, self.site_pos = model.body_pos, model.site_pos
        self.mocap, self.ctrl = data.mocap_pos[0], data.ctrl
        self.hand, self.left, self.right = (data.body(x).xpos for x in ("hand", "leftclaw", "rightclaw"))
        self.left_end, self.right_end = (data.site(f"{x}EndEffector").xpos for x in ("left", "right"))
        return model, data

    def prepare(self, random: np.random.RandomState) -> None:
        """Of the first: let the goal be seen, and draw the training goals as metaworld.MT10 does."""
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,))  # the declared bounds are wrong
        self._set_task_called, self._partially_observable = True, False
        self._freeze_rand_vec, self.seeded_rand_vec, self.np_random = False, True, random
        self.__dict__.pop("sawyer_observation_space", None)  # cached with the goal hidden
        self.low, self.high = self.sawyer_observation_space.low, self.sawyer_observation_space.high
        self.do_simulation = lambda *_: None  # goals do not depend on the physics
        self.goals, self.starts = [], {}
        for _ in range(GOALS):
            super().reset()
            self.goals.append(self._last_rand_vec)
        del self.do_simulation
        self._freeze_rand_vec = True

    def start(self, goal: int) -> Start:
        """Of the first: Meta-World's own reset to a training goal, made once."""
        if goal not in self.starts:
            self._last_rand_vec = self.goals[goal]
            obs, _ = super().reset()
            state = np.empty(mujoco.mj_stateSize(self.model, STATE))
            mujoco.mj_getState(self.model, self.data, state, STATE)
            attributes = {name: x for name, x in self.__dict__.items() if name != "render_mode"}
            self.starts[goal] = Start(attributes, state, (self.body_pos.copy(), self.site_pos.copy()), obs)
        return self.starts[goal]

    def twin(self, render_mode: str | None = None) -> FastSawyer:
        """An environment of the task whose first this is."""
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__ | {"first": self, "generator": None, "render_mode": render_mode}
        return twin

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode with one of the training goals; a seed starts the generator that draws them."""
        if seed is not None or self.generator is None:
            self.generator = np.random.default_rng(seed)
        return self.restart(int(self.generator.integers(GOALS))), {}

    def restart(self, goal: int) -> np.ndarray:
        """Begin an episode with a training goal; the observation."""
        start = self.first.start(goal)
        self.__dict__ |= start.attributes
        self.goal_number, self.success, self.state, self.obs = goal, False, start.state.copy(), start.obs
        return self.obs.copy()

    def put_state(self) -> None:
        """Let what all environments of the task share be as this one left it."""
        self.body_pos[:], self.site_pos[:] = self.first.starts[self.goal_number].places
        mujoco.mj_setState(self.model, self.data, self.state, STATE)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As Meta-World's for actions (4,) float32 in [-1, 1]; info["success"] is of any step so far."""
        self.put_state()
        mocap = self.mocap + action[:3] * self.action_scale
        self.mocap[:] = np.minimum(np.maximum(mocap, self.mocap_low), self.mocap_high)
        self.ctrl[0], self.ctrl[1] = action[3], -action[3]
        mujoco.mj_step(self.model, self.data, self.frame_skip)
        mujoco.mj_forward(self.model, self.data)
        self.obs = np.minimum(np.maximum(self._get_obs(), self.low), self.high)
        reward, info = self.evaluate_state(self.obs, action)
        mujoco.mj_getState(self.model, self.data, self.state, STATE)
        self.success |= bool(info["success"])
        self.curr_path_length += 1
        return self.obs.copy(), reward, False, self.curr_path_length == 500, {"success": self.success}

    def _get_obs(self) -> np.ndarray:
        current = self._get_curr_obs_combined_no_goal()
        obs = np.concatenate((current, self._prev_obs, self._get_pos_goal()))
        self._prev_obs = current
        return obs

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        obs, gap = np.zeros(18), self.right - self.left
        obs[:3], obs[3] = self.hand, min(math.sqrt(gap.dot(gap)) / 0.1, 1.0)
        positions, quats = self._get_pos_objects(), self._get_quat_objects()
        for i in range(len(positions) // 3):  # of one or two objects
            at = 4 + 7 * i
            obs[at : at + 3], obs[at + 3 : at + 7] = positions[3 * i : 3 * i + 3], quats[4 * i : 4 * i + 4]
        return obs

    @property
    def tcp_center(self) -> np.ndarray:
        """As Meta-World's: the middle of the fingertips (3,)."""
        return (self.right_end + self.left_end) / 2.0

    def touching_object(self, object_geom_id: int) -> bool:
        """As Meta-World's: whether both fingers press on the object."""
        contact, force = self.data.contact, self.data.efc_force
        of_object = (contact.geom == object_geom_id).any(1)
        pads = ((contact.geom == self.data.geom(f"{x}pad_geom").id).any(1) for x in ("left", "right"))
        return all(0 < sum(force[contact.efc_address[of_object & pad]].tolist()) for pad in pads)

    def render(self) -> np.ndarray:
        """A picture (480, 480, 3) uint8, in render mode rgb_array; the camera hangs upside down."""
        self.put_state()
        mujoco.mj_forward(self.model, self.data)
        viewer = self.mujoco_renderer._get_viewer(self.render_mode)
        viewer.make_context_current()  # else another task's may be
        return self.mujoco_renderer.render(self.render_mode)[::-1, ::-1]

    def close(self) -> None:
        """Nothing: what could be closed is the task's, and others may use it."""

    def save(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: numbers, strings and lists."""
        start = self.first.starts[self.goal_number].attributes
        changed = {k: x for k, x in self.__dict__.items() if k in start and x is not start[k]}
        changed |= {"success": self.success, "state": self.state, "obs": self.obs}
        plain = {k: x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x for k, x in changed.items()}
        return {"goal": self.goal_number, "changed": plain, "generator": self.generator.bit_generator.state}

    def restore(self, saved: dict[str, Any]) -> np.ndarray:
        """Continue from a `save()`; the observation."""
        self.generator = np.random.default_rng(0)
        self.generator.bit_generator.state = saved["generator"]
        self.restart(saved["goal"])
        changed = saved["changed"].items()
        self.__dict__ |= {k: np.array(x) if isinstance(x, list) else x for k, x in changed}
        return self.obs


@functools.cache
def load_benchmark(benchmark: str, reward: str) -> list[FastSawyer]:
    """The first of every task of "MT10" or "MT50", with the "v2" or "v1" reward; once in a process."""
    random = np.random.RandomState(0)  # goals are those of metaworld.MT10(seed=0) and metaworld.MT50(seed=0)
    firsts = []
    for original in getattr(env_dict, f"{benchmark}_V3").values():
        task_class = getattr(copy_module(original.__module__), original.__name__)
        task_class.__bases__ = (FastSawyer,)
        drawn = {"width": 480, "height": 480, "camera_name": "corner2"}
        firsts.append(task_class(reward_function_version=reward, **drawn))
        quality = firsts[-1].model.vis.quality
        quality.shadowsize, quality.offsamples = 1024, 0  # films without a GPU take a third of the time
        firsts[-1].prepare(random)
    return firsts


def make_task(task: int = 0, render_mode: str | None = None, reward="v2", benchmark="MT10") -> FastSawyer:
    """One task as a single environment."""
    firsts = load_benchmark(benchmark, reward)
    select_tasks(len(firsts), [task])
    return firsts[task].twin(render_mode)


make_mt50_task = functools.partial(make_task, benchmark="MT50")


class MT10(LoopVectorEnv):
    """Ten tasks; observations (n, 39) with the goal, actions (n, 4) in [-1, 1], success at any step."""

    benchmark, num_tasks = "MT10", 10

    def __init__(self, num_envs=None, tasks=None, reward="v2", max_episode_steps=500) -> None:
        """As `TaskVectorEnv`, of at most 500 steps; rewards "v1" of early papers differ in scale by task."""
        names = list(getattr(env_dict, f"{self.benchmark}_V3"))
        make_env = functools.partial(make_task, reward=reward, benchmark=self.benchmark)
        super().__init__(num_envs or len(names), make_env, names, [{}] * len(names), tasks, max_episode_steps)

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit."""
        statistics = (self.task_names, self.episode_returns.tolist(), self.episode_lengths.tolist())
        return {"environments": [env.save() for env in self.envs], "statistics": statistics}

    def set_state(self, state: dict[str, Any]) -> np.ndarray:
        """As `TaskVectorEnv`'s; a ValueError if it is not of as many environments of these tasks."""
        names, returns, lengths = state.get("statistics", [[]] * 3)
        if names != self.task_names or len(lengths) != self.num_envs:
            raise ValueError(f"the saved state does not fit {self.num_envs} environments of these tasks")
        self.episode_returns[:], self.episode_lengths[:] = returns, lengths
        pairs = zip(self.envs, state["environments"])
        return np.stack([env.restore(saved) for env, saved in pairs]).astype(np.float32)


class MT50(MT10):
    """Fifty tasks, see `MT10`."""

    benchmark, num_tasks = "MT50", 50
