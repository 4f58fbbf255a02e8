"""Environments in several processes: the numbers of one process, and no process that outlives the run."""

import multiprocessing
import os
import random
import signal
import time

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch

import envs
from envs.generators import seed_generators
from envs.vector import LoopVectorEnv

varshare = probes.load_script("varshare_ppo.py")
pytestmark = pytest.mark.usefixtures("elsewhere")


class Draws(gym.Env):
    """Observes numbers of the global generators; a step with action 1 fails, a step with action 2 exits."""

    observation_space, action_space = gym.spaces.Box(-10, 10, (2,)), gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        return np.array([random.random(), np.random.normal()], np.float32), {}  # noqa: NPY002

    def step(self, action):
        if action == 1:
            raise OSError("the simulator has stopped")
        if action == 2:
            os._exit(7)
        return self.reset()[0], 0.0, False, False, {}


class DrawsVector(LoopVectorEnv):
    num_tasks = 3

    def __init__(self, num_envs=3, tasks=None):
        super().__init__(num_envs, lambda _: Draws(), ["a", "b", "c"], [{}] * 3, tasks, 100)


gym.register("Draws-v0", vector_entry_point=DrawsVector)


def random_actions(env, rng):
    if env.discrete:
        return rng.integers(env.single_action_space.n, size=env.num_envs)
    return rng.uniform(-1.5, 1.5, (env.num_envs, env.act_dim)).astype(np.float32)


def assert_equal(ours, theirs):
    """Dictionaries and arrays bit for bit, of the same types."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            assert_equal(x, theirs[name])
    else:
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("env_id", "tasks", "workers", "steps"),
    [
        ("cartpole-goals-physics10", None, 3, 600),
        ("lunarlander20-continuous", [7, 0, 12], 2, 400),
        pytest.param("mt10", [9, 4, 5], 3, 1010, marks=pytest.mark.slow),
    ],
)
def test_every_step_is_that_of_one_process(env_id, tasks, workers, steps):
    one, several = (envs.make(env_id, 2, tasks, number) for number in (1, workers))
    for name in ("num_envs", "num_tasks", "envs_per_task", "obs_dim", "act_dim", "discrete"):
        assert getattr(one, name) == getattr(several, name)
    for name in ("task_names", "task_params", "max_episode_steps", "single_observation_space"):
        assert getattr(one, name) == getattr(several, name)
    assert one.single_action_space == several.single_action_space
    rng, state, ended = np.random.default_rng(0), None, 0
    for seed in (3, None):
        assert_equal(several.reset(seed=seed)[0], one.reset(seed=seed)[0])
        for step in range(steps // 2):
            actions = random_actions(one, rng)
            expected, found = one.step(actions), several.step(actions)
            for x, y in zip(found, expected):
                assert_equal(x, y)
            assert_equal(several.episode_returns, one.episode_returns)
            ended += bool(found[4])
            if step == steps // 4 and one.get_state() is not None:
                state = several.get_state(), one.get_state()
    assert ended > 1
    if state:
        assert_equal(several.set_state(state[0]), one.set_state(state[1]))
        assert_equal(several.episode_lengths, one.episode_lengths)
        with pytest.raises(ValueError, match="processes"):
            several.set_state(state[0][:1])
    processes = several.workers
    several.close()
    assert [x.exitcode for x in processes] == [0] * workers


def test_a_run_is_that_of_one_process_and_resumes():
    small = dict(eval_interval=5120, total_timesteps=4 * 10 * 8 * 32)
    reference = probes.run(varshare, "one", **small)
    probes.assert_same_runs(probes.run(varshare, "several", env_workers=2, **small), reference)
    assert not multiprocessing.active_children()
    stopped = small | dict(run_name="stopped", env_workers=2, checkpoint_interval=0.0)
    arguments = "varshare_ppo.py", vars(probes.small_args(varshare, **stopped)), os.getcwd()
    kill = dict(moment="after", save=2, signum=signal.SIGTERM)
    process = probes.processes.Process(target=probes.run_and_kill, args=arguments, kwargs=kill)
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert probes.load(reference.with_name("stopped"), "checkpoint")["iteration"] == 2
    folder = probes.run(varshare, **stopped | {"name": "stopped", "resume": True})
    probes.assert_same_runs(folder, reference)


def test_global_generators_are_seeded():
    env = envs.make("Draws-v0", 1, None, 2)
    seed_generators(5)  # this process's are not theirs
    first = env.reset(seed=[1, 2, 3])[0]
    again = env.reset(seed=[1, 2, 3])[0]
    assert np.array_equal(first, again)
    assert len(np.unique(first)) == 6  # nor do two processes draw the same
    assert not np.array_equal(first, env.reset()[0])


class Wrapped(gym.vector.VectorEnv):
    """Another vector environment: torch in several threads, one generator, lists in its infos."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    num_tasks = 2

    def __init__(self, num_envs=2, tasks=None):
        self.num_envs = num_envs
        self.single_observation_space = Draws.observation_space
        self.single_action_space = Draws.action_space
        self.weight = torch.ones(1500, 1500)

    def observe(self):
        return self.np_random.random((self.num_envs, 2)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=None if seed is None else seed[0])
        return self.observe(), {}

    def step(self, actions):
        rewards = (self.weight @ self.weight)[0, : self.num_envs].numpy() / 1500
        final, ended = self.observe(), np.ones(self.num_envs, bool)
        infos = {"final_obs": final, "final_info": {"note": ["a"] * self.num_envs, "level": 3}, "more": [1]}
        return self.observe(), rewards, ended, ended, infos


