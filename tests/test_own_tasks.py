"""A user's own environments: either right numbers or one clear line, before anything is written."""

import csv
import itertools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import enjoy
import envs
from envs import evaluation, generators, runs
from envs.models import read
from envs.settings import InputError
from envs.vector import LoopVectorEnv, TaskVectorEnv

varshare, sac = map(probes.load_script, ("varshare_ppo.py", "varshare_sac.py"))
SIZE = {
    "total_timesteps": 640,
    "num_steps": 32,
    "envs_per_task": 2,
    "num_minibatches": 2,
    "hidden_sizes": (8,),
}
SIZE |= {"eval_episodes": 2, "run_name": "own"}

pytestmark = pytest.mark.usefixtures("elsewhere")


class Own(gym.Env):
    """Two numbers observed, Discrete(2), cut at step 20, reward = action; a task may replace any part."""

    def __init__(self, **parts):
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
        self.length, self.seen, self.reports = 20, [], ""
        self.__dict__ |= parts

    def observe(self):
        return np.zeros(self.observation_space.shape, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def reward(self, action):
        return float(np.sum(action))

    def step(self, action):
        self.seen.append(action)
        self.t += 1
        infos = {self.reports: action == 1} if self.reports else {}
        return self.observe(), self.reward(action), False, self.t >= self.length, infos


@pytest.fixture
def own():
    """Registers tasks, each an `Own` with these parts, or a vector environment; returns their id."""
    added = []

    def add(*tasks, names=None, params=None, vector=None, **kwargs):
        names = [f"g{i}" for i in range(len(tasks))] if names is None else names
        params = [{}] * len(tasks) if params is None else params

        def make(i):
            return Own(**tasks[i])

        def build(num_envs=1, tasks=None, max_episode_steps=None):
            return LoopVectorEnv(num_envs, make, names, params, tasks, max_episode_steps)

        build.num_tasks = len(tasks)
        added.append(f"Own{len(added)}-v0")
        gym.register(added[-1], vector_entry_point=vector or build, **kwargs)
        return added[-1]

    yield add
    for env_id in added:
        del gym.registry[env_id]


def box(low, high, size=1, dtype=np.float32):
    return gym.spaces.Box(low, high, (size,), dtype)


def train(env_id, script=varshare, **changes):
    size = {name: x for name, x in (SIZE | changes).items() if hasattr(script.Args, name)}
    return script.train(script.Args(env_id=env_id, **size))


@pytest.mark.parametrize("name", ["success", "is_success"])
def test_success_is_that_of_the_last_step(own, name):
    env = envs.make(own({}, {"reports": name}), 2)
    env.reset(seed=0)
    for step in range(20):
        infos = env.step(np.array([1, 1, 0, step == 19], dtype=int))[4]
    np.testing.assert_array_equal(envs.vector.final_success(infos), [np.nan, np.nan, 0, 1])


@pytest.mark.parametrize("odd", [0.3, np.nan, "no"])
def test_success_is_yes_or_no(own, odd):
    env_id = own({"reports": "success", "step": lambda _: (np.zeros(2), 0.0, True, False, {"success": odd})})
    with pytest.raises(ValueError, match="success must be True or False, an environment reports"):
        train(env_id)


class SilentInDefeat(Own):
    """Says success where there is one, and nothing else."""

    def step(self, action):
        *result, infos = super().step(action)
        return *result, {name: x for name, x in infos.items() if x}


def test_a_rate_is_not_of_those_who_report_alone(own, monkeypatch):
    def build(num_envs=1, tasks=None, max_episode_steps=None):
        def make(task):
            return SilentInDefeat(reports="success", length=20 if task == 0 else 1e9)

        return LoopVectorEnv(num_envs, make, ["won", "endless"], [{}, {}], tasks, max_episode_steps)

    build.num_tasks = 2
    env_id = own(vector=build)
    with pytest.raises(ValueError, match="success, True or False, at the end of every episode or of none"):
        train(env_id, tasks=(0,))
    monkeypatch.setattr(evaluation, "MAX_STEPS", 30)
    played = evaluation.play_episodes(
        lambda obs: torch.eye(2)[torch.ones(2, 1, dtype=int)], envs.make(env_id, 1), [1, 2]
    )
    assert played.successes.tolist() == [[1], [0]]  # what is cut has not succeeded


def test_success_is_logged_from_the_first_log_on(own):
    folder = train(own({"reports": "success"}), envs_per_task=1)
    steps = {metric: set() for metric in ("charts/success_rate", "charts/episodic_return")}
    for step, metric, *_ in probes.read_heartbeat(folder):
        steps.get(metric, set()).add(step)
    assert len(steps["charts/success_rate"]) > 1 and len({*map(frozenset, steps.values())}) == 1


# Spaces


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"action_space": gym.spaces.Discrete(4)},
            r"actions of task g1 are Discrete\(4\), those of g0 Discrete\(2\)",
        ),
        ({"action_space": box(-1, 1)}, r"actions of task g1 are Box\(.*, those of g0 Discrete\(2\)"),
        ({"observation_space": box(-1, 1, 3)}, r"of task g1 have shape \(3,\), those of g0 \(2,\)"),
    ],
)
def test_all_tasks_have_the_spaces_of_the_first(own, other, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(own({}, other), 2)
    assert "\n" not in str(error.value)


def test_bounds_of_actions_must_be_equal_and_those_of_observations_are_the_widest(own):
    with pytest.raises(ValueError, match=r"actions of task g1 are Box\(-10.0, .*, those of g0 Box\(-1.0, "):
        envs.make(own({"action_space": box(-1, 1)}, {"action_space": box(-10, 10)}), 1)
    env = envs.make(own({"observation_space": box(-1, 1, 2)}, {"observation_space": box(-5, 0, 2)}), 1)
    assert env.single_observation_space == box(-5, 1, 2)


def test_environments_of_a_vector_environment_of_gymnasiums_are_compared_too(own):
    def differing(num_envs=2, mode="different"):
        spaces = [box(-1, 1, 2, np.float32), box(-1, 1, 2, np.float64)]
        singles = [lambda x=x: Own(observation_space=box(-1, 1, 2), action_space=x) for x in spaces]
        env = SyncVectorEnv(singles, autoreset_mode=AutoresetMode.SAME_STEP)
        return env

    differing.num_tasks = 2
    with pytest.raises(ValueError, match=r"cannot build .*action_space") as error:
        envs.make(own(vector=differing), 1)
    assert "\n" not in str(error.value)


def test_single_environments_inside_a_vector_environment_of_ones_own_are_compared(own):
    class Inside(probes.Probe):
        num_tasks = 2

        def __init__(self, num_envs=2):
            super().__init__(num_envs)
            self.envs = [Own(), Own(action_space=gym.spaces.Discrete(4))]

    with pytest.raises(ValueError, match=r"actions of task task1 are Discrete\(4\)"):
        envs.make(own(vector=Inside), 1)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (box(0, 5, 1, np.int64), "must be floats, got int64"),
        (box(-3.4e38, 3.4e38), "must have finite bounds"),
        (box(1.0, 1.0), "low below high"),
    ],
)
def test_actions_that_no_policy_can_take_are_refused(own, space, message):
    with pytest.raises(ValueError, match=message):
        envs.make(own({"action_space": space}), 1)


