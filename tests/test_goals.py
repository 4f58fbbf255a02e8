"""The suites with hidden goals, step for step against their definition."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

import envs
from envs import cartpole

SUITES = pytest.mark.parametrize("env_id", ["cartpole-goals10", "cartpole-goals-physics10"])


@SUITES
def test_goal_cartpoles_are_gymnasiums_with_a_reward_for_the_place(env_id):
    """All environments at once, and each task alone, through ends and restarts."""
    env = envs.make(env_id, 2)
    references = []
    for params in np.repeat(env.task_params, 2):
        reference = CartPoleEnv()
        for name in cartpole.FIELDS:
            setattr(reference, name, params[name])
        reference.total_mass = reference.masspole + reference.masscart
        reference.polemass_length = reference.masspole * reference.length
        references.append((gym.wrappers.TimeLimit(reference, 500), params["goal"]))
    singles = [envs.make_single(env_id, task) for task in range(10)]
    observations, _ = env.reset(seed=list(range(20)))
    for i, (reference, _) in enumerate(references):
        np.testing.assert_array_equal(observations[i], reference.reset(seed=i)[0])
    for task, single in enumerate(singles):
        single.reset(seed=2 * task)
    rng, ends, totals, seen = np.random.default_rng(0), 0, np.zeros(20), np.zeros(0)
    for _ in range(700):
        # towards the goal while the pole stands, so that rewards are of all sizes
        wanted = 0.1 * (env.goal - observations[:, 0]) - 0.1 * observations[:, 1]
        actions = (observations[:, 2] + 0.5 * observations[:, 3] > np.clip(wanted, -0.1, 0.1)).astype(int)
        actions = np.where(rng.random(20) < 0.1, 1 - actions, actions)
        observations, rewards, terminated, truncated, infos = env.step(actions)
        seen = np.append(seen, rewards)
        for i, (reference, goal) in enumerate(references):
            obs, _, term, trunc, _ = reference.step(actions[i].item())
            x = reference.unwrapped.state[0]
            assert (term, trunc) == (terminated[i], truncated[i])
            assert rewards[i] == pytest.approx(np.exp(-(((x - goal) / 0.5) ** 2)), rel=1e-12)
            totals[i] += rewards[i]
            if i % 2 == 0:
                own = singles[i // 2].step(actions[i].item())
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
    assert ends > 20 and seen.min() < 0.01 and seen.max() > 0.9


@SUITES
def test_observations_do_not_reveal_the_goal(env_id):
    """Same seed, same physics, same actions: the same observations whatever the goal."""
    one, other = (cartpole.CartPoleGoals10(10), cartpole.CartPole10(10, tasks=None))
    if env_id == "cartpole-goals-physics10":
        one = cartpole.CartPoleGoalsPhysics10(10)
    else:
        other = cartpole.CartPoleIdentical10(10)
    seeds, rng = list(range(10)), np.random.default_rng(0)
    np.testing.assert_array_equal(one.reset(seed=seeds)[0], other.reset(seed=seeds)[0])
    for _ in range(100):
        actions = rng.integers(2, size=10)
        np.testing.assert_array_equal(one.step(actions)[0], other.step(actions)[0])


@SUITES
def test_goals_lie_on_the_track_and_all_differ(env_id):
    env = envs.make(env_id, 1)
    goals = [params["goal"] for params in env.task_params]
    assert len(set(goals)) == len(set(env.task_names)) == 10 and max(map(abs, goals)) <= 1.5
    assert sorted(goals) == sorted(cartpole.GOALS)
    chosen = envs.make(env_id, 3, [7, 2])
    assert chosen.goal.tolist() == [goals[7]] * 3 + [goals[2]] * 3


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
