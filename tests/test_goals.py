"""The suites with hidden goals, step for step against their definition."""

import inspect
import math
import textwrap
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.box2d import lunar_lander
from gymnasium.envs.box2d.lunar_lander import LunarLander, heuristic
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

import envs
from envs import cartpole, lunarlander
from envs.evaluation import play_episodes
from envs.metrics import Episodes
from envs.vector import LoopVectorEnv

CONTINUOUS = "cartpole-goals10-continuous"
TEN_GOALS = ("cartpole-goals10", "cartpole-goals10-sparse", CONTINUOUS, "cartpole-goals-physics10")
ENVIRONMENTS = pytest.mark.parametrize("env_id", TEN_GOALS)


@pytest.mark.parametrize("env_id", [*TEN_GOALS, "cartpole-goals40"])
def test_goal_cartpoles_are_gymnasiums_with_a_reward_for_the_place(env_id):
    """All environments at once, and each task alone, through ends and restarts."""
    env = envs.make(env_id, 2)
    n, references = env.num_envs, []
    for params in np.repeat(env.task_params, 2):
        reference = CartPoleEnv()
        for name in cartpole.FIELDS:
            setattr(reference, name, params[name])
        reference.total_mass = reference.masspole + reference.masscart
        reference.polemass_length = reference.masspole * reference.length
        references.append((gym.wrappers.TimeLimit(reference, 500), params["goal"]))
    width = 0.2 if env_id.endswith("sparse") else None
    singles = [envs.make_single(env_id, task) for task in range(n // 2)]
    observations, _ = env.reset(seed=list(range(n)))
    for i, (reference, _) in enumerate(references):
        np.testing.assert_array_equal(observations[i], reference.reset(seed=i)[0])
    for task, single in enumerate(singles):
        single.reset(seed=2 * task)
    rng, ends, totals, seen = np.random.default_rng(0), 0, np.zeros(n), np.zeros(0)
    for _ in range(700 if n == 20 else 250):
        # towards the goal while the pole stands, so that rewards are of all sizes
        wanted = 0.1 * (env.goal - observations[:, 0]) - 0.1 * observations[:, 1]
        actions = (observations[:, 2] + 0.5 * observations[:, 3] > np.clip(wanted, -0.1, 0.1)).astype(int)
        actions = np.where(rng.random(n) < 0.1, 1 - actions, actions)
        forces = [None] * n
        if env_id == CONTINUOUS:  # now and then beyond the bounds
            forces = np.where(actions == 1, 1, -1) * rng.uniform(0.3, 1.2, n)
            actions = forces[:, None].astype(np.float32)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        seen = np.append(seen, rewards)
        for i, (reference, goal) in enumerate(references):
            action, force = actions[i], forces[i]
            if force is not None:  # Gymnasium knows a force to the right, and one to the left
                force = 10 * float(action[0].clip(-1, 1))
                reference.unwrapped.force_mag, action = abs(force), np.int64(force > 0)
            obs, _, term, trunc, _ = reference.step(action.item())
            x = reference.unwrapped.state[0]
            assert (term, trunc) == (terminated[i], truncated[i])
            expected = float(abs(x - goal) < width) if width else np.exp(-(((x - goal) / 0.5) ** 2))
            assert rewards[i] == pytest.approx(expected, rel=1e-12)
            totals[i] += rewards[i]
            if i % 2 == 0:
                own = singles[i // 2].step(actions[i] if forces[i] is not None else actions[i].item())
                np.testing.assert_array_equal(own[0], obs)
                assert own[1] == pytest.approx(rewards[i], rel=1e-12) and own[2:4] == (term, trunc)
            if term or trunc:
                ends += 1
                np.testing.assert_array_equal(infos["final_obs"][i], obs)
                assert infos["final_info"]["episode"]["r"][i] == pytest.approx(totals[i])
                totals[i], obs = 0, reference.reset()[0]
                if i % 2 == 0:
                    singles[i // 2].reset()
            np.testing.assert_array_equal(observations[i], obs)
    assert ends > (20 if n == 20 else 2) and seen.min() < 0.01 and seen.max() > 0.9


@ENVIRONMENTS
def test_observations_do_not_reveal_the_goal(env_id):
    """Same seed, same physics, same actions: the same observations whatever the goal."""
    one, other = (cartpole.CartPole10(10, task_set="cartpole-goals10"), cartpole.CartPole10(10, tasks=None))
    if env_id == "cartpole-goals-physics10":
        one = cartpole.CartPole10(10, task_set="cartpole-goals-physics10")
    else:
        other = cartpole.CartPole10(10, task_set="cartpole-identical10")
    seeds, rng = list(range(10)), np.random.default_rng(0)
    np.testing.assert_array_equal(one.reset(seed=seeds)[0], other.reset(seed=seeds)[0])
    for _ in range(100):
        actions = rng.integers(2, size=10)
        np.testing.assert_array_equal(one.step(actions)[0], other.step(actions)[0])


@ENVIRONMENTS
def test_goals_lie_on_the_track_and_all_differ(env_id):
    env = envs.make(env_id, 1)
    goals = [params["goal"] for params in env.task_params]
    assert len(set(goals)) == len(set(env.task_names)) == 10 and max(map(abs, goals)) <= 1.5
    assert sorted(goals) == sorted(cartpole.GOALS)
    chosen = envs.make(env_id, 3, [7, 2])
    assert chosen.goal.tolist() == [goals[7]] * 3 + [goals[2]] * 3


@pytest.mark.parametrize("number", cartpole.MANY)
def test_a_family_of_more_and_more_goals_between_the_same_ends(number):
    env = envs.make(f"cartpole-goals{number}", 1)
    goals = np.array([params["goal"] for params in env.task_params])
    assert env.num_tasks == len(goals) == len(set(env.task_names)) == number
    assert (goals[0], goals[-1]) == (-1.5, 1.5)
    np.testing.assert_allclose(np.diff(goals), 3 / (number - 1), atol=1e-3)
    assert all({**params, "goal": 0} == {**cartpole.TASKS[0], "goal": 0} for params in env.task_params)
    made = gym.make_vec(f"cartpole-goals{number}", num_envs=160)
    assert made.unwrapped.envs_per_task == 160 // number


def test_a_picture_shows_the_goal(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pictures = {}
    for task in (0, 9):
        env = envs.make_single("cartpole-goals10", task, "rgb_array")
        env.reset(seed=0)
        pictures[task] = env.render()
        columns = np.flatnonzero((pictures[task] == (0, 160, 0)).all(2).all(0))
        width, goal = pictures[task].shape[1], cartpole.GOALS[task]
        assert columns.mean() == pytest.approx((goal + 2.4) / 4.8 * width, abs=1)


class SlowLander(LunarLander):
    """LunarLander with a rolled terrain, from Gymnasium's own source, and the reward of the definition."""

    def __init__(self, pad, rule, render_mode=None, **params):
        super().__init__(render_mode=render_mode, **params)
        self.pad, self.rule, self.shaping = pad, rule, None
        source = textwrap.dedent(inspect.getsource(LunarLander.reset))
        before = "    self.moon = self.world.CreateStaticBody("
        assert source.count(before) == 1 and source.count("super()") == 1
        roll = f"    smooth_y = list(np.roll(smooth_y, {round(pad / 0.2)}))\n"
        source = source.replace(before, roll + before).replace("super()", "super(LunarLander, self)")
        made = {}
        exec(source, vars(lunar_lander) | {"LunarLander": LunarLander}, made)
        self.rolled_reset = made["reset"]

    def reset(self, seed=None):
        self.shaping = None
        return self.rolled_reset(self, seed=seed)

    def step(self, action):
        obs, _, _, _, _ = super().step(action)
        half_w, half_h = 600 / 30 / 2, 400 / 30 / 2
        x = (self.lander.position.x - half_w) / half_w
        y = (self.lander.position.y - (self.helipad_y + 18 / 30)) / half_h
        speed = self.lander.linearVelocity
        speed = math.hypot(speed.x * half_w / 50, speed.y * half_h / 50)
        legs = sum(leg.ground_contact for leg in self.legs)
        shaping = -100 * (math.hypot(x - self.pad, y) + speed + abs(self.lander.angle)) + 10 * legs
        reward, self.shaping = 0.0 if self.shaping is None else shaping - self.shaping, shaping
        if self.continuous:
            main, side = np.clip(action[0], 0, 1), np.clip(abs(action[1]), 0.5, 1)
            reward -= 0.3 * 0.5 * (main + 1) * (action[0] > 0) + 0.03 * side * (abs(action[1]) > 0.5)
        else:
            reward -= {0: 0.0, 1: 0.03, 2: 0.3, 3: 0.03}[action]
        off_pad = self.rule and legs > 0 and abs(x - self.pad) > 0.2
        terminated = bool(self.game_over or abs(x) >= 1 or off_pad or not self.lander.awake)
        if terminated:
            reward = -100.0 if self.lander.awake else 100.0
        return obs, reward, terminated, False, {"success": not self.lander.awake}


def fly(task, reference, episodes, through=1000):
    """The same actions in both, a controller's with noise; how episodes ended and where they touched down."""
    rng, ends, rested, where = np.random.default_rng(0), [], 0, []
    for seed in range(episodes):
        obs, _ = task.reset(seed=seed)
        np.testing.assert_array_equal(obs, reference.reset(seed=seed)[0])
        target = rng.choice([0, task.pad])  # some land in the middle, off the pad
        for _ in range(through):
            seen = obs - np.array([target, 0, 0, 0, 0, 0, 0, 0])
            action = heuristic(task, seen)
            if rng.random() < 0.05:
                action = rng.uniform(-1, 1, 2) if task.continuous else int(rng.integers(4))
            obs, reward, terminated, truncated, info = task.step(action)
            expected = reference.step(action)
            np.testing.assert_array_equal(obs, expected[0])
            assert reward == pytest.approx(expected[1], abs=1e-9)
            assert (terminated, truncated) == expected[2:4] and info.get("success") == expected[4].get(
                "success"
            )
            if terminated:
                break
        ends.append(reward)
        rested += not task.lander.awake
        where.append(obs[0])
    return np.array(ends), rested, np.array(where)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("task", [0, 1, 6, 11, 12, 19])
def test_goal_landers_are_gymnasiums_with_another_pad(task, continuous):
    """Terrain, reward, ends, through whole flights to the pad and to the middle."""
    params = dict(lunarlander.GOAL_TASKS[task])
    pad = params.pop("pad")
    reference = SlowLander(pad, True, enable_wind=params["wind_power"] > 0, continuous=continuous, **params)
    ends, _, where = fly(lunarlander.LunarLanderGoalTask(task, continuous), reference, 8)
    assert (ends == -100).any() and len(set(where)) == 8
    assert all(abs(x - pad) <= 0.2 for x, end in zip(where, ends) if end == 100)


def test_goal_landers_land_and_are_refused_off_the_pad():
    """Over some tasks the controller does both, so that the test above has seen both."""
    landed = refused = 0
    for task in (1, 2, 13, 14):
        pad = lunarlander.GOAL_TASKS[task]["pad"]
        env = lunarlander.LunarLanderGoalTask(task)
        ends, rested, where = fly(env, lunarlander.LunarLanderGoalTask(task), 6)
        landed += rested
        refused += sum((ends == -100) & (np.abs(where - pad) > 0.2) & (np.abs(where) < 1))
    assert landed >= 3 and refused >= 3


@pytest.mark.parametrize("continuous", [False, True])
def test_without_a_pad_elsewhere_and_its_rule_it_is_gymnasiums_lander(monkeypatch, continuous):
    """Step for step: pad 0 and no rule."""
    params = {"gravity": -10.0, "wind_power": 10.0, "turbulence_power": 1.0}
    monkeypatch.setattr(lunarlander.LunarLanderGoalTask, "all_tasks", [params | {"pad": 0.0}])
    monkeypatch.setattr(lunarlander.LunarLanderGoalTask, "pad_half_width", math.inf)
    env = lunarlander.LunarLanderGoalTask(0, continuous)
    reference = LunarLander(enable_wind=True, continuous=continuous, **params)
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(obs, reference.reset(seed=seed)[0])
        terminated = False
        while not terminated:
            action = heuristic(env, obs)
            obs, reward, terminated, truncated, _ = env.step(action)
            expected = reference.step(action)
            np.testing.assert_array_equal(obs, expected[0])
            assert (reward, terminated, truncated) == expected[1:4]


def test_lander_goals_are_twenty_tasks_that_the_observation_does_not_tell():
    env = envs.make("lunarlander20-goals", 1)
    tasks = env.task_params
    assert len({tuple(params.values()) for params in tasks}) == len(set(env.task_names)) == 20
    assert {params["pad"] for params in tasks} == {-0.6, -0.2, 0.2, 0.6}
    observations, _ = env.reset(seed=[0] * 20)
    rng, same = np.random.default_rng(0), 0
    for _ in range(40):  # in the air: the four pads of one physics see the same
        observations, _, terminated, _, _ = env.step(np.repeat(rng.integers(4), 20))
        if terminated.any():
            break
        np.testing.assert_array_equal(
            *np.broadcast_arrays(*(observations.reshape(5, 4, 8), observations[::4, None]))
        )
        same += 1
    assert same > 20


def test_a_landers_success_is_in_final_info():
    env = envs.make("lunarlander20-goals", 2, [1, 2])
    single, obs = lunarlander.LunarLanderGoalTask(1), env.reset(seed=[0, 1, 2, 3])[0]
    pads, ended, successes = np.repeat([params["pad"] for params in env.task_params], 2), 0, 0
    single.reset(seed=0)
    while ended < 8:
        actions = np.array([heuristic(single, x - np.array([pad] + [0] * 7)) for x, pad in zip(obs, pads)])
        obs, rewards, _, _, infos = env.step(actions)
        if infos:
            success, done = infos["final_info"]["success"], infos["_final_info"]
            assert (infos["final_info"]["_success"] == done).all() and success.dtype == bool
            np.testing.assert_array_equal(success[done], rewards[done] == 100)
            ended, successes = ended + done.sum(), successes + success.sum()
    assert successes


class Ends(gym.Env):
    """Episodes of so many steps; success is reported at their end only, and if it is not None."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, length, success):
        self.length, self.success = length, success

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, "f4"), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        info = {"success": self.success} if over and self.success is not None else {}
        return np.zeros(1, "f4"), 1.0, over, False, info


@pytest.mark.parametrize("lengths", [(5, 3, 4), (3, 5, 4), (3, 3, 3)])
@pytest.mark.parametrize("other", [True, None])
def test_success_may_be_reported_at_the_end_only_but_by_all(lengths, other):
    """Whichever episode ends first or last."""
    made = [(lengths[0], True), (lengths[1], other), (lengths[2], False)]
    env = LoopVectorEnv(6, lambda task: Ends(*made[task]), ["a", "b", "c"], [{}] * 3)
    refusal = nullcontext() if other else pytest.raises(ValueError, match="of every episode or of none")
    with refusal:
        played = play_episodes(lambda obs: torch.zeros(3, 2, 2), env, range(6))
    episodes = Episodes(env)
    env.reset(seed=0)
    for _ in range(20):
        episodes.add(env.step(np.zeros(6, int))[4])
    with refusal:
        means = episodes.means()
    if not other:
        return
    np.testing.assert_array_equal(means[2], [1, 1, 0])
    np.testing.assert_array_equal(played.successes, [[1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(played.lengths, np.repeat(lengths, 2).reshape(3, 2))


def test_a_landers_picture_shows_the_pad(monkeypatch):
    """Between the flags the ground is flat, and a film's rewards are those of training."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    for task, pad in ((0, -0.6), (3, 0.6)):
        env, plain = (
            lunarlander.LunarLanderGoalTask(task, render_mode="rgb_array"),
            lunarlander.LunarLanderGoalTask(task),
        )
        env.reset(seed=0)
        plain.reset(seed=0)
        picture = env.render()
        yellow = np.flatnonzero((picture == (204, 204, 0)).all(2).any(0))
        assert yellow.min() >= (1 + pad - 0.2) * 300 - 1 and yellow.max() <= (1 + pad + 0.2) * 300 + 26
        for action in (2, 1, 3, 0, 2):
            assert env.step(action)[1] == pytest.approx(plain.step(action)[1], abs=1e-9)
