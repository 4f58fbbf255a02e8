"""Runs that are killed or stopped and continued with --resume equal uninterrupted ones, bit for bit."""

import gc
import itertools
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import probes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
from envs.metrics import Episodes
from envs.runs import Run
from envs.settings import InputError

varshare, sac = map(probes.load_script, ("varshare_ppo.py", "varshare_sac.py"))
BATCH = 10 * 8 * 32  # steps of a rollout of probes.SMALL
EVERYTHING = {"norm_reward": True, "rollout_weights": "sample", "reptile_alpha": 0.1, "eval_interval": 6_000}
EVERYTHING |= {"norm_obs": True, "norm_value": True}
SAC_EVERYTHING = {"rollout_weights": "sample", "reptile_alpha": 0.1, "updates_per_step": 0.7}
SAC_EVERYTHING |= {"norm_obs": True, "norm_value": True, "eval_interval": 350, "total_timesteps": 1_000}

pytestmark = pytest.mark.usefixtures("elsewhere")


def start(name, folder, changes, **kill):
    small = vars(probes.small_args(probes.load_script(name)))
    settings = small | {"checkpoint_interval": 0.0} | changes
    process = probes.processes.Process(target=probes.run_and_kill, args=(name, settings, folder), kwargs=kill)
    process.start()
    return process