def test_actions_are_in_units_of_their_bounds(own):
    space = gym.spaces.Box(np.float32([100, -1]), np.float32([200, 1]))
    env = envs.make(own({"action_space": space}), 3)
    assert env.single_action_space == box(-1, 1, 2)
    env.reset(seed=0)
    env.step(np.float32([[-1, 0.5], [0, -7], [3, 1]]))
    seen = [single.seen[-1] for single in env.envs]
    np.testing.assert_array_equal(seen, np.float32([[100, 0.5], [150, -1], [200, 1]]))
    assert seen[0].dtype == np.float32


def test_actions_in_bounds_of_one_are_passed_on_bit_for_bit(own):
    env = envs.make(own({"action_space": box(-1, 1)}), 1)
    env.reset(seed=0)
    for x in np.random.default_rng(0).uniform(-1.1, 1.1, 100).astype(np.float32):
        env.step(np.array([[x]]))
        assert env.envs[0].seen[-1] == np.clip(x, np.float32(-1), np.float32(1))


@pytest.mark.parametrize("script", [varshare, sac], ids=["ppo", "sac"])
def test_what_lies_far_from_zero_is_learned(own, script):
    """The reward is -|action - 130| / 100 for actions from 100 to 200."""
    far = {
        "action_space": box(100, 200),
        "reward": lambda action: -abs(float(action[0]) - 130) / 100,
        "length": 1,
    }
    size = {"total_timesteps": 6400, "envs_per_task": 10, "learning_rate": 0.01}
    size |= {"learning_starts": 50, "gamma": 0.0, "reward_scale": 1.0, "buffer_size": 7000}
    folder = train(own(far), script, **size)
    assert (
        probes.evaluation(folder)["mean"] > -0.15
    )  # the middle, where policies start, has -0.2, a bound -0.3