def test_other_vector_environments_do_as_well():
    gym.register("Wrapped-v0", vector_entry_point=Wrapped)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    env = envs.make("Wrapped-v0", 2, None, 2)  # which is tried out first: this process has two threads now
    torch.set_num_threads(threads)
    env.reset(seed=1)
    _, rewards, _, _, infos = env.step(np.zeros(4, dtype=int))
    assert rewards.tolist() == [1.0] * 4 and infos["_final_info"].all()
    assert infos["final_info"]["episode"]["r"].tolist() == [1.0] * 4 and "note" not in infos["final_info"]
    env.reset()
    env.close()


def test_an_error_of_an_environment_is_shown_and_the_end_of_a_process_is_a_line():
    env = envs.make("Draws-v0", 1, None, 3)
    env.reset()
    with pytest.raises(RuntimeError, match="OSError: the simulator has stopped"):
        env.step(np.array([0, 0, 1]))
    env = envs.make("Draws-v0", 1, None, 3)
    env.reset()
    with pytest.raises(SystemExit, match="process 1 of the environments is gone, its exit code is 7"):
        env.step(np.array([0, 2, 0]))
    env = envs.make("Draws-v0", 1, None, 3)
    env.reset()
    os.kill(env.workers[0].pid, signal.SIGKILL)
    with pytest.raises(SystemExit, match="process 0 of the environments is gone, its exit code is -9"):
        env.reset()


def test_too_many_processes():
    with pytest.raises(ValueError, match="4 processes cannot each have tasks of 3"):
        envs.make("Draws-v0", 1, None, 4)


def build_and_sleep(pipe):
    env = envs.make("cartpole10", 1, None, 2)
    other = envs.make("cartpole10", 1, [0, 1], 2)
    pipe.send([x.pid for x in env.workers + other.workers])
    time.sleep(60)


def test_no_process_outlives_a_killed_run():
    ours, theirs = probes.processes.Pipe()
    run = probes.processes.Process(target=build_and_sleep, args=(theirs,))
    run.start()
    pids = ours.recv()
    assert len(pids) == 4
    run.kill()
    run.join()
    for pid in pids:
        for _ in range(100):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {pid} is still there")
