"""The search: budgets, what is dropped, what is chosen, and what becomes of a search that was interrupted.

Runs are made up: a run's return is a function of its settings and its seed, and takes no time.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import probes
import pytest

from bench import launch, tune
from bench.methods import METHODS, parse_flags, parse_space, write_flags
from bench.suites import FRESH_SEEDS, SEEDS, Suite

STEPS, TRIALS = 1000, 9


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOBS", "2")
    monkeypatch.setattr(tune, "RANDOM_TRIALS", 4)
    launch.stopping.clear()
    yield tmp_path
    launch.stopping.clear()


def final_return(flags):
    """Best at a step size of 0.01; above 0.05 a run crashes."""
    rate = float(flags["learning-rate"])
    return None if rate > 0.05 else 100 - 30 * abs(np.log10(rate / 0.01)) + int(flags["seed"]) % 10


@pytest.fixture
def runs(monkeypatch):
    """Every run that is started, by its folder's name; they finish at once."""
    started = []

    def run(job):
        started.append(job)
        folder, flags = Path("runs", job.name), parse_flags(job.flags)
        folder.mkdir(parents=True, exist_ok=True)
        if (final := final_return(flags)) is None:
            (folder / "failed").write_text("1")
            return 1
        lines = ["global_step,metric,task,value"]
        steps = int(flags["total-timesteps"])
        lines += [f"{steps * i // 10},eval/episodic_return,mean,{final * i / 10}" for i in range(1, 11)]
        lines += [f"{steps},eval/success_rate,mean,{1 - final / 200}"]  # the reverse of the return's order
        (folder / "heartbeat.csv").write_text("\n".join(lines) + "\n")
        (folder / "command").write_text(job.command)
        (folder / "evaluation.csv").touch()
        return 0

    monkeypatch.setattr(launch, "run", run)
    return started


def make_suite(**changes):
    options = {"methods": ("task-blind",), "trial_steps": STEPS, "trials": TRIALS} | changes
    return Suite("suite", "cartpole10", **options)


def read(name):
    return pd.read_csv(tune.RESULTS / name)