# Names and parameters


def test_what_an_environment_says_is_saved_in_plain_python(own):
    params = [{"x": x, "y": np.arange(2), "z": (np.float32(1),)} for x in np.linspace(2, 15, 3)]
    names = np.array(["a", "b", "c"])
    folder = train(own({}, {}, {}, names=names, params=params))
    saved = read(folder / "model.pt", "model")
    assert saved["task_names"] == ["a", "b", "c"] and {type(x) for x in saved["task_names"]} == {str}
    assert saved["task_params"][1] == {"x": 8.5, "y": [0, 1], "z": [1.0]}
    assert type(saved["task_params"][1]["x"]) is float


@pytest.mark.parametrize(
    ("names", "params", "message"),
    [
        (["g1", "g1"], None, "must differ, got 'g1' twice"),
        (["g1", "mean"], None, "no task can be called 'mean'"),
        (["g1", "a|b"], None, "no task can be called"),
        (["g1", "$5"], None, "no task can be called"),  # mathematics in figures
        (["g1", ""], None, "must be printable text, got ''"),
        (["g1", "two\nlines"], None, "must be printable text"),
        ([1, 2], None, "must be printable text, got 1"),
        (["a", "b"], [{"x": {1, 2}}, {}], "task_params must be numbers and texts, got set"),
        (["a", "b"], [{}], "2 task_names, but 1 task_params"),
    ],
)
def test_names_and_parameters_that_cannot_be_kept_are_refused(own, names, params, message):
    with pytest.raises(ValueError, match=message):
        envs.make(own({}, {}, names=names, params=params), 1)


def test_names_changed_after_the_constructor_are_checked_too(own):
    def renamed(num_envs=2, tasks=None, max_episode_steps=None):
        env = LoopVectorEnv(num_envs, lambda _: Own(), ["a", "b"], [{}, {}])
        env.task_names = ["a", "a"]
        return env

    renamed.num_tasks = 2
    with pytest.raises(ValueError, match="must differ"):
        envs.make(own(vector=renamed), 1)


# Gymnasium's interface


def odd_reset(obs):
    def reset(seed=None, options=None):
        return obs

    return {"reset": reset}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"reset": lambda: (np.zeros(2), {})}, "task g0: reset must take seed and options as keywords"),
        (odd_reset(np.zeros(2)), r"task g0: reset must return \(observation, info\)"),
        (odd_reset((np.zeros(3), {})), r"reset gives observations of shape \(3,\), its space is \(2,\)"),
        ({"step": lambda _: (np.zeros(2), 0.0, False, {})}, "step must return .*terminated, truncated"),
        (
            {"step": lambda _: (np.zeros(3), 0.0, False, False, {})},
            r"step gives observations of shape \(3,\)",
        ),
        ({"reward": lambda action: np.ones(1)}, r"reward must be a single value, got shape \(1,\)"),
        ({"step": lambda _: (np.zeros(2), 0.0, False, False, None)}, "step must give a dictionary as info"),
    ],
)
def test_what_does_not_keep_to_gymnasiums_interface_is_refused(own, parts, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(own(parts), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda n: (np.zeros((n, 1)), np.zeros(n), np.zeros(n, bool), {}), "step must return 5 values"),
        (lambda n: (np.zeros((n, 1)), np.zeros((n, 1)), *np.zeros((2, n), bool), {}), "rewards must be"),
        (lambda n: (np.zeros((n, 2)), np.zeros(n), *np.zeros((2, n), bool), {}), "observations must be"),
    ],
)
def test_the_same_of_vector_environments(own, step, message):
    class Odd(probes.Probe):
        def step(self, actions):
            return step(self.num_envs)

    with pytest.raises(ValueError, match=message):
        envs.make(own(vector=Odd), 2)


class OneSeed(probes.Probe):
    """`reset` takes one integer, as `gym.vector.VectorEnv` has it."""

    num_tasks = 1

    def reset(self, *, seed=None, options=None):
        gym.vector.VectorEnv.reset(self, seed=seed)
        self.asked = [*getattr(self, "asked", ()), seed]
        return super().reset()


