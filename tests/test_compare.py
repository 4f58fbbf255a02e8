"""`python -m bench compare` and the comparison of `report.py`: groups, tables, figures, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import probes
import pytest

import report
from bench import compare
from bench.collect import EVALUATION, Run, read_log
from bench.methods import parse_flags
from bench.statistics import difference

SMALL = "--num-steps 16 --hidden-sizes 8 --eval-episodes 1 --eval-interval-episodes 1"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(script, seed, final, finished=True, tasks=("a", "NA"), params=({}, {}), **settings):
    """A run of 100 steps, evaluated at 50 and at the end, where the tasks have final -+ 1."""
    folder = Path(f"runs/{script.replace('/', '-')}-{seed}-{'-'.join(map(str, settings.values()))}")
    folder.mkdir(parents=True)
    if finished:
        (folder / "evaluation.csv").touch()
    values = dict(zip(tasks, (final - 1, final + 1))) | {"mean": final}
    rows = []
    for step in range(10, 101, 10):
        metrics = ["charts/episodic_return"] + [EVALUATION] * (finished and step in (50, 100))
        rows += [(step, metric, task, x * step / 100) for metric in metrics for task, x in values.items()]
    log = pd.DataFrame(rows, columns=["global_step", "metric", "task", "value"])
    args = {"env_id": "some-env", "seed": seed, "beta": 0.1, "run_name": folder.name} | settings
    config = {"script": script, "args": args, "task_names": list(tasks), "task_params": list(params)}
    return Run(folder, config, log)


def test_groups_are_scripts_and_settings_and_labels_say_what_differs():
    runs = [make_run("varshare_ppo.py", seed, 1, beta=beta) for beta in (0.1, 0.2) for seed in (1, 2)]
    runs += [make_run("forks/my_idea.py", 1, 1), make_run("other/my_idea.py", 1, 1)]
    groups = compare.group_runs(runs)
    labels = ["varshare_ppo, beta 0.1", "varshare_ppo, beta 0.2", "forks/my_idea.py", "other/my_idea.py"]
    assert list(groups) == labels
    assert groups["varshare_ppo, beta 0.1"] == runs[:2]


def test_two_runs_of_one_seed_are_refused_unless_told_apart(capsys):
    runs = [make_run("a.py", 1, 1), make_run("a.py", 1, 2, exp_name="new")]
    assert list(compare.group_runs(runs)) == ["a", "a, exp_name new"]
    with pytest.raises(SystemExit):
        compare.group_runs([runs[0], runs[0]])
    assert "tell them apart by --exp-name" in capsys.readouterr().err


def test_the_table_has_means_worst_tasks_and_paired_differences():
    first, second = [5.0, 7.0, 6.0], [6.0, 8.5, 6.5]
    runs = [make_run("a.py", seed, x) for seed, x in enumerate(first, 1)]
    runs += [make_run("b.py", seed, x) for seed, x in reversed([*enumerate(second, 1)])]
    text = compare.write_comparison(runs, Path("out"))
    expected = difference(pd.Series(second), pd.Series(first))
    assert "| a | 3 | 6.0 [3.5, 8.5] | 5.0 [2.5, 7.5] |  |  |  |" in text
    assert (
        f"| b | 3 | 7.0 [3.7, 10.3] | 6.0 [2.7, 9.3] | {expected.interval.text()} | {expected.p:.2g} |"
        in text
    )
    assert "the final evaluation" in text and Path("out/compared.png").stat().st_size > 1000


def test_one_run_of_each_has_no_interval():
    text = compare.make_table(compare.group_runs([make_run("a.py", 1, 5.0), make_run("b.py", 1, 6.0)]))
    assert "| b | 1 | 6.0 [-, -] | 5.0 [-, -] | 1.0 [-, -] | nan | undecided |" in text


def test_runs_that_were_not_evaluated_are_compared_by_training_which_is_said():
    runs = [make_run(script, seed, 10.0, finished=False) for script in ("a.py", "b.py") for seed in (1, 2)]
    text = compare.make_table(compare.group_runs(runs))
    assert "| a | 2 | 9.5 [9.5, 9.5]" in text and "last tenth of training" in text
    (ax,) = compare.plot(compare.group_runs(runs)).axes
    assert "training" in ax.get_ylabel() and "steps of all tasks" in ax.get_xlabel()
    np.testing.assert_allclose(ax.lines[0].get_xydata()[-1], (100, 10))


def test_curves_are_means_over_seeds():
    runs = [make_run("a.py", seed, x) for seed, x in ((1, 4.0), (2, 8.0))]
    (ax,) = compare.plot(compare.group_runs(runs)).axes
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(50, 3), (100, 6)])


@pytest.mark.parametrize("other", [{"tasks": ("a", "b")}, {"params": ({"mass": 2}, {})}])
def test_other_tasks_are_refused(capsys, other):
    runs = [make_run("a.py", 1, 5.0), make_run("b.py", 1, 5.0, **other)]
    with pytest.raises(SystemExit) as stop:
        compare.write_comparison(runs, Path("out"))
    assert stop.value.code == 2 and "its tasks are others" in capsys.readouterr().err
    assert not Path("out").exists()


def test_names_of_tasks_are_texts_in_any_log(tmp_path):
    Path("heartbeat.csv").write_text("global_step,metric,task,value\n1,x,NA,nan\n1,x,1,2.5\n1,x,null,3\n")
    log = read_log(Path("heartbeat.csv"))
    assert log.task.tolist() == ["NA", "1", "null"]
    np.testing.assert_array_equal(log.value, [np.nan, 2.5, 3])


def bench_compare(*argv):
    environment = os.environ | {"PYTHONPATH": str(probes.ROOT), "OMP_NUM_THREADS": "1", "JOBS": "2"}
    command = [sys.executable, "-m", "bench", "compare", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_fork_is_compared_with_its_parent_in_one_command():
    Path("forks").mkdir()
    source = (probes.ROOT / "varshare_ppo.py").read_text(encoding="utf-8")
    found = f"sys.path += [{str(probes.ROOT)!r}]\n"
    fork = source.replace("from envs.metrics", f"{found}from envs.metrics", 1)
    Path("forks/my_idea.py").write_text(fork, encoding="utf-8")
    long_rollouts = SMALL.replace("--num-steps 16 ", "")  # longer than a twentieth of the run
    scripts = [f"varshare_ppo.py {long_rollouts}", f"forks/my_idea.py {SMALL} --beta 0.01"]
    where = ["--env-id", "cartpole10", "--seeds", "2", "--steps", "25600"]
    code, out, err = bench_compare(*scripts, *where)
    assert code == 0, out + err
    assert "4 runs of 25,600 steps, 2 at a time: about 1 min" in out
    table = Path("results/compare/cartpole10/compared.md").read_text(encoding="utf-8")
    assert table in out and "| varshare_ppo | 2 |" in table and "| my_idea | 2 |" in table
    again = bench_compare(*scripts, *where)  # nothing is left to run
    assert again[0] == 0 and table in again[1] and "about" not in again[1]
    folders = tuple(Path("runs").glob("compare__cartpole10__*__[12]"))
    report.main(tuple(x for x in sorted(folders) if "25600" in (x / "command").read_text()))


@pytest.mark.parametrize(
    ("scripts", "seeds", "message"),
    [
        (["no_such.py"], 3, "there is no script 'no_such.py'"),
        ([], 3, "name one or more scripts"),
        (["varshare_ppo.py"], 0, "--seeds and --steps must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(scripts, seeds, message, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.run_comparison(scripts, "cartpole10", seeds, 900_000, "")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and message in err and err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("env_id", "steps", "tried"),
    [
        ("cartpole10", 900_000, 45_000),
        ("cartpole10", 90_000, 25_000),
        ("cartpole-goals160", 900_000, 400_000),
        ("cartpole10", 9_000, 9_000),
    ],
)
def test_what_is_tried_first_is_longer_than_a_rollout(env_id, steps, tried, monkeypatch):
    started = []
    monkeypatch.setattr(compare.launch, "launch", started.extend)
    with pytest.raises(SystemExit):  # none of them has finished
        compare.say_cost(["varshare_ppo.py"], env_id, 3, steps)
    [job] = started
    assert parse_flags(job.flags)["total-timesteps"] == str(tried)


@pytest.mark.slow
def test_a_wrong_flag_stops_before_the_runs():
    code, _, err = bench_compare("varshare_ppo.py --beta -1", "--steps", "20480")
    assert code == 2 and "--beta must be positive" in err and "does not run with these flags" in err
    assert len(list(Path("runs").iterdir())) == 1
