"""Tests of Meta-World's suites: equal to its own environments, to the last bit, and true to the protocol."""

import ctypes.util
import io
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from metaworld import env_dict
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

import envs
from envs import metaworld
from envs.video import open_stages

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests/metaworld_reference.py"


def save_and_load(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def replay(tmp_path, env_id, suite, reward, copies, steps, saved_at):
    """Step ours with the actions of a recording of theirs, and compare; it is saved and loaded on the way."""
    path = tmp_path / "reference.npz"
    command = [sys.executable, REFERENCE, suite, reward, str(copies), str(steps), path]
    subprocess.run(command, check=True)
    theirs = dict(np.load(path))
    env = envs.make(env_id, envs_per_task=copies)
    seen, _ = env.reset(seed=list(range(env.num_envs)))
    np.testing.assert_array_equal([one.obs for one in env.envs], theirs["obs"][:, 0])
    reached = np.zeros(env.num_envs, dtype=bool)
    row = 0  # of their observations, which have one more for each reset
    for step in range(steps):
        if step in saved_at:
            state = save_and_load(env.get_state())
            metaworld.load_benchmark.cache_clear()  # as in another process
            env = envs.make(env_id, envs_per_task=copies)
            np.testing.assert_array_equal(env.set_state(state), seen)
        seen, rewards, terminated, truncated, infos = env.step(theirs["actions"][:, step])
        row += 1
        assert not terminated.any()
        np.testing.assert_array_equal(rewards, theirs["rewards"][:, step])
        reached |= theirs["successes"][:, step].astype(bool)
        if (step + 1) % 500 == 0:
            assert truncated.all()
            final = theirs["obs"][:, row].astype(np.float32)
            np.testing.assert_array_equal(infos["final_obs"], final)
            np.testing.assert_array_equal(infos["final_info"]["success"], reached)
            assert infos["final_info"]["_success"].all()
            reached[:] = False
            row += 1
        else:
            assert not truncated.any() and infos == {}
            np.testing.assert_array_equal([one.success for one in env.envs], reached)
        np.testing.assert_array_equal([one.obs for one in env.envs], theirs["obs"][:, row])
        np.testing.assert_array_equal(seen, theirs["obs"][:, row].astype(np.float32))
    return theirs


@pytest.mark.slow
def test_mt10_equals_meta_worlds_own_and_continues_from_a_saved_state(tmp_path):
    theirs = replay(tmp_path, "mt10", "MT10", "v2", 2, 620, saved_at=(0, 250, 505))
    solved = theirs["successes"][::2, :500].any(1)
    assert solved.sum() >= 9  # by the scripted policies: contacts, grasps and all rewards were met


@pytest.mark.slow
def test_mt10_with_the_old_reward_equals_meta_worlds_own(tmp_path):
    replay(tmp_path, "mt10-reward-v1", "MT10", "v1", 1, 510, saved_at=(250,))


@pytest.mark.slow
def test_mt50_equals_meta_worlds_own(tmp_path):
    theirs = replay(tmp_path, "mt50", "MT50", "v2", 1, 510, saved_at=(250,))
    assert theirs["successes"][:, :500].any(1).sum() >= 45
    replay(tmp_path, "mt50", "MT50", "v2", 2, 40, saved_at=())  # two that share model and data


def test_quaternions_are_scipys_and_rewards_use_the_same_sigmoid():
    random = np.random.default_rng(0)
    for _ in range(1000):
        matrix = Rotation.from_quat(random.normal(size=4)).as_matrix()
        np.testing.assert_array_equal(
            metaworld.Rotation.from_matrix(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat()
        )
        x, low, high, margin = random.normal(), *np.sort(random.normal(size=2)), random.uniform(-0.2, 1)
        for sigmoid in ("long_tail", "gaussian"):
            args = np.float64(x), (low, high), max(margin, 0), sigmoid
            assert metaworld.tolerance(*args) == reward_utils.tolerance(*args)


def test_a_step_is_meta_worlds_own_and_leaves_its_modules_alone():
    for task, name in ((2, "pick-place-v3"), (7, "peg-insert-side-v3")):
        ours, other = envs.make_single("mt10", task).unwrapped, envs.make_single("mt10", task).unwrapped
        theirs = env_dict.ALL_V3_ENVIRONMENTS[name](reward_function_version="v2")
        assert type(theirs).__base__ is SawyerXYZEnv
        theirs._set_task_called, theirs._partially_observable = True, False
        del theirs.sawyer_observation_space
        ours.reset(seed=task), other.reset(seed=task + 1)
        theirs._last_rand_vec = ours.goals[ours.goal_number]
        np.testing.assert_array_equal(ours.obs, theirs.reset()[0])
        random = np.random.default_rng(task)
        for _ in range(100):
            action = random.uniform(-1, 1, 4).astype(np.float32)
            other.step(-action)  # shares model and data
            obs, reward, *_ = theirs.step(action)
            our_obs, our_reward, *_ = ours.step(action)
            np.testing.assert_array_equal(our_obs, obs)
            assert our_reward == reward
    from metaworld.envs import sawyer_peg_insertion_side_v3 as module

    assert module.reward_utils is reward_utils and module.Rotation is Rotation


def test_protocol():
    assert envs.make("mt10", 1).task_names[7] == "peg-insert-side-v3"
    env = envs.make("mt10", envs_per_task=3, tasks=[7, 0])
    assert env.single_observation_space == gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
    first, _ = env.reset(seed=[5, 5, 6] * 2)
    np.testing.assert_array_equal(first[0::3], first[1::3])  # the same generator, the same goal
    np.testing.assert_array_equal(first[:, 36:], np.array([one._target_pos for one in env.envs], np.float32))
    assert len(np.unique(env.envs[0].goals, axis=0)) == 50
    env.reset(seed=0)
    goals, actions = [one.goal_number for one in env.envs], np.zeros((6, 4), np.float32)
    assert len({tuple(goals[i::3]) for i in range(3)}) == 3  # environments of a task have goals of their own
    for step in range(500):
        _, _, terminated, truncated, infos = env.step(actions)
        assert not terminated.any() and truncated.all() == (step == 499)
    assert infos["final_info"]["_success"].all() and (infos["final_info"]["episode"]["l"] == 500).all()
    assert [one.goal_number for one in env.envs] != goals


def test_only_reach_and_pick_place_begin_alike():
    """Which of these two an episode is of no first observation tells; of every other task it does."""
    mt10 = envs.make("mt10", 20)
    obs = mt10.reset(seed=1)[0].reshape(10, 20, 39)
    low, high = obs.min(1), obs.max(1)  # (task, feature)
    overlap = ((low[:, None] <= high) & (low <= high[:, None])).all(2)  # (task, task), in every feature
    alike = [(mt10.task_names[i], mt10.task_names[j]) for i, j in np.argwhere(np.triu(overlap, 1))]
    assert alike == [("reach-v3", "pick-place-v3")]


def test_success_is_of_any_step_of_the_episode():
    env = envs.make_single("mt10", task=0).unwrapped
    env.reset(seed=0)
    rewarded, answers = [0.0, 1.0, 0.0], []
    for success in rewarded:
        env.evaluate_state = lambda obs, action, success=success: (0.0, {"success": success})
        answers.append(env.step(np.zeros(4, np.float32))[4]["success"])
    assert answers == [False, True, True]
    env.reset()
    assert not env.success


def test_what_is_returned_is_the_callers():
    env, again = (envs.make_single("mt10", task=0).unwrapped for _ in range(2))
    env.reset(seed=0)[0][:] = 0
    np.testing.assert_array_equal(again.reset(seed=0)[0], env.obs)
    assert env.obs.any()
    env.step(np.zeros(4, np.float32))[0][:] = 0
    assert env.obs.any()


@pytest.mark.slow
def test_films_of_several_tasks(tmp_path):
    """In a process of its own: MuJoCo is told how to draw before it is imported."""
    pytest.importorskip("OpenGL")
    if ctypes.util.find_library("EGL") is None:
        pytest.skip("no EGL to draw with")
    code = """
import numpy as np, envs
from envs.video import open_stages
stages = open_stages("mt10", [3, 7])
for stage in stages:
    stage.reset(seed=0)
pictures = [stage.render() for stage in stages]
stages[1].close()
for stage, picture in zip(stages, pictures):  # each has its own place to draw
    assert picture.shape == (480, 480, 3) and picture.std() > 20
    np.testing.assert_array_equal(stage.render(), picture)
assert (pictures[0] != pictures[1]).any()
"""
    without = {name: x for name, x in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    subprocess.run([sys.executable, "-c", code], check=True, env=without, cwd=ROOT)


def test_without_a_display_a_film_is_refused_before_the_run(monkeypatch):
    def fail_to_render(self):
        raise AttributeError("no\ncontext")

    monkeypatch.setattr(metaworld.FastSawyer, "render", fail_to_render)
    with pytest.raises(ValueError, match=r"mt10 cannot be filmed here: no context \(.*MuJoCo needs EGL\)"):
        open_stages("mt10", [1])


def test_a_state_of_another_size_is_refused():
    env = envs.make("mt10", envs_per_task=1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="does not fit 20 environments"):
        envs.make("mt10", envs_per_task=2).set_state(env.get_state())