def test_a_vector_environment_whose_reset_takes_one_seed(own):
    env = envs.make(own(vector=OneSeed), 2)
    env.reset(seed=[5, 6])
    env.reset(seed=7)
    env.reset()
    assert env.unwrapped.asked[-3:] == [5, 7, None]


def test_a_vector_environment_of_another_number_of_environments(own):
    class Fixed(OneSeed):
        def __init__(self, num_envs=3):
            super().__init__(3)

    with pytest.raises(ValueError, match="it has 3 environments where 2 are asked for"):
        envs.make(own(vector=Fixed), 2)


def test_a_run_is_not_resumed_on_other_tasks(own):
    limits = [{"length": 20}, {"length": 30}]
    folder = train(own(*limits, names=["short", "long"]), env_workers=1)
    before = (folder / "config.json").read_text()
    (folder / "evaluation.csv").unlink()
    for names, params in ((["long", "short"], None), (["short", "long"], [{"x": 1}, {}])):
        changed = own(*limits, names=names, params=params)
        gym.registry["Own0-v0"] = gym.spec(changed)
        with pytest.raises(InputError, match="cannot be resumed: the tasks of Own0-v0 are others now"):
            train("Own0-v0", resume=True)
    assert (folder / "config.json").read_text() == before


def test_tasks_that_change_when_they_are_built_are_not_evaluated(own):
    def build(num_envs=1, tasks=None):
        params = [{"g": np.random.rand()}]  # noqa: NPY002
        return LoopVectorEnv(num_envs, lambda _: Own(), ["a"], params, tasks)

    build.num_tasks = np.int64(1)
    with pytest.raises(InputError, match="others whenever they are built"):
        train(own(vector=build))


def test_environments_are_as_many_and_of_the_tasks_that_are_asked_for(own):
    def all_of_them(num_envs=2, tasks=None):
        return LoopVectorEnv(num_envs, lambda _: Own(), ["a", "b"], [{}, {}])

    single = Own()

    def one_for_all(num_envs=2, tasks=None):
        return LoopVectorEnv(num_envs, lambda _: single, ["a", "b"], [{}, {}], tasks)

    def no_choice(num_envs=2):
        return all_of_them(num_envs)

    all_of_them.num_tasks = one_for_all.num_tasks = no_choice.num_tasks = 2
    assert envs.make(own(vector=no_choice), 2, [0, 1]).num_envs == 4  # all, as `enjoy.Model` asks for them
    with pytest.raises(ValueError, match="it has 2 tasks where 1 are asked for"):
        envs.make(own(vector=all_of_them), 2, [1])
    with pytest.raises(ValueError, match="the same environment twice"):
        envs.make(own(vector=one_for_all), 2)


# Global generators


class Gambling(TaskVectorEnv):
    """Observations, rewards and ends are drawn from the global generators."""

    num_tasks = 2

    def __init__(self, num_envs=2, tasks=None):
        super().__init__(num_envs, ["a", "b"], [{}, {}], box(-1, 1), gym.spaces.Discrete(2), tasks, 8)

    def _draw(self):
        return np.random.rand(self.num_envs, 1).astype(np.float32)  # noqa: NPY002

    def _reset(self, seeds, options):
        return self._draw()

    def step(self, actions):
        rewards = np.array([random.random() + torch.rand(1).item() for _ in range(self.num_envs)])
        obs, terminated = self._draw(), np.zeros(self.num_envs, bool)
        return obs, rewards, terminated, terminated, self._count_step(obs, rewards, terminated, terminated)

    def get_state(self):
        return {"returns": self.episode_returns.tolist(), "lengths": self.episode_lengths.tolist()}

    def set_state(self, state):
        self.episode_returns[:], self.episode_lengths[:] = state["returns"], state["lengths"]
        return self.now


class GamblingEpisodes(Gambling):
    """The same, with episodes of 8 steps and a state."""

    def _draw(self):
        self.now = super()._draw()
        return self.now

    def step(self, actions):
        obs, rewards, terminated, _, _ = super().step(actions)
        truncated = self.episode_lengths >= 8
        self.episode_returns -= rewards  # which are counted once more
        self.episode_lengths -= 1
        return obs, rewards, terminated, truncated, self._count_step(obs, rewards, terminated, truncated)

    def get_state(self):
        return super().get_state() | {"now": self.now.tolist()}

    def set_state(self, state):
        self.now = np.float32(state["now"])
        return super().set_state(state)


