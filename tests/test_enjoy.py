"""Tests of enjoy.py: every way to play equals the same thing done by hand, one episode at a time."""

import csv
import itertools
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import probes
import pytest
import torch
from PIL import Image

import enjoy
import varshare_ppo
from enjoy import Args, play
from envs import make_single, video
from envs.evaluation import spread_seeds
from envs.settings import InputError

ROOT = Path(__file__).resolve().parents[1]
EPISODES = 4  # of a run's final evaluation


def train(folder, **settings):
    """A short run in `folder`; with so large a sigma that every draw of the weights acts differently."""
    small = {
        "env_id": "cartpole10",
        "num_steps": 32,
        "hidden_sizes": (16,),
        "eval_episodes": EPISODES,
        "sigma_init": 0.3,
        "sigma_prior": 1.0,
        "seed": 3,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / varshare_ppo.train(varshare_ppo.Args(**small | settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("all"), total_timesteps=25_600, run_name="all-tasks")


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("part")
    norms = {"norm_obs": True, "norm_value": True}  # whose statistics are part of the model
    return train(folder, total_timesteps=3 * 8 * 32 * 5, tasks=(5, 2, 7), run_name="three-tasks", **norms)


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pendulum")
    return train(folder, env_id="Pendulum-v1", total_timesteps=512, eval_episodes=1, run_name="pendulum")


def read_model(run):
    return torch.load(run / "model.pt", weights_only=True)


def write_model(run, folder, **changes):
    """The run's model with some entries changed, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    torch.save(read_model(run) | changes, folder / "model.pt")
    return folder


@pytest.fixture
def played(monkeypatch):
    """What `play_episodes` has asked for and got: a list of steps, (obs, policies) each, for every round."""
    rounds, play_episodes = [], enjoy.play_episodes

    def record(policy, envs, seeds):
        steps = []

        def recorded(obs):
            steps.append((obs.clone(), policy(obs)))
            return steps[-1][1]

        rounds.append(steps)
        return play_episodes(recorded, envs, seeds)

    monkeypatch.setattr(enjoy, "play_episodes", record)
    return rounds


def policy_by_hand(model, weights, obs):
    """Average policy of these weights, (draw, weight), at one observation, in plain NumPy."""
    policies = []
    for flat in weights.double().numpy():
        x = obs
        sizes = [4, *model["args"]["hidden_sizes"], 2]
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):  # the actor's layers come first
            w, b, flat = np.split(flat, [n_in * n_out, n_in * n_out + n_out])
            x = w.reshape(n_out, n_in) @ (np.maximum(x, 0) if i else x) + b
        policies.append(np.exp(x - x.max()) / np.exp(x - x.max()).sum())
    return np.mean(policies, axis=0)


def assert_played_as_by_hand(run, returns, steps, draws):
    """Returns (task, episode), and every step, with so many draws of the weights an episode, 0 for the means.

    Actions are those of the policy that was played: at a tie, NumPy's and PyTorch's rounding may choose
    differently.
    """
    model = read_model(run)
    agent, rng = model["agent"], torch.Generator().manual_seed(3)
    mean, sigma = agent["theta"] + agent["mu"], agent["sigma"]
    seeds = np.reshape(spread_seeds(3, 1, returns.size), returns.shape).tolist()
    for episode in range(returns.shape[1]):
        weights = [mean + sigma * torch.randn(mean.shape, generator=rng) for _ in range(draws)] or [mean]
        for task in range(10):
            env, total, over, step = make_single("cartpole10", task), 0.0, False, iter(steps)
            obs, _ = env.reset(seed=seeds[task][episode])
            while not over:
                seen, policy = (x[task, episode].numpy() for x in next(step))
                expected = policy_by_hand(model, torch.stack(weights)[:, task], obs)
                assert np.array_equal(seen, obs)
                np.testing.assert_allclose(policy, expected, atol=1e-4)
                obs, reward, terminated, truncated, _ = env.step(int(policy.argmax()))
                total, over = total + reward, terminated or truncated
            assert returns[task, episode] == total


def first_steps(rounds):
    """Observations and policies (task, episode, ...) of the first step of every episode."""
    return [torch.cat(x, dim=1) for x in zip(*(steps[0] for steps in rounds), strict=True)]


def assert_same_episodes(returns, starts, expected, expected_starts):
    """But for rounding, which depends on the number of episodes at a time, and may choose at a tie."""
    assert torch.equal(starts[0], expected_starts[0])
    torch.testing.assert_close(starts[1], expected_starts[1])
    assert returns.shape == expected.shape and (returns == expected).mean() > 0.8


def test_mean_weights_give_the_final_evaluation_of_the_run(run, part, pendulum):
    for folder, episodes in ((run, EPISODES), (part, EPISODES), (pendulum, 1)):
        names, returns, lengths, _, films = play(Args(folder, episodes=episodes))
        with open(folder / "heartbeat.csv", newline="") as file:
            rows = {(row["metric"], row["task"]): float(row["value"]) for row in csv.DictReader(file)}
        assert names == read_model(folder)["task_names"] and not films
        for metric, values in (("eval/episodic_return", returns), ("eval/episodic_length", lengths)):
            assert [rows[metric, name] for name in names] == values.mean(1).tolist()


def test_successes_are_played_and_printed_where_they_are_reported(run, tmp_path, capsys):
    changes = {"env_id": "lunarlander20-goals", "tasks": (1, 2), "total_timesteps": 2048}
    folder = train(tmp_path, run_name="lander", **changes)
    names, returns, lengths, successes, _ = play(Args(folder, episodes=3))
    assert successes.shape == returns.shape == lengths.shape == (2, 3) and set(successes.flat) <= {0, 1}
    enjoy.main(Args(folder, episodes=3))
    head, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert head.split()[-1] == "success" and [row.split()[0] for row in rows] == [*names, "mean"]
    assert [row.split()[-1] for row in rows] == [f"{x.mean():.0%}" for x in (*successes, successes)]
    assert np.isnan(play(Args(run, episodes=2))[3]).all()
    enjoy.main(Args(run, episodes=2))
    assert "success" not in capsys.readouterr().out


def test_mean_weights_by_hand(run, played):
    _, returns, lengths, _, _ = play(Args(run, episodes=4))
    assert_played_as_by_hand(run, returns, *played, draws=0)
    assert np.array_equal(returns, lengths) and returns.std() > 0


def test_every_episode_draws_its_own_weights(run, played):
    _, returns, _, _, _ = play(Args(run, "sample", episodes=3))
    assert_played_as_by_hand(run, returns, *played, draws=1)
    assert not np.array_equal(returns, play(Args(run, episodes=3))[1])
    assert not np.array_equal(returns, play(Args(run, "sample", episodes=3, seed=4))[1])
    assert np.array_equal(returns, play(Args(run, "sample", episodes=3, seed=3))[1])


def test_an_ensemble_averages_policies(run, played):
    _, returns, _, _, _ = play(Args(run, "ensemble", ensemble_size=3, episodes=2))
    assert_played_as_by_hand(run, returns, *played, draws=3)
    sample, single = (play(Args(run, how, ensemble_size=1, episodes=5))[1] for how in ("sample", "ensemble"))
    assert np.array_equal(sample, single)


def test_a_gaussian_ensemble_averages_the_means(pendulum):
    model = read_model(pendulum)
    agent = varshare_ppo.Agent(
        enjoy.make("Pendulum-v1", 1), varshare_ppo.Args(hidden_sizes=(16,)), torch.Generator()
    )
    agent.load_state_dict(model["agent"])
    agent.requires_grad_(False)
    space = make_single("Pendulum-v1").action_space
    obs, noise = torch.randn(1, 3, 3), torch.randn(4, 3, *agent.mu.shape)  # (draw, env, task, weight)
    means = enjoy.player(agent, [0], noise)(obs)
    for env in range(3):
        nets = [agent.unpack(agent.weights(draw[env])) for draw in noise]
        by_hand = sum(agent.policy(net, obs[:, env : env + 1]) for net in nets) / 4
        torch.testing.assert_close(means[:, env : env + 1], by_hand, atol=1e-5, rtol=1e-4)
    agent.mu[:] *= 100
    strong = enjoy.player(agent, [0], None)(torch.randn(1, 100, 3))
    assert strong.shape == (1, 100, 1) and strong.abs().max() > 2
    assert torch.equal(video.greedy(strong, space), strong.clamp(-2, 2))  # what is played


@pytest.mark.parametrize("weights", ["mean", "sample", "ensemble"])
def test_episodes_do_not_depend_on_rounds_or_on_the_tasks_played(run, part, weights, monkeypatch, played):
    def returns_and_start(args):
        played.clear()
        return play(args)[1], first_steps(played)

    _, returns, lengths, _, _ = play(Args(run, weights, 2, episodes=4))
    starts = first_steps(played)
    assert returns.shape == lengths.shape == (10, 4) and (lengths > 0).all()
    names, some, _, _, _ = play(Args(run, weights, 2, episodes=4, tasks=(3, 0)))
    assert names == [read_model(run)["task_names"][i] for i in (3, 0)]
    assert np.array_equal(some, returns[[3, 0]])
    for name, size, tasks in (("ENVS_PER_TASK", 3, range(10)), ("WEIGHTS_AT_A_TIME", 1, (0,))):
        monkeypatch.setattr(enjoy, name, size)  # of the latter one environment a round is always possible
        some, some_starts = returns_and_start(Args(run, weights, 2, episodes=4, tasks=tuple(tasks)))
        assert_same_episodes(some, some_starts, returns[list(tasks)], [x[list(tasks)] for x in starts])
    full, some = play(Args(part, weights, 2)), play(Args(part, weights, 2, tasks=(7, 5)))  # by suite index
    assert some[0] == [full[0][2], full[0][0]] and np.array_equal(some[1], full[1][[2, 0]])


def test_table(run, capsys):
    _, returns, lengths, _, _ = play(Args(run, episodes=5))
    enjoy.main(Args(run, episodes=5))
    *_, last, mean = capsys.readouterr().out.splitlines()
    values = [returns[-1].mean(), returns[-1].std(), returns[-1].min(), returns[-1].max(), lengths[-1].mean()]
    assert last.split() == [read_model(run)["task_names"][-1], *(f"{x:.1f}" for x in values)]
    assert mean.split()[:4] == ["mean", "over", "tasks", f"{returns.mean():.1f}"]


def test_films_are_of_the_first_episodes_of_the_table(run, tmp_path, capsys):
    args = Args(run, "sample", episodes=2, tasks=(3, 0), capture_video=True)
    names, _, lengths, _, films = play(args)
    assert films == [run / "videos" / f"{name}.mp4" for name in (*names, "all-tasks")]
    for path, length in zip(films, (*lengths[:, 0], lengths[:, 0].max())):
        with Image.open(path.with_suffix(".gif")) as image:
            assert image.n_frames == 1 + np.ceil(length / 2)  # from the first to the last state, 50 a second
            assert image.width == video.WIDTH and path.stat().st_size < 2e6
    assert capsys.readouterr().err == ""
    other = Args(run / "model.pt", episodes=1, tasks=(0,), capture_video=True, video_dir=tmp_path / "a" / "b")
    assert play(other)[4] == [tmp_path / "a" / "b" / f"{names[1]}.mp4"]


def test_a_film_of_continuous_actions(pendulum, monkeypatch):
    monkeypatch.setattr(video, "FRAMES_PER_SECOND", 1.5)  # of 30 steps, one in 20
    _, _, _, _, films = play(Args(pendulum / "model.pt", episodes=1, capture_video=True))
    assert films == [pendulum / "videos/Pendulum-v1.mp4"]
    with Image.open(films[0].with_suffix(".gif")) as image:
        assert image.n_frames == 11


def test_an_exported_model_has_the_mean_weights_alone(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models/given-away"
    enjoy.main(Args(run, export=folder))
    path = folder / "model.pt"
    assert capsys.readouterr().out == f"saved  {path}, {path.stat().st_size / 1e6:.1f} MB\n"
    whole, model = read_model(run), read_model(folder)
    dropped = whole["agent"].keys() - model["agent"].keys()
    assert dropped == {"sigma", "h_sum", "h_count"} and model["agent"].keys() < whole["agent"].keys()
    assert path.stat().st_size < 0.5 * (run / "model.pt").stat().st_size
    assert np.array_equal(play(Args(folder, episodes=2))[1], play(Args(run, episodes=2))[1])
    for weights in ("sample", "ensemble"):
        assert "has mean weights only" in refused(capsys, Args(folder, weights))
    with pytest.raises((SystemExit, ValueError)):
        enjoy.main(Args(run, export=folder))
    assert read_model(folder).keys() == model.keys()
    small = {"env_id": "cartpole10", "num_steps": 32, "total_timesteps": 2560}
    agent = train(tmp_path, **small, load=str(folder), run_name="loaded")  # continues with the task's own mu
    start = train(tmp_path, **small, load=str(run), run_name="whole")
    mu = [read_model(x)["agent"]["mu"] for x in (agent, start, folder)]
    assert mu[0].isfinite().all() and (mu[0] - mu[2]).norm() < 0.5 * mu[2].norm()
    assert read_model(agent)["agent"]["sigma"].std() > 0


def test_the_newest_run_is_played_by_the_name_of_latest(run, monkeypatch, capsys):
    latest, folders = run.parent / "latest", []
    assert latest.read_text() == f"{run.name}\n"
    expected = play(Args(run, episodes=1))[1]
    monkeypatch.setattr(video, "film", lambda *args: (folders.append(args[-1]), None))
    assert np.array_equal(play(Args(latest, episodes=1, capture_video=True))[1], expected)
    assert folders == [run / "videos"]
    latest.write_text("gone\n")
    assert "runs/gone does not exist" in refused(capsys, Args(latest))
    latest.write_text(f"{run.name}\n")


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("goals10", 435.9),
        ("goals-physics10", 386.7),
        pytest.param("mt10", 3922.3, marks=pytest.mark.slow),
    ],
)
def test_the_saved_models_play_as_their_page_says(name, score):
    page = (ROOT / "models/README.md").read_text()
    assert f"| {score} |" in next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
    returns = play(Args(ROOT / "models" / name))[1]
    assert returns.shape == (10, 20) and returns.mean() == pytest.approx(score, rel=0.05)
    assert sum(path.stat().st_size for path in ROOT.glob("models/*/model.pt")) < 3e6


class Trap:
    """Unpickled without care it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def refused(capsys, args):
    """The one line with which `play` refuses."""
    with pytest.raises(InputError) as error:
        play(args)
    assert capsys.readouterr() == ("", "") and "\n" not in str(error.value)
    return str(error.value)


def test_refuses_what_is_not_a_model(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "nowhere does not exist" in refused(capsys, Args(Path("nowhere")))
    assert "model.pt does not exist" in refused(capsys, Args(tmp_path))
    shutil.copy(run / "config.json", tmp_path)
    assert "not finished" in refused(capsys, Args(tmp_path))
    assert "cannot be read" in refused(capsys, Args(run / "heartbeat.csv"))
    assert "checkpoint" in refused(capsys, Args(run / "checkpoint.pt"))
    torch.save([1, 2], "list.pt")
    assert "is not a model" in refused(capsys, Args(Path("list.pt")))
    Path("half.pt").write_bytes((run / "model.pt").read_bytes()[:1000])
    assert "spoilt" in refused(capsys, Args(Path("half.pt")))
    Path("pickle.pt").write_bytes(pickle.dumps({"kind": "model", "agent": Trap()}, protocol=2))
    torch.save({"kind": "model", "agent": Trap()}, "trap.pt")
    for name in ("pickle.pt", "trap.pt"):
        assert "no model of this project" in refused(capsys, Args(Path(name)))
    assert not Path("trapped").exists()


def test_refuses_a_model_that_fits_no_script(run, tmp_path, capsys):
    args = read_model(run)["args"]
    outside = tmp_path / "outside.py"
    outside.write_text("raise AssertionError('imported')")
    for script in ("baselines/no_such.py", str(outside), os.path.relpath(outside, ROOT), "envs", "README.md"):
        folder = write_model(run, tmp_path / "script", script=script)
        assert f"needs the script {script}" in refused(capsys, Args(folder))
    folder = write_model(run, tmp_path / "small", args=args | {"hidden_sizes": [8]})
    assert "does not fit today's varshare_ppo.py" in refused(capsys, Args(folder))
    folder = write_model(run, tmp_path / "new", args=args | {"no_such_option": 1})
    assert "no_such_option" in refused(capsys, Args(folder))
    folder = write_model(run, tmp_path / "names", task_names=["moon", *read_model(run)["task_names"][1:]])
    assert "trained on moon" in refused(capsys, Args(folder))
    folder = write_model(run, tmp_path / "env", args=args | {"env_id": "no-such-env"})
    assert "no-such-env" in refused(capsys, Args(folder))


def test_refuses_numbers_and_tasks(run, part, capsys):
    for tasks in ((10,), (-1,), (0, 0)):
        assert "tasks must be" in refused(capsys, Args(run, tasks=tasks))
    assert "trained on, [5, 2, 7], not [5, 0]" in refused(capsys, Args(part, tasks=(5, 0)))
    assert "--episodes must be at least 1, not -3" in refused(capsys, Args(run, episodes=-3))
    assert "--ensemble-size must be at least 1" in refused(capsys, Args(run, "ensemble", ensemble_size=0))
    assert "--seed must be at least 0" in refused(capsys, Args(run, seed=-1))


@pytest.mark.usefixtures("elsewhere")
def test_plays_the_model_of_every_script(script, capsys):
    folder = probes.run(script, total_timesteps=300 if probes.is_sac(script) else 2560)
    names, returns, _, _, _ = play(Args(folder, episodes=2))
    assert [probes.evaluation(folder)[name] for name in names] == returns.mean(1).tolist()
    part = play(Args(folder, episodes=2, tasks=(7, 2)))[1]
    assert np.array_equal(part, returns[[7, 2]])
    for weights in ("sample", "ensemble"):
        if hasattr(script.Agent, "draw_noise"):
            assert play(Args(folder, weights, episodes=2))[1].shape == (10, 2)
        else:
            capsys.readouterr()
            expected = f"--weights {weights} needs a distribution of weights"
            assert expected in refused(capsys, Args(folder, weights))


def test_command_line():
    argv = ["runs/a", "--tasks", "0", "3", "--weights", "sample", "--episodes", "7", "--seed", "2"]
    assert enjoy.tyro.cli(Args, args=argv) == Args(Path("runs/a"), "sample", 5, 7, (0, 3), 2)


def test_interpolated_weights_are_the_polynomial_through_them():
    """Exact where weights are cubic in the goal, constant where tasks share a weight, linear if asked."""
    goals, wanted = [-1.5, -1.2, -0.5, 0.2, 0.8, 1.5], [-2.0, 0.37]
    x, y = (np.array(values)[:, None] for values in (goals, wanted))
    of = np.array([[1.0, -2.0, 0.5, 3.0]]).T  # (power, 1)
    columns = [np.hstack([z**i for i in range(4)]) @ of for z in (x, y)]
    weights = torch.tensor(np.hstack([columns[0], np.full_like(x, 7.0)]), dtype=torch.float32)
    found = enjoy.interpolate(weights, goals, wanted)
    np.testing.assert_allclose(found, np.hstack([columns[1], np.full_like(y, 7.0)]), rtol=1e-5)
    assert found.dtype == torch.float32
    line = enjoy.interpolate(torch.tensor([[1.0], [2.0], [3.0]]), [0.0, 1.0, 2.0], [5.0], degree=1)
    assert line.item() == pytest.approx(6)


def test_a_goal_that_was_never_trained_is_played():
    """By the saved model, in a place that none of its tasks has; elsewhere it is refused."""
    model = ROOT / "models/goals10"
    names, returns, lengths, _, films = play(Args(model, goal=0.37))
    assert names == ["goal+0.37"] and returns.shape == (1, 20) and not films
    assert returns.mean() > 400 and lengths.mean() == 500
    _, trained, *_ = play(Args(model, tasks=(6,)))  # goal +0.5 itself
    _, again, *_ = play(Args(model, goal=0.5))
    assert again.mean() == pytest.approx(trained.mean(), abs=40)
    for changes, message in (
        ({"goal": 3.0}, "on the track"),
        ({"goal": 0.3, "tasks": (1,)}, "leave out"),
        ({"goal": 0.3, "weights": "sample"}, "leave out"),
        ({"goal": 0.3, "run": ROOT / "models/goals-physics10"}, "differ by their goals only"),
    ):
        with pytest.raises(InputError, match=message):
            play(Args(**{"run": model} | changes))


def test_a_goal_is_played_by_forces_too(elsewhere):
    """The same policy at two goals: other rewards, and all else alike."""
    script = probes.load_script("baselines/task_blind_ppo.py")
    run = probes.run(script, env_id="cartpole-goals10-continuous", total_timesteps=5_120)
    near, far = (play(Args(run, goal=goal, episodes=3)) for goal in (0.05, 2.3))
    assert near[0] == ["goal+0.05"] and near[2].tolist() == far[2].tolist()
    assert (near[1] > 3 * far[1]).all()


def test_a_film_shows_the_goal_that_was_asked_for(tmp_path):
    *_, films = play(
        Args(ROOT / "models/goals10", goal=0.9, episodes=1, capture_video=True, video_dir=tmp_path)
    )
    assert [film.name for film in films] == ["goal+0.9.mp4"] and films[0].stat().st_size > 1000