def test_every_method_gets_the_same_steps_and_good_settings_are_found(runs):
    methods = ("task-blind", "l2soft")
    assert tune.search(make_suite(methods=methods, steps=2000, best=3))
    trials, settings = read("trials.csv"), read("settings.csv")
    for method, rows in trials.groupby("method"):
        budget = TRIALS * 3 * STEPS
        assert budget - 3 * STEPS < rows.steps.sum() <= budget, method
        assert len(rows) == TRIALS or (rows.state != "complete").any()  # dropped or crashed: room for others
        assert not rows.settings.duplicated().any()
        names = set(parse_flags(rows.settings.iloc[0]))
        assert names == set(METHODS[method].space)
    assert list(settings.method) == list(methods) and set(settings.steps) == {2000}
    for row in settings.itertuples():
        rows = trials[trials.method == row.method]
        assert row.spent == rows.steps.sum()
        assert row.complete + row.dropped + row.crashed == len(rows)
        rate = float(parse_flags(row.settings)["learning-rate"])
        assert abs(np.log10(rate / 0.01)) < 0.6  # of two decades
    of_seed = {}
    for job in runs:
        flags = parse_flags(job.flags)
        of_seed.setdefault(flags["seed"], set()).add(flags["total-timesteps"])
        assert flags["eval-interval"] == str(int(flags["total-timesteps"]) // tune.EVALUATIONS)
    assert of_seed == {str(s): {"1000"} for s in SEEDS} | {str(s): {"2000"} for s in FRESH_SEEDS[:3]}


def test_trials_are_dropped_after_whole_runs_and_crashes_are_counted(runs, monkeypatch):
    """Later trials are worse here, whatever their settings."""
    better = final_return
    monkeypatch.setattr(
        sys.modules[__name__], "final_return", lambda x: better(x) and better(x) / 1000 - len(runs)
    )
    tune.search(make_suite())
    trials = read("trials.csv")
    finals = trials[["final 1", "final 2", "final 3"]]
    assert (finals.notna().sum(axis=1) * STEPS == trials.steps)[trials.state != "crashed"].all()
    complete, dropped = (trials[trials.state == state] for state in ("complete", "dropped"))
    assert finals.loc[complete.index].notna().all(axis=None) and len(dropped)
    assert dropped.final.max() < complete.final.max()
    crashed = trials[trials.state == "crashed"]
    rates = trials.settings.map(lambda x: float(parse_flags(x)["learning-rate"]))
    assert (rates[crashed.index] > 0.05).all() and (rates[complete.index] <= 0.05).all()
    assert (crashed.steps == STEPS).all()  # the first of its seeds, which ends the trial
    assert (trials.state[: tune.RANDOM_TRIALS - 1] != "dropped").all()


def test_the_best_of_the_fresh_seeds_wins_and_of_equals_the_fastest():
    settings = pd.DataFrame({"final": [500.0, 499.0, 490.0, 400.0], "curve": [300.0, 350.0, 450.0, 480.0]})
    assert list(tune.rank(settings).index) == [1, 0, 2, 3]  # 499 is within one percent, and faster
    settings["final"] = [-50.0, -50.4, -80.0, -90.0]
    assert list(tune.rank(settings).index) == [1, 0, 2, 3]


def test_an_interrupted_search_goes_on_where_it_was(runs, monkeypatch):
    """The trial that was stopped is taken up again, and nothing of the budget is lost."""
    whole, run = make_suite(), launch.run

    def stop_at_the_tenth(job):
        if len(runs) >= 9:  # two at a time may both have been before
            launch.stopping.set()
            return 128 + signal.SIGTERM
        return run(job)

    monkeypatch.setattr(launch, "run", stop_at_the_tenth)
    with pytest.raises(SystemExit) as stop:
        tune.search(whole)
    assert stop.value.code == 130 and len(runs) in (9, 10)
    launch.stopping.clear()
    monkeypatch.setattr(launch, "run", run)
    assert tune.search(whole)
    study = tune.Search(whole, "task-blind", tune.open_storage(tune.STORAGE)).study
    failed = [t for t in study.trials if t.state.name == "FAIL" and "crashed" not in t.user_attrs]
    again = [t for t in study.trials if "failed_trial" in t.system_attrs]
    failed, again = (sorted(t.params["learning-rate"] for t in trials) for trials in (failed, again))
    assert failed and failed == again
    trials = read("trials.csv")
    assert trials.steps.sum() <= TRIALS * 3 * STEPS and not trials.settings.duplicated().any()
    before = len(runs)
    assert tune.search(whole) and len(runs) == before  # nothing is left
    pd.testing.assert_frame_equal(read("trials.csv"), trials)


@pytest.mark.slow
def test_a_trial_whose_process_died_is_taken_up_again(runs, monkeypatch, here):
    """Killed without a word: known by its missing heartbeat, here of two seconds."""
    monkeypatch.setattr(tune, "HEARTBEAT", 2)
    code = f"""
import sys
sys.path.insert(0, {str(probes.ROOT)!r})
import time
from bench import launch, tune
from bench.suites import Suite
tune.HEARTBEAT = 2
launch.run = lambda job: print("running", flush=True) or time.sleep(600)
tune.search(Suite("suite", "cartpole10", methods=("task-blind",), trial_steps={STEPS}, trials={TRIALS}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n" == process.stdout.readline()
    process.kill()
    process.wait()
    time.sleep(9)
    assert tune.search(make_suite())
    study = tune.Search(make_suite(), "task-blind", tune.open_storage(tune.STORAGE)).study
    states = [t.state.name for t in study.trials if "crashed" not in t.user_attrs]
    assert states.count("FAIL") == 2 and "RUNNING" not in states
    again = {t.system_attrs["failed_trial"]: t for t in study.trials if "failed_trial" in t.system_attrs}
    for number, t in again.items():
        assert t.params == study.trials[number].params and t.state.is_finished()
    assert len(again) == 2 and read("trials.csv").steps.sum() <= TRIALS * 3 * STEPS


@pytest.mark.parametrize(("score", "best"), [("return", "0.01"), ("success", "0.001")])
def test_a_few_step_sizes_in_place_of_a_search(runs, score, best):
    """One run each; of those that do not crash the best is chosen, and what has run does not run again."""
    methods = ("task-blind", "varshare-recentred")
    suite = make_suite(methods=methods, rates=("0.001", "0.01", "0.1"), score=score)
    assert tune.search(suite)  # one of each has crashed
    assert len(runs) == 6 and suite.steps_of_search("task-blind") == 3 * STEPS
    for job in runs:
        flags = parse_flags(job.flags)
        assert (flags["seed"], flags["eval-interval"], flags["eval-episodes"]) == ("101", "0", "20")
    settings, trials = read("settings.csv"), read("trials.csv")
    assert list(settings.method) == list(methods) and set(settings.settings) == {f"--learning-rate {best}"}
    assert (settings[["complete", "crashed", "spent"]] == [2, 1, 3 * STEPS]).all(axis=None)
    assert sorted(trials.state) == ["complete"] * 4 + ["crashed"] * 2
    final = final_return({"learning-rate": best, "seed": 101})
    assert settings.final.tolist() == [final if score == "return" else pytest.approx(100 - final / 2)] * 2
    assert tune.search(suite) and len(runs) == 6
    assert make_suite(methods=methods).chosen["task-blind"] == {"learning-rate": best}


def test_independent_searches_of_trials_by_the_dimension(runs):
    """They share no seed; each has so many trials for each setting; reported seeds are dealt out to them."""
    options = {"methods": ("task-blind", "l2soft"), "searches": 3, "trials": 1, "per_dimension": True}
    suite = make_suite(**options, trial_seeds=2, best=2, steps=STEPS, seeds=7, first_seed=1001)
    assert tune.search(suite)
    trials, settings = read("trials.csv"), read("settings.csv")
    assert list(zip(settings.method, settings.search)) == suite.pairs and len(suite.pairs) == 6
    for (method, _), rows in trials.groupby(["method", "search"]):
        budget = len(METHODS[method].space) * 2 * STEPS
        assert budget - 2 * STEPS < rows.steps.sum() <= budget
    assert trials.groupby("search").settings.agg(set).agg(lambda x: len(set.union(*x))) == len(trials)
    assert {parse_flags(job.flags)["seed"] for job in runs} == {
        str(20 * i + seed) for i in range(3) for seed in (101, 102, 111, 112)
    }
    suite = make_suite(**options, steps=STEPS, seeds=7, first_seed=1001)
    jobs = [job for job in suite.jobs() if "l2soft" in job.name]
    found = settings[settings.method == "l2soft"].set_index("search").settings
    for i, job in enumerate(jobs):
        flags = parse_flags(job.flags)
        assert (flags["seed"], flags["exp-name"]) == (str(1001 + i), f"l2soft@{i % 3 + 1}")
        assert parse_flags(found[i % 3 + 1]).items() <= flags.items()


def test_what_a_suite_fixes_is_not_searched(runs):
    options = {"methods": ("hard-sharing",), "trials": 2, "per_dimension": True, "trial_seeds": 1, "best": 1}
    suite = make_suite(**options, fixed="--hidden-sizes 64 64")
    assert tune.search(suite)
    assert suite.trials_of("hard-sharing") == 2 * (len(METHODS["hard-sharing"].space) - 1)
    for text in read("trials.csv").settings:
        assert {*parse_flags(text)} == METHODS["hard-sharing"].space.keys() - {"hidden-sizes"}
    assert {parse_flags(job.flags)["hidden-sizes"] for job in runs} == {"64 64"}
    brc = make_suite(methods=("brc-sac",), fixed=suite.fixed)  # which has no such flag
    assert "hidden-sizes" not in brc.complete("brc-sac", {}) and "hidden-sizes" in brc.complete("pcgrad", {})


def test_a_step_size_chosen_anew_for_the_settings_of_another_suite(runs):
    assert tune.search(make_suite(searches=1))
    first = make_suite().chosen["task-blind"]
    suite = Suite("many", "cartpole10", methods=("task-blind",), rates=("0.003", "0.02"), base="suite")
    before = len(runs)
    assert tune.search(suite) and len(runs) == before + 2
    for job, rate in zip(sorted(runs[before:], key=lambda job: job.flags), ("0.003", "0.02")):
        assert parse_flags(job.flags).items() >= (first | {"learning-rate": rate}).items()
    suite = Suite("many", "cartpole10", methods=("task-blind",), rates=("0.003", "0.02"), base="suite")
    (job, *_) = suite.jobs()
    assert parse_flags(job.flags).items() >= (first | {"learning-rate": "0.02"}).items()
    with pytest.raises(SystemExit):
        Suite("many", "cartpole10", methods=("l2soft",), base="suite").found_at_base("l2soft")


def test_spaces_and_flags_are_read_as_they_are_written():
    space = parse_space("learning-rate 0.001..0.1 log; cagrad-c 0.1..0.9; embedding-size 2|4")
    rate = space["learning-rate"]
    assert (rate.low, rate.high, rate.log) == (1e-3, 0.1, True)
    assert not space["cagrad-c"].log and space["embedding-size"].choices == ("2", "4")
    assert parse_space("hidden-sizes 64 64|216 216")["hidden-sizes"].choices == ("64 64", "216 216")
    assert parse_space("") == {} and parse_flags("") == {}
    for text in ("--beta 0.1", "--norm-obs", "--tasks 0 1 --cuda --exp-name a@b"):
        assert write_flags(parse_flags(text)) == text


def test_runs_that_another_process_has_begun_are_waited_for(monkeypatch):
    calls = []

    def run(job):
        calls.append(job.name)
        if job.name == "a" and calls.count("a") < 3:
            return launch.BUSY
        (Path("runs") / job.name).mkdir(parents=True)
        for name, text in (("evaluation.csv", ""), ("command", job.command)):
            (Path("runs") / job.name / name).write_text(text)
        return 0

    monkeypatch.setattr(launch, "run", run)
    assert launch.launch([launch.Job(name, "script.py", "") for name in "abc"])
    assert calls.count("a") == 3 and calls.count("b") == calls.count("c") == 1
