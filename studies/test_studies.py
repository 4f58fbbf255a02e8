"""Commands of all studies, and what is collected and reported of runs in their folders."""

import json
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import probes
import pytest

import studies
from bench.collect import Run, read
from bench.methods import METHODS, read_methods
from studies.ceilings import __main__ as ceilings
from studies.likelihood import __main__ as likelihood
from studies.noise import __main__ as noise
from studies.normalisation import __main__ as normalisation
from studies.posterior import runs as posterior
from studies.power import __main__ as power
from studies.ranks import __main__ as ranks
from studies.recipe import __main__ as recipe
from studies.serial import __main__ as serial

CONTROLS = read_methods(probes.ROOT / "studies/posterior/methods.csv")


def parse(job):
    """The method of a run, its setting, and its settings, which its script accepts."""
    script = probes.load_script(job.script)
    args = probes.parse(script, *shlex.split(job.flags))
    script.check(args)
    method, _, setting = args.exp_name.partition("@")
    assert job.script == (METHODS | CONTROLS)[method].script
    return method, setting, args


def penalty_of(args):
    """lambda, of VarShare-PPO and of methods that have it as a setting; None of others."""
    if hasattr(args, "beta") and hasattr(args, "num_minibatches"):
        return args.beta / (2 * args.samples_per_task * args.sigma_prior**2)
    return getattr(args, "l2_coef", None)


@pytest.mark.parametrize(
    ("study", "number"),
    [
        (power, 4 * 3 * 4 * 5 + 2 * 3 * 3 + 3 * 3 * 3),
        (ceilings, 9),
        (normalisation, 144),
        (noise, 162),
        (posterior, 436),
        (likelihood, 80),
        (serial, 10 * 2 * 5 * 2),
        (ranks, 10 * 5),
        (recipe, 11 * 3),
    ],
)
def test_runs_have_settings_that_scripts_accept(study, number):
    jobs = list(study.jobs())
    assert len({job.name for job in jobs}) == len(jobs) == number
    one_of_each = {job.name.split("__")[-2]: job for job in jobs}  # by method@setting
    for method, setting, args in map(parse, one_of_each.values()):
        penalty = penalty_of(args)
        if study is power:
            assert args.learning_rate == float(setting) and args.eval_interval == args.total_timesteps // 10
        if study is normalisation:
            assert (args.norm_obs, args.norm_value) == ("obs" in setting, "value" in setting)
            assert method in ("task-blind", "hard-sharing") or penalty == pytest.approx(0.01, rel=0.05)
        if study is noise:
            assert penalty == pytest.approx(float(setting.partition(",")[0]), rel=0.02)
        if study is likelihood:
            assert penalty == pytest.approx(0.003, rel=0.01) and args.samples_per_task == 1024
            assert setting in ("point", f"{getattr(args, 'beta', 0):g}")
        if study is posterior and penalty is not None:
            assert penalty == pytest.approx(0.003, rel=0.01)
            acts = "sample" if setting.startswith("sample") else "mean"
            assert getattr(args, "rollout_weights", "mean") == acts
            assert (getattr(args, "reptile_alpha", 0) > 0) == setting.endswith("recentred")


def write_run(job, values):
    """A finished run with these evaluations, one task."""
    folder = Path("runs", job.name)
    folder.mkdir(parents=True)
    (folder / "command").write_text(job.command)
    config = {"args": {}, "task_names": ["a"], "script": job.script}
    config |= {"git_commit": "abc", "hardware": "abacus"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = ["global_step,metric,task,value"]
    for step, value in values.items():
        lines += [f"{step},eval/episodic_return,{task},{value}" for task in ("a", "mean")]
        lines.append(f"{step},charts/SPS,mean,7")
    (folder / "heartbeat.csv").write_text("\n".join(lines) + "\n")
    (folder / "evaluation.csv").touch()


def report(runs: pd.DataFrame) -> str:
    """Steps and the mean of the last evaluations."""
    return f"{runs.steps.iloc[0]} {studies.by_seed(runs).mean():.1f}"


def test_a_study_is_reported_from_its_runs_and_the_same_again_from_its_csvs():
    jobs = [studies.job("new", "cartpole10", 900, "varshare@x", seed, {}) for seed in (1, 2, 3)]
    assert studies.write_report("new", jobs, report) == "new: no run has finished yet"
    for job, last in zip(jobs[:2], (30.0, 50.0)):
        write_run(job, {450: 10.0, 900: last})
    text = studies.write_report("new", jobs, report)
    assert text.splitlines()[0] == "900 40.0"
    assert "2 runs, one core each (abacus; commit `abc`). Missing: 1 run, for example varshare, seed" in text
    Path("runs").rename("elsewhere")
    assert studies.write_report("new", jobs, report) == text
    runs, configs = read(studies.folder_of("new"))
    assert list(runs.step) == [450, 900, 900] * 2  # of what is on the way the mean only
    assert configs.command[0] == jobs[0].command
    # runs of another setting are added, runs of the same replace what was known
    other = studies.job("new", "cartpole10", 900, "varshare@y", 1, {})
    write_run(other, {900: 70.0})
    studies.write_report("new", [other], report)
    write_run(jobs[2], {900: 20.0})
    studies.write_report("new", jobs, report)
    runs, configs = read(studies.folder_of("new"))
    assert dict(runs[runs.task == "a"].groupby("setting").value.mean()) == {"x": 20.0, "y": 70.0}
    assert len(configs) == 4 and (configs.commit == "").sum() == 2


def test_noise_collects_the_mean_of_what_is_clipped_and_the_last_sigma():
    log = [(s, m, "mean", s * x) for s in (1, 3) for m, x in ((noise.CLIPPED, 0.1), (noise.SIGMA, 0.2))]
    log = pd.DataFrame(log, columns=["global_step", "metric", "task", "value"])
    rows = noise.rows_of(Run(Path(), {}, log)).set_index("metric").value
    assert rows[noise.CLIPPED] == pytest.approx(0.2) and rows[noise.SIGMA] == pytest.approx(0.6)


def test_the_door_starts_studies():
    door = ["bash", str(probes.ROOT / "benchmark.sh")]
    done = subprocess.run([*door, "ranks", "--dry-run"], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 50