def test_global_generators_are_seeded_and_an_evaluation_leaves_them_alone(own):
    env_id = own(vector=GamblingEpisodes)
    first = probes.read_heartbeat(train(env_id, run_name="first"))
    np.random.rand(3), random.random(), torch.rand(5)  # noqa: NPY002
    again = probes.read_heartbeat(train(env_id, run_name="again", eval_interval=128))
    clocks = ("charts/SPS", "charts/wall_time")

    def training(rows):
        return [row for row in rows if row[1] not in clocks and not row[1].startswith("eval")]

    assert training(first) == training(again)
    of_end = [
        [row for row in rows if row[1].startswith("eval") and row[0] == "640"] for rows in (first, again)
    ]
    assert of_end[0] == of_end[1] != []


def test_enjoy_repeats_an_evaluation_that_draws_from_the_global_generators(own):
    folder = train(own(vector=GamblingEpisodes))
    _, returns, *_ = enjoy.play(enjoy.Args(folder, episodes=2))
    means = probes.evaluation(folder)
    np.testing.assert_allclose(returns.mean(1), [means["a"], means["b"]])


def test_a_resumed_run_continues_the_global_generators(own, monkeypatch):
    env_id, update, calls = own(vector=GamblingEpisodes), varshare.update, itertools.count(1)
    reference = train(env_id, run_name="reference")

    def update_and_signal(*args):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(varshare, "update", update_and_signal)
        train(env_id)
    np.random.rand(3), random.random(), torch.rand(5)  # noqa: NPY002
    probes.assert_same_runs(train(env_id, resume=True), reference)


def test_states_of_global_generators_come_back():
    generators.seed_generators(1)
    state = generators.generators_state()

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    first = draw()
    with generators.generators_of(2, 1):
        assert draw() != first
    second = draw()
    generators.set_generators_state(state)
    assert (draw(), draw()) == (first, second)


# Episodes without an end, signals


def test_episodes_without_an_end_are_cut_in_the_evaluation(own, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "MAX_STEPS", 30)
    folder = train(own({"length": 1e9, "reward": lambda action: 1.0}))
    assert probes.evaluation(folder)["mean"] == 30
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 2 episodes were cut after 30 steps" in line and "max_episode_steps" in line


def test_a_registered_limit_is_the_bound(own):
    folder = train(own({"length": 1e9, "reward": lambda action: 1.0}, max_episode_steps=25))
    assert probes.evaluation(folder)["mean"] == 25