def run(name, folder, changes, **kill):
    """Exit code and output of a run in a process of its own; a negative code is the signal that ended it."""
    process = start(name, folder, changes, **kill)
    process.join()
    return process.exitcode, (folder / "output").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of the uninterrupted run of a script with some settings, each done once."""
    done = {}

    def get(name, changes):
        key = name, str(changes)
        if key not in done:
            folder = tmp_path_factory.mktemp("reference")
            code, output = run(name, folder, changes)
            assert code == 0, output
            done[key] = folder / "runs/small"
        return done[key]

    return get


def everything_in(folder):
    paths = [path for path in folder.iterdir() if path.name != "lock"]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_run_killed_again_and_again_while_it_saves_ends_the_same(tmp_path, uninterrupted):
    name, folder, changes = "varshare_ppo.py", tmp_path / "runs/small", EVERYTHING
    reference = uninterrupted(name, changes)
    # moment and number of the save to be killed in, of each attempt; then the iteration of the checkpoint
    attempts = [("half", 1, 0), ("before", 3, 2), ("half", 9, 10)]
    for moment, save, iteration in attempts:
        time.sleep(1 - time.time() % 1)  # TensorBoard orders the events of one second by process number
        changes = changes | {"resume": True}
        code, output = run(name, tmp_path, changes, moment=moment, save=save)
        assert code == -signal.SIGKILL, output
        assert not (folder / "model.pt").exists()
        assert len(list(folder.glob("*.tmp"))) == 1  # the next attempt finds it
        assert (folder / "checkpoint.pt").exists() == (iteration > 0)
        if iteration:
            assert probes.load(folder, "checkpoint")["iteration"] == iteration
        # the log is ahead of the checkpoint
        assert int(probes.read_heartbeat(folder)[-1][0]) > iteration * BATCH or iteration == 10
    time.sleep(1 - time.time() % 1)
    code, output = run(name, tmp_path, changes)
    assert code == 0, output
    probes.assert_same_runs(folder, reference)
    scalars = [EventAccumulator(str(f), {"scalars": 0}).Reload() for f in (folder, reference)]
    for tag in scalars[1].Tags()["scalars"]:
        if not tag.startswith(("charts/SPS", "charts/wall_time", "eval")):  # there are two evaluations
            ours, expected = ([(e.step, e.value) for e in s.Scalars(tag)] for s in scalars)
            np.testing.assert_array_equal(ours, expected, tag)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path, uninterrupted):
    name, changes = "varshare_ppo.py", {"norm_reward": True}
    reference, resume, kills = uninterrupted(name, changes), changes | {"resume": True}, 0
    rng = random.Random(0)
    for delay in sorted(rng.uniform(0.05, 0.8) for _ in range(8)):  # no run is as short as the first
        process = start(name, tmp_path, resume)
        process.join(delay)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    code, output = run(name, tmp_path, resume)
    assert code == 0 and kills, output
    probes.assert_same_runs(tmp_path / "runs/small", reference)


@pytest.mark.parametrize(
    ("name", "signum", "save", "changes"),
    [
        (
            "varshare_sac.py",
            signal.SIGTERM,
            61,
            SAC_EVERYTHING,
        ),  # the buffer has come round; between two logs
        pytest.param("varshare_ppo.py", signal.SIGINT, 3, {}, marks=pytest.mark.slow),
        pytest.param("baselines/cagrad_ppo.py", signal.SIGTERM, 3, {}, marks=pytest.mark.slow),
        pytest.param(
            "variants/varshare_reptile_ppo.py",
            signal.SIGTERM,
            3,
            {"total_timesteps": 10 * 512, "tasks": (0, 4), "norm_reward": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stopped_run_says_how_to_continue_and_ends_the_same(
    name, tmp_path, uninterrupted, signum, save, changes
):
    folder = tmp_path / "runs/small"
    code, output = run(name, tmp_path, changes, moment="after", save=save, signum=signum)
    assert code == 128 + signum
    assert re.match("stopped.*--resume --run-name small$", output.splitlines()[-1])
    assert probes.load(folder, "checkpoint")["iteration"] == save and not (folder / "model.pt").exists()
    code, output = run(name, tmp_path, changes | {"resume": True, "checkpoint_interval": 1e9})
    assert code == 0, output
    probes.assert_same_runs(folder, uninterrupted(name, changes))


@pytest.mark.slow
def test_a_signal_in_the_last_iteration_leaves_the_evaluation_to_the_resumed_run(tmp_path, uninterrupted):
    name = "varshare_ppo.py"
    code, output = run(name, tmp_path, {}, moment="before", save=10, signum=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "stopped" in output
    assert probes.load(tmp_path / "runs/small", "checkpoint")["iteration"] == 10
    assert run(name, tmp_path, {"resume": True})[0] == 0
    probes.assert_same_runs(tmp_path / "runs/small", uninterrupted(name, {}))


@pytest.mark.slow
def test_a_signal_while_the_model_is_saved_leaves_the_evaluation_to_the_resumed_run(tmp_path, uninterrupted):
    name = "varshare_ppo.py"
    code, output = run(name, tmp_path, {}, moment="before", save=11, signum=signal.SIGINT)
    assert code == 128 + signal.SIGINT and "stopped" in output
    assert (tmp_path / "runs/small/model.pt").exists()
    assert run(name, tmp_path, {"resume": True})[0] == 0
    probes.assert_same_runs(tmp_path / "runs/small", uninterrupted(name, {}))


def test_the_second_signal_ends_a_run_at_once(tmp_path):
    code, _ = run("varshare_ppo.py", tmp_path, {}, moment="before", save=3, signum=signal.SIGINT, times=2)
    assert code == 128 + signal.SIGINT
    assert probes.load(tmp_path / "runs/small", "checkpoint")["iteration"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_where_environments_cannot_be_saved_their_episodes_restart(tmp_path, signum):
    name, folder = "varshare_ppo.py", tmp_path / "runs/small"
    size = {"envs_per_task": 1, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 320}
    changes = {"env_id": "lunarlander20", "eval_episodes": 1, "norm_reward": True, "tasks": (0, 9)} | size
    code, output = run(name, tmp_path, changes, moment="after", save=4, signum=signum)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum), output
    checkpoint = probes.load(folder, "checkpoint")
    assert checkpoint["envs"] is None and checkpoint["iteration"] == 4
    assert checkpoint["episodes"]["discounted"].all()
    code, output = run(name, tmp_path, changes | {"resume": True})
    assert code == 0, output
    rows = [row for row in probes.read_heartbeat(folder) if row[1:3] == ("losses/value_loss", "mean")]
    assert [int(row[0]) for row in rows] == list(range(32, 321, 32))
    assert (folder / "model.pt").exists()


# In this process: what is refused, and what is found


def small(script, **changes):
    """Two iterations."""
    size = {"total_timesteps": 200 if script is sac else 2 * BATCH}
    return probes.run(script, "small", **size | changes)


@pytest.mark.parametrize(("env_id", "new"), [("Truncated", True), ("cartpole10", False)])
def test_what_a_resumed_run_starts_from(env_id, new):
    """Sums over episodes start anew with these; the log is written on from where the checkpoint was."""
    size = {"env_id": env_id, "num_steps": 30, "norm_reward": True, "total_timesteps": 2640}
    folder = small(varshare, **size)
    (folder / "evaluation.csv").unlink()
    with open(folder / "heartbeat.csv", "a") as file:
        file.write("9999,later,mean,1.0\n")
    env = envs.make(env_id, 8)
    resumed = Run(varshare.Args(**probes.SMALL | size | {"resume": True}), varshare.__file__, env)
    saved, bytes_before = (
        resumed.checkpoint["episodes"]["discounted"].clone(),
        resumed.checkpoint["heartbeat_bytes"],
    )
    assert resumed.resumes and saved.any()  # episodes had not ended with the rollout
    episodes, agent = Episodes(env), torch.nn.Module()
    resumed.checkpoint["agent"] = {}
    resumed.start_or_resume(env, 1000, 240, agent=agent, episodes=episodes)
    assert torch.equal(episodes.discounted, torch.zeros_like(saved) if new else saved)
    assert resumed.output.file.tell() == bytes_before and resumed.first_iteration == resumed.iteration
    resumed.close()
    assert "later" not in (folder / "heartbeat.csv").read_text()


@pytest.mark.parametrize("name", ["model", "checkpoint"])
def test_files_of_an_earlier_version_are_refused(trunk, capsys, name):
    """Their weights may have the same shapes in another order."""
    folder = small(trunk)
    content = probes.load(folder, name)
    content["format"] -= 1
    torch.save(content, folder / f"{name}.pt")
    if name == "checkpoint":
        (folder / "evaluation.csv").unlink()
    changes = {"load": str(folder), "run_name": "loaded"} if name == "model" else {"resume": True}
    assert "earlier version" in refused(trunk, folder, capsys, **changes)


def test_a_signal_in_the_middle_of_an_iteration_ends_the_run_after_it(monkeypatch, capsys):
    """Whatever --checkpoint-interval says; here between two logs: every other of 60 iterations is logged."""
    batch, calls, update = 10 * 8 * 8, itertools.count(1), varshare.update
    changes = {"total_timesteps": 60 * batch, "num_steps": 8, "update_epochs": 1, "checkpoint_interval": 1e9}

    def update_and_signal(*args):
        if next(calls) == 31:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(varshare, "update", update_and_signal)
        small(varshare, **changes)
    folder = Path("runs/small")
    assert stop.value.code == 128 + signal.SIGTERM and next(calls) == 32
    assert f"stopped at step {31 * batch}: continue with --resume" in capsys.readouterr().out
    assert probes.load(folder, "checkpoint")["iteration"] == 31 and not (folder / "model.pt").exists()
    assert int(probes.read_heartbeat(folder)[-1][0]) == 30 * batch
    small(varshare, **changes, resume=True)
    probes.assert_same_runs(folder, small(varshare, **changes, run_name="uninterrupted"))


def test_restarted_episodes_are_new_ones(trunk):
    probes.Probe.seeds.clear()
    folder = small(trunk, env_id="RewardOfAction")
    (folder / "evaluation.csv").unlink()
    small(trunk, env_id="RewardOfAction", resume=True)
    given = [seeds for seeds in probes.Probe.seeds if set(seeds) != {0}]  # zeros: when it was tried out
    start, evaluation, restart, same_evaluation = map(tuple, given)
    seeds = [*start, *evaluation, *restart]
    assert len(set(seeds)) == len(seeds) and evaluation == same_evaluation


def refused(script, folder, capsys, **changes):
    """The one line with which a run is refused; nothing is changed in `folder`."""
    before = everything_in(folder)
    capsys.readouterr()
    with pytest.raises(InputError) as refusal:
        small(script, **changes)
    message = str(refusal.value)
    assert capsys.readouterr() == ("", "") and "\n" not in message
    assert everything_in(folder) == before
    del refusal  # which holds the run that was refused, and that the folder's lock
    gc.collect(1)
    return message


def test_a_finished_run_is_left_alone_and_settings_cannot_change_on_the_way(trunk, capsys):
    folder = small(trunk)
    before = everything_in(folder)
    capsys.readouterr()
    assert small(trunk, resume=True) == folder
    assert capsys.readouterr() == (f"{folder} is finished\n", "")
    assert everything_in(folder) == before
    assert "--resume" in refused(trunk, folder, capsys)  # and not overwritten
    (folder / "evaluation.csv").unlink()
    others = {"seed": 2, "env_id": "cartpole-identical10", "tasks": (0, 1), "total_timesteps": 4 * BATCH}
    others |= {"learning_rate": 1e-5, "hidden_sizes": (64, 32), "norm_obs": True}
    for name, value in others.items():
        assert f"cannot be resumed: its {name} is " in refused(
            trunk, folder, capsys, resume=True, **{name: value}
        )
    small(trunk, resume=True, checkpoint_interval=5.0)  # which changes nothing
    assert (folder / "evaluation.csv").exists()


def test_without_a_name_resume_finds_the_newest_run_of_the_seed():
    names = {"run_name": "", "resume": True}
    first = small(varshare, **names)  # nothing to resume: a new one
    assert first.name.startswith("cartpole10__varshare_ppo__1__")
    other = small(varshare, **names, seed=11)
    assert other != first and "__11__" in other.name
    for folder in (first, other):
        (folder / "evaluation.csv").unlink()
    assert small(varshare, **names) == first and (first / "evaluation.csv").exists()
    older = first.rename(first.with_name("cartpole10__varshare_ppo__1__5"))
    os.utime(older / "config.json", (1, 1))
    newer = small(varshare, run_name="")
    (newer / "evaluation.csv").unlink()
    assert small(varshare, **names) == newer


def test_what_a_checkpoint_holds(either):
    folder = small(either)
    checkpoint, config = probes.load(folder, "checkpoint"), json.loads((folder / "config.json").read_text())
    more = {"buffer", "means", "target"} if either is sac else set()
    assert checkpoint.keys() == {*MISSING, *more, "kind", "format", *config}
    assert checkpoint["kind"] == "checkpoint" and checkpoint["iteration"] == (20 if either is sac else 2)
    assert checkpoint["heartbeat_bytes"] < (folder / "heartbeat.csv").stat().st_size  # the evaluation follows
    assert {name: checkpoint[name] for name in config} == config
    model = probes.load(folder)
    assert model.keys() == {"agent", "kind", "format", "heartbeat_bytes", *config}
    for name, x in checkpoint["agent"].items():
        assert torch.equal(x, model["agent"][name]), name


def other_shapes(content):
    return {name: x[..., :-1] for name, x in content.items()}


MISSING = ("agent", "optimizer", "rng", "episodes", "envs", "generators", "iteration", "seconds")
MISSING += ("heartbeat_bytes",)
OTHER_PARAMETERS = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
DOES_NOT_FIT = [(name, None) for name in MISSING]
DOES_NOT_FIT += [
    ("agent", other_shapes),
    ("agent", lambda x: {f"other_{name}": value for name, value in x.items()}),
    ("agent", lambda x: {"theta": x["theta"]}),
    ("optimizer", lambda x: {}),
    ("optimizer", lambda x: OTHER_PARAMETERS),
    ("rng", lambda x: x[:-1]),
    ("rng", lambda x: x.float()),
    ("episodes", other_shapes),
    ("episodes", lambda x: {"latest": x["latest"]}),
    ("episodes", lambda x: x | {"discounted": x["discounted"][:-1, :-1]}),
    ("episodes", lambda x: x | {"discounted": [1.0]}),
    ("envs", lambda x: {name: y[:-1] for name, y in x.items()}),
    ("envs", lambda x: {}),
]


def test_a_checkpoint_that_does_not_fit_or_is_spoilt_is_refused(capsys):
    folder = small(varshare)
    model, whole = (folder / "model.pt").read_bytes(), (folder / "checkpoint.pt").read_bytes()
    (folder / "evaluation.csv").unlink()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2], model):
        (folder / "checkpoint.pt").write_bytes(content)
        assert "checkpoint" in refused(varshare, folder, capsys, resume=True)
    (folder / "checkpoint.pt").write_bytes(whole)
    checkpoint = probes.load(folder, "checkpoint")
    for name, edit in DOES_NOT_FIT:
        changed = {x: y for x, y in checkpoint.items() if x != name}
        torch.save(
            changed | ({} if edit is None else {name: edit(checkpoint[name])}), folder / "checkpoint.pt"
        )
        assert "checkpoint.pt" in refused(varshare, folder, capsys, resume=True), name
