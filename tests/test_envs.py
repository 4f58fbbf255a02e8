"""Tests of the environments: bit-for-bit equality with Gymnasium's own, and every promise of `envs`."""

import importlib
import io
import pickle
import warnings

import gymnasium as gym
import numpy as np
import probes
import pytest
import scipy.linalg
import torch
from gymnasium.envs.box2d.lunar_lander import LunarLander, heuristic
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit

import envs
from envs import cartpole, lunarlander
from envs.metrics import Episodes
from envs.vector import LoopVectorEnv

META_WORLD = ("mt10", "mt10-reward-v1", "mt50")  # takes a while to build
QUICK = [env_id for env_id in envs.ENV_IDS if env_id not in META_WORLD]
ALL = [*QUICK, "CartPole-v1", "LunarLander-v3", "Pendulum-v1", *probes.slow_but((), META_WORLD)]


def sync_reference(make_envs, max_episode_steps=None):
    """Gymnasium's own way to the same thing: SAME_STEP over single environments with their statistics."""

    def wrap(make_env):
        env = make_env() if max_episode_steps is None else TimeLimit(make_env(), max_episode_steps)
        return RecordEpisodeStatistics(env)

    return SyncVectorEnv(
        [lambda make_env=make_env: wrap(make_env) for make_env in make_envs],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


def gymnasium_cartpole(params):
    env = CartPoleEnv()
    for name, value in params.items():
        setattr(env, name, value)
    env.total_mass = env.masspole + env.masscart
    env.polemass_length = env.masspole * env.length
    return env


def gymnasium_lander(params, continuous):
    windy = params["wind_power"] > 0 or params["turbulence_power"] > 0
    return LunarLander(continuous=continuous, enable_wind=windy, **params)


def assert_equal_steps(ours, reference):
    """Same observations, rewards, flags and infos, to the last bit; returns the number of ended episodes."""
    for our, their in zip(ours[:4], reference[:4], strict=True):
        assert our.dtype == their.dtype
        np.testing.assert_array_equal(our, their)
    our, their = ours[4], reference[4]
    assert our.keys() == their.keys()
    if not our:
        return 0
    done = their["_final_obs"]
    assert our["final_obs"].dtype == np.float32 and our["final_obs"].shape == ours[0].shape
    np.testing.assert_array_equal(our["final_obs"][done], np.stack(list(their["final_obs"][done])))
    np.testing.assert_array_equal(our["final_obs"][~done], ours[0][~done])
    for mask in ("_final_obs", "_final_info"):
        np.testing.assert_array_equal(our[mask], their[mask])
    np.testing.assert_array_equal(our["final_info"]["_episode"], their["final_info"]["_episode"])
    episode, their_episode = our["final_info"]["episode"], their["final_info"]["episode"]
    assert episode.keys() == their_episode.keys() - {"t", "_t"}
    for key, value in episode.items():
        assert value.dtype == their_episode[key].dtype
        np.testing.assert_array_equal(value, their_episode[key])
    return int(done.sum())


def lqr_gain(params):
    """Gain k (4,) of the discrete LQR of one CartPole; push right where k @ observation < 0."""
    g, total = params["gravity"], params["masscart"] + params["masspole"]
    pole = params["length"] * (4 / 3 - params["masspole"] / total)
    coupling = params["masspole"] * params["length"] / total
    theta_acc = np.array([0.0, 0.0, g / pole, 0.0, -1 / (total * pole)])  # of (state, force)
    x_acc = np.array([0.0, 0.0, 0.0, 0.0, 1 / total]) - coupling * theta_acc
    rates = np.stack([np.eye(5)[1], x_acc, np.eye(5)[3], theta_acc])
    a, b = np.eye(4) + 0.02 * rates[:, :4], 0.02 * rates[:, 4:]
    p = scipy.linalg.solve_discrete_are(a, b, np.diag([1.0, 1.0, 10.0, 1.0]), [[0.01]])
    return np.linalg.solve(0.01 + b.T @ p @ b, b.T @ p @ a)[0]


GAINS = np.array([lqr_gain(params) for params in cartpole.TASKS])


def lqr_actions(observations, gains):
    """Actions (n,) for observations (n, 4) and gains (n, 4) of the linearised CartPole."""
    return ((observations * gains).sum(1) < 0).astype(np.int64)


def save_and_load(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# CartPole


@pytest.mark.parametrize("env_id", ["cartpole10", "cartpole-identical10"])
def test_cartpole_equals_gymnasium(env_id):
    env = envs.make(env_id, envs_per_task=3)
    params = [env.task_params[i // 3] for i in range(30)]
    assert params[3:6] == [cartpole.TASKS[1 if env_id == "cartpole10" else 0]] * 3
    reference = sync_reference([lambda p=p: gymnasium_cartpole(p) for p in params], max_episode_steps=500)
    observations, infos = env.reset(seed=7)
    np.testing.assert_array_equal(observations, reference.reset(seed=7)[0])
    assert observations.dtype == np.float32 and infos == {}

    rng = np.random.default_rng(0)
    gains = np.array([lqr_gain(p) for p in params])
    noise = np.tile([0.0, 0.2, 1.0], 10)  # how often each environment's controller is overruled at random
    truncations = terminations = 0
    for step in range(1600):
        actions = np.where(rng.random(30) < noise, rng.integers(2, size=30), lqr_actions(observations, gains))
        ours, theirs = env.step(actions), reference.step(actions)
        assert_equal_steps(ours, theirs)
        state = np.array([single.unwrapped.state for single in reference.envs])  # (n, 4) float64
        np.testing.assert_array_equal(env._state.T.reshape(30, 4), state)
        observations = ours[0]
        terminations += ours[2].sum()
        truncations += ours[3].sum()
        if step == 1000:  # a reset in the middle of episodes goes on with the same generators
            np.testing.assert_array_equal(env.reset()[0], reference.reset()[0])
            options = {"low": -0.01, "high": 0.02}
            observations = env.reset(seed=list(range(50, 80)), options=options)[0]
            np.testing.assert_array_equal(
                observations, reference.reset(seed=list(range(50, 80)), options=options)[0]
            )
    assert truncations >= 20 and terminations >= 200


def looped_cartpole(num_envs, max_episode_steps):
    def make_env(task):
        return gymnasium_cartpole(cartpole.TASKS[task])

    return LoopVectorEnv(
        num_envs, make_env, cartpole.NAMES, cartpole.TASKS, max_episode_steps=max_episode_steps
    )


@pytest.mark.parametrize("build", [cartpole.CartPole10, looped_cartpole])
def test_an_episode_can_terminate_and_truncate_at_once(build):
    env = build(10, max_episode_steps=9)
    reference = sync_reference([lambda p=p: gymnasium_cartpole(p) for p in cartpole.TASKS], 9)
    env.reset(seed=3), reference.reset(seed=3)
    both = 0
    for _ in range(400):
        ours, theirs = env.step(np.ones(10, dtype=int)), reference.step(np.ones(10, dtype=int))
        assert_equal_steps(ours, theirs)
        both += (ours[2] & ours[3]).sum()
    assert both > 0


def test_each_cartpole_task_is_held_by_its_own_lqr_but_not_by_the_first_ones():
    def lengths(gains):
        env = envs.make("cartpole10", envs_per_task=5)
        observations, _ = env.reset(seed=0)
        first = np.zeros(50, dtype=int)
        for _ in range(500):
            observations, _, _, _, infos = env.step(lqr_actions(observations, gains))
            if infos:
                length = infos["final_info"]["episode"]["l"]
                first = np.where((first == 0) & infos["_final_info"], length, first)
        return first.reshape(10, 5)

    assert (lengths(np.repeat(GAINS, 5, axis=0)) == 500).all()
    held = lengths(np.tile(GAINS[0], (50, 1))) == 500
    assert held[0].all() and not held[[1, 2, 6, 8]].any()


def test_cartpole_continues_bit_for_bit_from_a_saved_state():
    def advance(env, steps):
        rng = np.random.default_rng(1)
        return [env.step(rng.integers(2, size=20)) for _ in range(steps)]

    env = envs.make("cartpole10", envs_per_task=2)
    env.reset(seed=11)
    last = advance(env, 33)[-1]
    restored = envs.make("cartpole10", envs_per_task=2)
    observations = restored.set_state(save_and_load(env.get_state()))
    assert observations.dtype == np.float32
    np.testing.assert_array_equal(observations, last[0])
    expected = advance(env, 150)
    for ours, theirs in zip(advance(restored, 150), expected, strict=True):
        for our, their in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(our, their)
        assert str(ours[4]) == str(theirs[4])
    assert sum(bool(step[4]) for step in expected) > 20  # episodes that began before and after the save
    assert env.get_state() == restored.get_state()
    np.testing.assert_array_equal(env.reset()[0], restored.reset()[0])


def test_cartpole_refuses_a_state_that_does_not_fit():
    env = envs.make("cartpole10", envs_per_task=1)
    env.reset(seed=0)
    other = envs.make("cartpole10", envs_per_task=2)
    with pytest.raises(ValueError, match="does not fit an environment of 20 CartPoles"):
        other.set_state(env.get_state())
    with pytest.raises(ValueError, match="does not fit"):
        env.set_state({})


def test_cartpole_needs_a_reset_first_and_actions_in_range():
    env = envs.make("cartpole10", envs_per_task=1)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(10, dtype=int))
    env.reset(seed=0)
    with pytest.raises(IndexError):
        env.step(np.full(10, 2))


# LunarLander


def heuristic_actions(env, observations):
    single = env.envs[0]
    return np.array([heuristic(single, observation) for observation in observations])


@pytest.mark.parametrize("continuous", [False, True])
def test_lunarlander_equals_gymnasium(continuous):
    tasks = [0, 5, 6, 10, 13, 16, 19]
    env = lunarlander.LunarLander20(7, tasks=tasks, continuous=continuous, max_episode_steps=400)
    reference = sync_reference(
        [lambda p=p: gymnasium_lander(p, continuous) for p in env.task_params], max_episode_steps=400
    )
    observations, infos = env.reset(seed=5)
    np.testing.assert_array_equal(observations, reference.reset(seed=5)[0])
    assert observations.dtype == np.float32 and infos == {}
    rng = np.random.default_rng(0)
    truncations = landings = crashes = 0
    for step in range(2400):
        actions = heuristic_actions(env, observations)
        random = rng.uniform(-1.3, 1.3, (7, 2)) if continuous else rng.integers(4, size=7)
        # one environment in three flies by chance, and every one now and then, beyond the bounds too
        overruled = (np.arange(7) % 3 == step // 800) | (rng.random(7) < 0.05)
        actions[overruled] = random[overruled]
        actions = actions.astype(np.float32 if continuous and step % 2 else actions.dtype)
        ours, theirs = env.step(actions), reference.step(actions)
        assert_equal_steps(ours, theirs)
        observations, rewards, terminated, truncated, _ = ours
        truncations += truncated.sum()
        landings += (terminated & (rewards == 100)).sum()
        crashes += (terminated & (rewards == -100)).sum()
    assert truncations >= 5 and landings >= 5 and crashes >= 20
    for ours, theirs in zip(env.envs, reference.envs, strict=True):
        assert ours.np_random.bit_generator.state == theirs.np_random.bit_generator.state


def test_lunarlander_tasks_span_calm_to_storm_and_reach_the_constructor():
    env = envs.make("lunarlander20", envs_per_task=1)
    params = np.array([list(task.values()) for task in env.task_params])  # (20, gravity wind turbulence)
    assert env.num_tasks == 20 and len(np.unique(params, axis=0)) == 20
    assert (params[:, 0] > -12).all() and params[:, 0].min() < -11.5 and -2 < params[:, 0].max() < 0
    assert params[:, 1].min() == 0 and params[:, 1].max() == 20
    assert params[:, 2].min() == 0 and params[:, 2].max() == 2
    for single, task in zip(env.envs, env.task_params, strict=True):
        assert (single.gravity, single.wind_power, single.turbulence_power) == tuple(task.values())
        single.reset(seed=0)
        assert single.world.gravity.y == pytest.approx(task["gravity"])
        assert single.enable_wind == (task["wind_power"] > 0 or task["turbulence_power"] > 0)


def test_lunarlander_has_a_thousand_steps_and_cannot_be_saved():
    env = envs.make("lunarlander20-continuous", envs_per_task=2)
    assert env.max_episode_steps == 1000 and env.single_action_space.shape == (2,)
    assert env.get_state() is None
    with pytest.raises(ValueError, match="cannot restore"):
        env.set_state({})
    assert envs.make_single("lunarlander20", task=1).spec.max_episode_steps == 1000


def test_lunarlander_task_survives_pickling():
    env = lunarlander.LunarLanderTask(task=10, continuous=True)
    copy = pickle.loads(pickle.dumps(env))
    assert (copy.gravity, copy.wind_power, copy.continuous) == (env.gravity, env.wind_power, True)


# What every vector environment promises


@pytest.mark.parametrize("env_id", ALL)
def test_attributes_and_types(env_id):
    env = envs.make(env_id, envs_per_task=2)
    assert env.num_envs == 2 * env.num_tasks and env.envs_per_task == 2
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert len(set(env.task_names)) == len(env.task_params) == env.num_tasks
    assert not any(set("/\\ :") & set(name) for name in env.task_names)
    observations, _ = env.reset(seed=0)
    assert env.observation_space.contains(observations)
    env.action_space.seed(0)
    before = observations.copy()
    for _ in range(30):
        step = env.step(env.action_space.sample())
        np.testing.assert_array_equal(observations, before)  # what was returned stays as it was
        observations, before = step[0], step[0].copy()
    assert [array.dtype for array in step[:4]] == [np.float32, np.float64, np.bool_, np.bool_]
    assert all(array.shape == (env.num_envs,) for array in step[1:4])
    env.close()


@pytest.mark.parametrize("env_id", ["cartpole10", "lunarlander20", "lunarlander20-continuous", "CartPole-v1"])
def test_same_seed_same_trajectory(env_id):
    def run(seed):
        env = envs.make(env_id, envs_per_task=1)
        env.action_space.seed(0)
        trajectory = [env.reset(seed=seed)[0]]
        return np.stack(trajectory + [env.step(env.action_space.sample())[0] for _ in range(150)])

    np.testing.assert_array_equal(run(3), run(3))
    assert (run(3) != run(4)).any()
    assert (run(None)[0] != run(None)[0]).any()


@pytest.mark.parametrize("env_id", ["cartpole10", "lunarlander20"])
def test_chosen_tasks_in_the_given_order(env_id):
    every, some = envs.make(env_id, envs_per_task=2), envs.make(env_id, envs_per_task=2, tasks=[7, 2])
    assert some.task_names == [every.task_names[7], every.task_names[2]]
    assert some.task_params == [every.task_params[7], every.task_params[2]]
    assert (some.num_envs, some.num_tasks, some.envs_per_task) == (4, 2, 2)
    slots = [14, 15, 4, 5]
    seeds = np.arange(every.num_envs)
    every.reset(seed=seeds.tolist()), some.reset(seed=seeds[slots].tolist())
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = rng.integers(2, size=every.num_envs)
        everything, chosen = every.step(actions), some.step(actions[slots])
        for full, part in zip(everything[:4], chosen[:4], strict=True):
            np.testing.assert_array_equal(full[slots], part)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3"])
def test_plain_ids_equal_gymnasium(env_id):
    env = envs.make(env_id, envs_per_task=3)
    assert (env.num_tasks, env.task_names, env.task_params) == (1, [env_id], [{}])
    assert env.get_state() is None
    reference = sync_reference([lambda: gym.make(env_id)] * 3)
    np.testing.assert_array_equal(env.reset(seed=1)[0], reference.reset(seed=1)[0])
    env.action_space.seed(1)
    ended, largest = 0, 2 if env_id == "Pendulum-v1" else 1  # its actions are from -2 to 2
    for _ in range(410):  # Pendulum's episodes have 200 steps
        actions = env.action_space.sample()
        ended += assert_equal_steps(env.step(actions), reference.step(actions * largest))
    assert ended >= 6


def test_observations_of_other_types_become_float32():
    class Doubles(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        action_space = gym.spaces.Discrete(2)

        def reset(self, seed=None, options=None):
            return np.full(3, 0.1), {}

        def step(self, action):
            return np.full(3, 0.1), 1, action == 1, False, {}

    gym.register("Doubles-v0", entry_point=Doubles)
    try:
        env = envs.make("Doubles-v0", envs_per_task=2)
        assert env.reset()[0].dtype == env.single_observation_space.dtype == np.float32
        observations, rewards, _, _, infos = env.step(np.array([0, 1]))
        assert observations.dtype == infos["final_obs"].dtype == np.float32 and rewards.dtype == np.float64
        assert infos["_final_obs"].tolist() == [False, True]
    finally:
        del gym.registry["Doubles-v0"]


# Statistics of the training episodes


def test_episodes_are_averaged_by_task_between_two_logs(register):
    """Environment i of Countdown has episodes of length and return 2 + i; two of them are of a task."""
    env = envs.make(register(Countdown), envs_per_task=2)
    env.reset(seed=0)
    episodes = Episodes(env)

    def advance(steps):
        for _ in range(steps):
            episodes.add(env.step(np.zeros(6, dtype=int))[4])
        return episodes.means()

    nan, none = np.nan, [np.nan] * 3
    assert np.isnan(episodes.latest).all()
    np.testing.assert_array_equal(advance(1), np.full((3, 3), nan))  # nothing has ended
    assert np.isnan(episodes.latest).all()
    expected = [(2 + 2 + 3) / 3, 4, nan]  # by step 4; environment 3 has length 5
    np.testing.assert_array_equal(advance(3), [expected, expected, none])
    np.testing.assert_array_equal(episodes.latest, [expected, expected, none])
    expected = [(2 + 3) / 2, 5, 6]  # of steps 5 and 6
    np.testing.assert_array_equal(advance(2), [expected, expected, none])
    np.testing.assert_array_equal(episodes.latest, [expected, expected, none])
    np.testing.assert_array_equal(advance(1), [[nan, nan, 7]] * 2 + [none])  # step 7
    np.testing.assert_array_equal(episodes.latest, [[2.5, 5, 7]] * 2 + [none])

    episodes.add(env.step(np.zeros(6, dtype=int))[4])  # what a checkpoint is to keep: step 8
    restored = Episodes(env)
    restored.load_state_dict(save_and_load(episodes.state_dict()))
    for one in (episodes, restored):
        np.testing.assert_array_equal(one.latest, [[2.5, 5, 7]] * 2 + [none])
        np.testing.assert_array_equal(one.means(), [[2, 4, nan]] * 2 + [none])
        np.testing.assert_array_equal(one.latest, [[2, 4, 7]] * 2 + [none])


@pytest.mark.parametrize("name", ["success", "is_success"])
def test_successes_are_averaged_where_they_are_reported(name):
    episodes, ended = (
        Episodes(envs.make("lunarlander20-goals", 2, tasks=[0, 1])),
        np.array([True, True, False, True]),
    )
    numbers = {"r": np.arange(4.0), "l": np.arange(4)}
    for success in ([True, False, True, False], [True, True, False, True]):
        final = {"episode": numbers, name: np.array(success), f"_{name}": ended}
        episodes.add({"final_info": final, "_final_info": ended})
    np.testing.assert_array_equal(episodes.means()[2], [3 / 4, 1 / 2])


def test_episodes_ignore_what_others_report_of_environments_that_go_on():
    episodes = Episodes(envs.make("cartpole10", 1, tasks=[0, 1]))
    nan, ended = np.nan, np.array([False, True])
    numbers = {"r": np.array([nan, 5.0]), "l": np.array([99, 7])}
    episodes.add({"final_info": {"episode": numbers}, "_final_info": ended})
    episodes.add({"more": 1})
    np.testing.assert_array_equal(episodes.means(), [[nan, 5], [nan, 7], [nan, nan]])


# Registration


@pytest.mark.parametrize("env_id", QUICK)
def test_gymnasium_makes_them_too(env_id):
    number = 2 * envs.make(env_id, 1).num_tasks
    env = gym.make_vec(env_id, num_envs=number)
    assert env.num_envs == number and env.reset(seed=0)[0].shape[0] == number
    single = gym.make(env_id, task=3, render_mode="rgb_array")
    single.reset(seed=0)
    single.step(single.action_space.sample())
    assert single.render().ndim == 3
    assert envs.make(env_id, 1).single_action_space == single.action_space
    single.close()


def test_importing_twice_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(envs)


@pytest.mark.parametrize("env_id", ["cartpole10", "lunarlander20", "lunarlander20-continuous"])
def test_single_task_equals_its_slot_in_the_vector(env_id):
    vector = envs.make(env_id, envs_per_task=1)
    for task in (0, 4):
        single = envs.make_single(env_id, task=task)
        seeds = [9] * vector.num_envs
        np.testing.assert_array_equal(vector.reset(seed=seeds)[0][task], single.reset(seed=9)[0])
        vector.action_space.seed(0)
        terminated = False
        while not terminated:
            actions = vector.action_space.sample()
            step = vector.step(actions)
            observation, reward, terminated, _, _ = single.step(actions[task])
            last = step[4]["final_obs"][task] if terminated else step[0][task]
            np.testing.assert_array_equal(last, observation)
            assert step[1][task] == reward and step[2][task] == terminated


def test_single_environments_render_and_limit_their_episodes():
    for env_id, shape in (("cartpole10", (400, 600, 3)), ("lunarlander20", (400, 600, 3))):
        env = envs.make_single(env_id, task=2, render_mode="rgb_array")
        env.reset(seed=0)
        env.step(2 if env_id == "lunarlander20" else 1)
        assert env.render().shape == shape
        if env_id == "lunarlander20":
            assert env.unwrapped.particles  # the flames of the main engine
        env.close()
    assert envs.make_single("cartpole10", task=3).spec.max_episode_steps == 500
    assert envs.make_single("Pendulum-v1").spec.max_episode_steps == 200


# Vector environments of others


class Countdown(gym.vector.VectorEnv):
    """Three tasks; environment i ends after 2 + i steps with reward 1 a step, and observes (task, step)."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    num_tasks = 3
    dense = False

    def __init__(self, num_envs=3):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(-1.0, 100.0, (2,), np.float64)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def _observe(self, steps):
        return np.stack([np.arange(self.num_envs) * 3 // self.num_envs, steps], axis=1).astype(np.float64)

    def reset(self, *, seed=None, options=None):
        self.steps = np.zeros(self.num_envs, dtype=int)
        return self._observe(self.steps), {}

    def step(self, actions):
        self.steps += 1
        done = self.steps >= 2 + np.arange(self.num_envs)
        infos = {}
        if done.any():
            last = self._observe(self.steps)
            rows = [row if end else None for row, end in zip(last, done, strict=True)]
            objects = np.empty(self.num_envs, dtype=object)
            objects[:] = rows
            infos = {"final_obs": last if self.dense else objects, "_final_obs": done, "more": 1}
            self.steps[done] = 0
        return self._observe(self.steps), np.ones(self.num_envs), done, np.zeros_like(done), infos


class CountdownDense(Countdown):
    dense = True
    task_names = ["a", "b", "c"]
    task_params = [{"k": 1}, {"k": 2}, {"k": 3}]


class CountdownTasks(Countdown):
    """Knows its number of tasks only as an instance, and takes a choice of tasks."""

    num_tasks = None

    def __init__(self, num_envs=3, tasks=None):
        super().__init__(num_envs)
        self.num_tasks = 3 if tasks is None else len(tasks)
        self.chosen = tasks


class CountdownNextStep(Countdown):
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}


class CountdownNoFinal(Countdown):
    def step(self, actions):
        return *super().step(actions)[:4], {}


class CountdownNoTasks(Countdown):
    num_tasks = None


class CountdownTwoNames(Countdown):
    task_names = ["a", "b"]


@pytest.fixture
def register():
    added = []

    def add(entry_point, **kwargs):
        gym.register(f"Test{len(added)}-v0", vector_entry_point=entry_point, **kwargs)
        added.append(f"Test{len(added)}-v0")
        return added[-1]

    yield add
    for env_id in added:
        del gym.registry[env_id]


@pytest.mark.parametrize("entry_point", [Countdown, CountdownDense, CountdownTasks])
def test_a_registered_vector_environment_gets_dense_infos(register, entry_point):
    env = envs.make(register(entry_point), envs_per_task=2)
    assert (env.num_envs, env.num_tasks, env.envs_per_task) == (6, 3, 2)
    named = entry_point is CountdownDense
    assert env.task_names == (["a", "b", "c"] if named else ["task0", "task1", "task2"])
    assert env.task_params == ([{"k": 1}, {"k": 2}, {"k": 3}] if named else [{}, {}, {}])
    observations, _ = env.reset(seed=0)
    assert observations.dtype == np.float32 and env.observation_space.contains(observations)
    for step in range(1, 7):
        observations, _, terminated, _, infos = env.step(np.zeros(6, dtype=int))
        assert observations.dtype == np.float32
        if step == 1:
            assert infos == {}
        if step == 2:
            assert infos["final_obs"].dtype == np.float32
            assert infos["final_obs"].tolist() == [[0, 2], [0, 2], [1, 2], [1, 2], [2, 2], [2, 2]]
            assert observations[0].tolist() == [0, 0] and infos["more"] == 1
        if step == 6:  # environment 0 ends every second step, 1 every third, 4 after six
            assert (
                infos["_final_info"].tolist()
                == terminated.tolist()
                == [True, True, False, False, True, False]
            )
            assert infos["final_info"]["episode"]["r"].tolist() == [2.0, 3.0, 0.0, 0.0, 6.0, 0.0]
            assert infos["final_info"]["episode"]["l"].tolist() == [2, 3, 0, 0, 6, 0]


def test_a_registered_vector_environment_with_gymnasiums_statistics_keeps_them(register):
    """Its statistics may be of the reward before a scaling that the agent trains on."""

    def make_scaled(num_envs=2):
        def single():
            env = RecordEpisodeStatistics(gym.make("Pendulum-v1", max_episode_steps=5))
            return gym.wrappers.TransformReward(env, lambda reward: 100 * reward)

        env = SyncVectorEnv([single] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        env.num_tasks = 2
        return env

    make_scaled.num_tasks = 2
    env = envs.make(register(make_scaled), envs_per_task=1)
    env.reset(seed=0)
    total = sum((step := env.step(np.zeros((2, 1))))[1] for _ in range(5))
    infos = step[4]
    np.testing.assert_allclose(infos["final_info"]["episode"]["r"], total / 100)
    assert infos["final_obs"].shape == (2, 3) and infos["final_obs"].dtype == np.float32


def test_a_registered_vector_environment_gets_tasks(register):
    env = envs.make(register(CountdownTasks), envs_per_task=2, tasks=[2, 0])
    assert env.num_envs == 4 and env.unwrapped.chosen == [2, 0]
    env.reset(seed=0)
    env.step(np.zeros(4, dtype=int))
    infos = env.step(np.zeros(4, dtype=int))[4]
    assert infos["final_info"]["episode"]["l"].tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("entry_point", [Countdown, CountdownTasks])
def test_a_registered_vector_environment_cannot_be_saved(register, entry_point):
    assert envs.make(register(entry_point), 1).get_state() is None


def test_an_episode_that_ends_without_final_obs_is_an_error(register):
    env = envs.make(register(CountdownNoFinal), envs_per_task=1)
    env.reset(seed=0)
    env.step(np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="without giving final_obs"):
        env.step(np.zeros(3, dtype=int))


def test_a_module_named_in_the_id_is_imported_first(tmp_path, monkeypatch):
    (tmp_path / "module_of_the_test.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('FromModule-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert envs.make("module_of_the_test:FromModule-v0", 2).task_names == ["FromModule-v0"]
    finally:
        gym.registry.pop("FromModule-v0", None)


# Mistakes


def single_with(observation_space, action_space):
    class Odd(gym.Env):
        def __init__(self):
            self.observation_space, self.action_space = observation_space, action_space

    return Odd


def fail_in_two_lines():
    raise ImportError("first line\nsecond line")


FLAT, TWO = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env_id": "nonsense"}, "unknown environment 'nonsense', choose cartpole10, .* or any Gymnasium id"),
        ({"env_id": "CartPole-v99"}, "unknown environment 'CartPole-v99'"),
        ({"env_id": "no_such_module:CartPole-v1"}, "No module named 'no_such_module'"),
        ({"envs_per_task": 0}, "envs_per_task must be a positive integer, got 0"),
        ({"envs_per_task": 1.5}, "envs_per_task must be a positive integer, got 1.5"),
        ({"tasks": []}, "tasks must be different integers from 0 to 9"),
        ({"tasks": [3, 3]}, "tasks must be different integers from 0 to 9, got \\[3, 3\\]"),
        ({"tasks": [10]}, "from 0 to 9, got \\[10\\]"),
        ({"tasks": [-1]}, "from 0 to 9, got \\[-1\\]"),
        ({"tasks": [0.5]}, "tasks must be a sequence of integers"),
        ({"tasks": 3}, "tasks must be a sequence of integers"),
        ({"env_id": "CartPole-v1", "tasks": [1]}, "from 0 to 0, got \\[1\\]"),
        ({"env_id": "Blackjack-v1"}, "observations must be a one-dimensional Box, got Tuple"),
    ],
)
def test_mistakes_are_one_clear_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(**({"env_id": "cartpole10", "envs_per_task": 1} | kwargs))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        (single_with(gym.spaces.Box(0, 1, (4, 4)), TWO), "one-dimensional Box, got Box of shape \\(4, 4\\)"),
        (single_with(gym.spaces.Dict(a=FLAT), TWO), "one-dimensional Box, got Dict"),
        (
            single_with(FLAT, gym.spaces.MultiDiscrete([2, 2])),
            "Discrete or a one-dimensional Box, got MultiDis",
        ),
        (single_with(FLAT, gym.spaces.Box(-1, 1, (2, 2))), "Discrete or a one-dimensional Box, got Box"),
        (single_with(FLAT, gym.spaces.Box(-np.inf, 1, (2,))), "must have finite bounds"),
        (single_with(FLAT, gym.spaces.Discrete(2, start=1)), "must start at 0"),
        ("no_such_package:Env", "cannot build Odd-v0: No module named 'no_such_package'"),
        (fail_in_two_lines, "cannot build Odd-v0: first line"),
    ],
)
def test_unusable_environments_are_refused(entry_point, message):
    gym.register("Odd-v0", entry_point=entry_point)
    try:
        with pytest.raises(ValueError, match=message) as error:
            envs.make("Odd-v0", 1)
        assert "\n" not in str(error.value)
    finally:
        del gym.registry["Odd-v0"]


@pytest.mark.parametrize(
    ("entry_point", "kwargs", "message"),
    [
        (CountdownNextStep, {}, "autoreset mode must be SAME_STEP, got AutoresetMode.NEXT_STEP"),
        (CountdownNoTasks, {}, "has no attribute num_tasks"),
        (CountdownTwoNames, {}, "3 tasks need as many task_names"),
        (Countdown, {"tasks": [1]}, "unexpected keyword argument 'tasks'"),
        (Countdown, {"tasks": [3]}, "from 0 to 2, got \\[3\\]"),
    ],
)
def test_unusable_vector_environments_are_refused(register, entry_point, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(register(entry_point), envs_per_task=1, **kwargs)
    assert "\n" not in str(error.value)


def test_other_mistakes(register):
    with pytest.raises(ValueError, match="num_envs=15 is no positive multiple of the 10 tasks"):
        gym.make_vec("cartpole10", num_envs=15)
    with pytest.raises(ValueError, match="num_envs=0 is no positive multiple of the 2 tasks"):
        gym.make_vec("lunarlander20", num_envs=0, tasks=[3, 4])
    for env_id in ("cartpole10", "CartPole-v1"):
        with pytest.raises(ValueError, match="tasks must be different integers from 0 to"):
            envs.make_single(env_id, task=10)
    for env_id in ("cartpole10", "lunarlander20"):
        with pytest.raises(ValueError, match="tasks must be different integers from 0 to"):
            gym.make(env_id, task=20)
    with pytest.raises(ValueError, match="entry_point is not specified"):
        envs.make_single(register(Countdown), task=0)
    env = envs.make("cartpole10", envs_per_task=1)
    with pytest.raises(ValueError, match="10 environments need as many seeds, got 3"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.ones(10, dtype=bool)})