@pytest.mark.parametrize("interval", [0, 192], ids=["final", "on the way"])
def test_a_signal_ends_an_evaluation_which_the_resumed_run_repeats(own, monkeypatch, capsys, interval):
    env_id = own(vector=GamblingEpisodes)
    reference = train(env_id, run_name="reference", eval_interval=interval)

    def endless(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(runs, "evaluate", endless)
        train(env_id, eval_interval=interval, checkpoint_interval=0.0)
    assert stop.value.code == 128 + signal.SIGTERM
    assert f"stopped at step {128 if interval else 640}" in capsys.readouterr().out
    assert Path("runs/own/model.pt").exists() == (not interval)  # saved before its evaluation
    assert not Path("runs/own/evaluation.csv").exists()
    folder = train(env_id, eval_interval=interval, resume=True)
    probes.assert_same_runs(folder, reference)


def test_every_episode_of_the_final_evaluation_is_kept(own):
    folder = train(own({"length": 3, "reward": lambda action: 1.0}, {"length": 5}, names=["a", "b"]))
    with open(folder / "evaluation.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["task", "episode", "return", "length", "success"]
    assert rows[1:3] == [["a", "0", "3.0", "3", ""], ["a", "1", "3.0", "3", ""]]
    assert [row[:2] + row[3:] for row in rows[3:]] == [["b", "0", "5", ""], ["b", "1", "5", ""]]


# Names of runs, files


def test_names_of_runs_are_letters_digits_and_dots(own, monkeypatch):
    monkeypatch.setattr(runs.time, "time", lambda: 1e9)
    monkeypatch.syspath_prepend(".")
    Path("own_module.py").write_text("")
    env_id = f"own_module:{own({})}"
    folders = [train(env_id, run_name="", exp_name="méthode@a b") for _ in range(3)]
    assert len(set(folders)) == 3  # started in the same second
    for folder in folders:
        assert re.fullmatch(r"own_module-Own0-v0__m-thode-a-b__1__1000000000(-\d)?", folder.name)
        assert (folder / "evaluation.csv").exists()


def test_a_folder_that_another_run_took_in_the_meantime_is_left_to_it(own, monkeypatch):
    monkeypatch.setattr(runs.time, "time", lambda: 1e9)
    env_id, agent = own({}), varshare.Agent

    def take_folder(*args):
        Path("runs", f"{env_id}__varshare_ppo__1__1000000000").mkdir(parents=True, exist_ok=True)
        return agent(*args)

    monkeypatch.setattr(varshare, "Agent", take_folder)
    assert train(env_id, run_name="").name == f"{env_id}__varshare_ppo__1__1000000000-2"


@pytest.mark.slow
def test_a_name_beyond_ascii_under_an_ascii_locale():
    Path("own_module.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "from envs.vector import LoopVectorEnv\n"
        "class Own(LoopVectorEnv):\n"
        "    num_tasks = 1\n"
        "    def __init__(self, num_envs=1, max_episode_steps=50):\n"
        "        names = ['\\u03b8']\n"
        "        super().__init__(num_envs, lambda _: CartPoleEnv(), names, [{}], None, max_episode_steps)\n"
        "gym.register('own', vector_entry_point=Own)\n",
        encoding="utf-8",
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": "."}
    command = [
        sys.executable,
        probes.ROOT / "varshare_ppo.py",
        "--env-id",
        "own_module:own",
        "--run-name",
        "own",
    ]
    command += ["--total-timesteps", "2048"]
    done = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "θ" in Path("runs/own/heartbeat.csv").read_text(encoding="utf-8")
    assert "θ" in Path("runs/own/evaluation.csv").read_text(encoding="utf-8")


def train_with_little_disk(folder, limit):
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    small = probes.SMALL | {"total_timesteps": 20_000, "hidden_sizes": (64, 64), "checkpoint_interval": 0.0}
    script = probes.load_script("varshare_ppo.py")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script.train(script.Args(**small | {"resume": True}))


@pytest.mark.parametrize("limit", [100_000, 9_000], ids=["checkpoint", "log"])
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch, limit):
    """A limit of the size of files stands in for it."""
    process = probes.processes.Process(target=train_with_little_disk, args=(tmp_path, limit))
    process.start()
    process.join()
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 1, output
    assert "Traceback" not in output and "Exception ignored" not in output, output
    said = [line for line in output.splitlines() if line.startswith("runs/small: ")]
    assert len(said) == 1 and ("no space left" in said[0] or "File too large" in said[0])
    assert not list((tmp_path / "runs/small").glob("*.tmp"))
    process = probes.processes.Process(target=train_with_little_disk, args=(tmp_path, 0))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()


class Careless(gym.vector.VectorEnv):
    """Two of four tasks or all; keeps arrays, its own and others', ends by integers, always has final_obs."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    num_tasks = 4
    single_observation_space, single_action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Discrete(2)

    def __init__(self, num_envs=4, tasks=(0, 1, 2, 3)):
        self.num_envs, self.num_tasks = num_envs, len(tasks)
        self.obs, self.rewards = np.zeros((num_envs, 1), np.float32), np.zeros(num_envs)

    def reset(self, *, seed=None, options=None):
        self.obs[:] = 0
        return self.obs, {}

    def step(self, actions):
        last, self.obs[:] = self.obs + 1, self.obs + 1
        self.rewards[:] = last[:, 0]
        actions[:] = -1
        ends = (last[:, 0] == 3 + np.arange(self.num_envs)).astype(np.uint8)
        self.obs[ends > 0] = 0
        infos = {"final_obs": np.where(ends[:, None], last, -77), "final_info": {}}
        return self.obs, self.rewards, ends, np.zeros(self.num_envs, np.int64), infos


gym.register("Careless-v0", vector_entry_point=Careless)


def test_a_careless_vector_environment():
    env = envs.make("Careless-v0", 1, [2, 0])
    assert env.task_names == ["task2", "task0"]
    first, _ = env.reset()
    actions = np.zeros(2, int)
    second, rewards, *_, infos = env.step(actions)
    assert not actions.any()
    third, *_ = env.step(np.zeros(2, int))
    assert (first[0], second[0], third[0], rewards[0]) == (0, 1, 2, 1)  # not all the last one
    assert "final_obs" not in infos and "final_info" not in infos
    _, _, terminated, _, infos = env.step(np.zeros(2, int))
    assert terminated.dtype == bool and terminated.tolist() == [True, False]
    assert infos["final_obs"].tolist() == [[3], [3]] and infos["final_info"]["episode"]["r"][0] == 6
    assert env.episode_returns.tolist() == [0, 6]
