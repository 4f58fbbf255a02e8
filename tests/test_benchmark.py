"""benchmark.sh: which runs it starts, and what it does when they crash, are killed, or go to Slurm."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import probes
import pytest
import torch

from bench import launch
from bench.__main__ import report, search
from bench.collect import parameters
from bench.methods import METHODS, parse_flags, read_methods, write_flags
from bench.suites import Suite

SMALL = "--num-steps 16 --hidden-sizes 8 --eval-episodes 1 --eval-interval-episodes 1"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
# of the suites of 1 M steps, by the door
COMPARED = set(re.search(r'^all="(.*)"$', (probes.ROOT / "benchmark.sh").read_text(), re.M)[1].split())
SETTINGS = Path("results/search/settings.csv")


def heed_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def benchmark(*argv, **variables):
    """Exit code and output of benchmark.sh in the current folder."""
    environment = os.environ | {"OUT": os.getcwd(), "PATH": PATH}
    command = ["bash", str(probes.ROOT / "benchmark.sh"), *argv]
    options = {"env": environment | variables, "text": True, "stdin": subprocess.DEVNULL}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    # a background job, as these tests may be, has SIGINT ignored, and so would have its children
    return subprocess.Popen(command, preexec_fn=heed_sigint, **pipes, **options)


def finish(process):
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def settings_of(method):
    """Some setting of its space."""
    space = METHODS[method].space.items()
    return write_flags({name: str(getattr(x, "choices", [None])[0] or x.high) for name, x in space})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, in which a search has chosen settings of every method."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # which `parse` changes
    SETTINGS.parent.mkdir(parents=True)
    suites = ("cartpole-goals10", "cartpole-goals-physics10", "lunarlander20-goals", "sac")
    rows = [(suite, method, settings_of(method)) for suite in suites for method in METHODS]
    pd.DataFrame(rows, columns=["suite", "method", "settings"]).assign(search=1).to_csv(SETTINGS, index=False)
    return tmp_path


def commands(*argv, **variables):
    """The commands of a suite as lists of words."""
    code, output = finish(benchmark(*argv, **variables))
    assert code == 0 and [path.name for path in Path().iterdir()] == ["results"], output
    return [shlex.split(line) for line in output.splitlines()]


def option(command, name):
    return command[command.index(name) + 1]


def parse(command):
    """The script of a command and its settings, which it accepts."""
    script = probes.load_script(str(Path(command[1]).relative_to(probes.ROOT)))
    args = probes.parse(script, *command[2:])
    script.check(args)
    return script, args


def as_flag(value):
    """A setting as in a space: (64, 64) is "64 64", 0.0 is "0"."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_methods_are_scripts_with_settings_that_they_have():
    controls = read_methods(probes.ROOT / "studies/posterior/methods.csv")
    for method in (METHODS | controls).values():
        assert (probes.ROOT / method.script).is_file() and method.title and method.what
        assert not method.parent or (probes.ROOT / method.parent).is_file()
        script = probes.load_script(method.script)
        args, agent = script.Args(), script.Agent(probes.spaces(), probes.settings(script), torch.Generator())
        own = [x for name, x in agent.named_parameters() if name in agent.per_task]
        counted = sum(x[0].numel() for x in own), sum(x.numel() for x in agent.parameters())
        assert parameters(agent.state_dict()) == counted
        for name in (*method.flags, *method.space):
            assert hasattr(args, name.replace("-", "_")), (method.name, name)
        for name, x in method.space.items():
            default = getattr(args, name.replace("-", "_"))
            if name in method.flags:
                default = float(method.flags[name])
            inside = as_flag(default) in x.choices if hasattr(x, "choices") else x.low <= default <= x.high
            assert inside, (method.name, name, default)
    assert {METHODS[m].family for m in COMPARED} == {"varshare", "l2soft", "rival", "blind"}


def test_a_suite_has_every_method_and_seed_with_the_settings_that_the_search_chose():
    runs = commands("commands", "cartpole-identical10")  # which takes those of cartpole-goals-physics10
    names = [option(command, "--run-name") for command in runs]
    assert len(names) == len(set(names)) == 10 * len(COMPARED)
    for command in runs[: len(COMPARED)]:
        _, args = parse(command)
        method = METHODS[args.exp_name]
        assert args.resume and args.run_name == f"cartpole-identical10__{method.name}__1"
        assert args.eval_interval == 100_000 and args.total_timesteps == 1_000_000
        for name, x in method.space.items():
            chosen = getattr(args, name.replace("-", "_"))
            assert as_flag(chosen) == x.choices[0] if hasattr(x, "choices") else chosen == x.high
    assert {option(c, "--exp-name") for c in runs} == COMPARED
    assert {option(c, "--seed") for c in runs} == {str(seed) for seed in range(1, 11)}


def test_the_committed_settings_are_accepted():
    """Those that the search chose, by today's scripts: one row for each set of flags of a script."""
    SETTINGS.unlink()
    jobs = {}
    for suite, rows in pd.read_csv(probes.ROOT / SETTINGS).groupby("suite"):
        searches, methods = int(rows.search.max()), tuple(rows.method.unique())
        for job in Suite(suite, "cartpole10", seeds=searches, searches=searches, methods=methods).jobs():
            jobs[(job.script, *parse_flags(job.flags))] = job
    assert len(jobs) > 30
    for job in jobs.values():
        parse(["python", str(probes.ROOT / job.script), *shlex.split(job.flags)])


def test_knobs():
    variables = {"METHODS": "l2soft pcgrad", "SEEDS": "2", "STEPS": "7000", "FLAGS": "--cuda --gamma 0.9"}
    runs = commands("commands", "cartpole10", **variables)
    assert len(runs) == 4 and all("--cuda" in command for command in runs)
    assert {option(command, "--exp-name") for command in runs} == {"l2soft", "pcgrad"}
    assert {option(command, "--seed") for command in runs} == {"1", "2"}
    for name, value in (("--total-timesteps", "7000"), ("--eval-interval", "700"), ("--gamma", "0.9")):
        assert {option(command, name) for command in runs} == {value}
    shorter = Suite("cartpole10", steps=1_000_000, trial_steps=500_000, length=100_000)
    assert (shorter.steps, shorter.trial_steps) == (100_000, 50_000)
    code, output = finish(benchmark("help"))
    assert code == 0 and "METHODS" in output and "set -e" not in output
    code, output = finish(benchmark("plan", "cartpole10"))
    assert code == 0 and output.startswith("cartpole10") and "0 of 100 runs done,   100 M steps" in output
    code, output = finish(benchmark("plan", "cartpole10", STEPS="7000", SEEDS="1", METHODS="l2soft"))
    assert code == 0 and "some 1 min" in output  # and never 0


def test_an_environment_of_ones_own_is_a_suite():
    code, output = finish(benchmark("plan", "my_tasks:pendulum4", METHODS="l2soft varshare"))
    assert code == 0 and output.startswith("my_tasks-pendulum4 ") and "0 of  20 runs done" in output
    assert "for a time that is not known before a run" in output
    tiny = {"STEPS": "2560", "SEEDS": "1", "METHODS": "varshare", "FLAGS": SMALL}
    with open(SETTINGS, "a") as file:
        file.write("my_tasks-pendulum4,varshare,--learning-rate 0.001,1\n")
    (command,) = commands("commands", "my_tasks:pendulum4", **tiny)
    assert option(command, "--env-id") == "my_tasks:pendulum4"
    assert option(command, "--run-name") == "my_tasks-pendulum4__varshare__1"


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        (["search", "nonsense"], {}, "unknown suite or study nonsense"),
        (["cartpole10"], {"METHODS": "nonsense"}, "unknown method nonsense, choose from varshare"),
        (["cartpole10"], {"LAUNCHER": "pbs"}, "LAUNCHER is slurm or nothing, not 'pbs'"),
        ([], {"JOBS": "abc"}, "JOBS is a number of runs at a time, not 'abc'"),
        (["search", "cartpole-goals10"], {"STORAGE": "nonsense"}, "cannot open the database nonsense"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(argv, variables, message):
    code, output = finish(benchmark(*argv, **variables))
    assert code == 2 and message in output and output.count("\n") == 1, output
    assert [path.name for path in Path().iterdir()] == ["results"]


def test_only_missing_settings_are_searched(monkeypatch):
    """A method added to a searched suite leaves the others as they are, and the project's stand behind."""
    searched = []
    monkeypatch.setattr("bench.tune.search", lambda suite, pairs, _: searched.append(pairs) or True)
    pd.read_csv(SETTINGS).query("method == 'l2soft'").to_csv(SETTINGS, index=False)
    suite = Suite("sac", methods=("l2soft", "pcgrad"))
    assert search(suite, missing=True) and search(suite)
    assert search(Suite("sac", methods=("l2soft",)), missing=True)
    assert search(Suite("cartpole10", settings="sac", methods=("pcgrad",)))
    assert searched == [[("pcgrad", 1)], [("l2soft", 1), ("pcgrad", 1)]]
    twice = Suite("sac", methods=("l2soft", "pcgrad"), searches=2)
    assert twice.missing == [("l2soft", 2), ("pcgrad", 1), ("pcgrad", 2)] and not twice.finished("l2soft")
    project = pd.read_csv(probes.ROOT / SETTINGS).query("suite == 'cartpole-goals10'")
    chosen = Suite("cartpole-goals10").chosen
    assert chosen.keys() == {*project.method} and len(project) > 1
    for row in project.itertuples():
        of = settings_of("l2soft") if row.method == "l2soft" else row.settings
        assert write_flags(chosen[row.method]) == of


TINY = {"STEPS": "2560", "SEEDS": "2", "METHODS": "hard-sharing", "FLAGS": SMALL, "JOBS": "2"}


@pytest.mark.slow
def test_a_crashed_run_is_reported_and_the_others_go_on(capsys):
    spoilt = Path("runs/cartpole10__hard-sharing__2")
    spoilt.mkdir(parents=True)
    (spoilt / "checkpoint.pt").write_text("spoilt")
    code, output = finish(benchmark("cartpole10", **TINY))
    assert code == 1
    assert f"failed: {spoilt.name} (exit code 2)" in output
    assert "checkpoint.pt cannot be read" in output  # the last line of its log
    assert "1/2 finished, 1 failed" in output
    table = Path("results/suites/cartpole10/table.md")
    assert "Missing: 1 run, for example hard-sharing, seed 2" in table.read_text()
    finished = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*__*/evaluation.csv")}
    assert len(finished) == 1

    (spoilt / "checkpoint.pt").unlink()  # mended: only this one is run again
    code, output = finish(benchmark("cartpole10", **TINY))
    assert code == 0 and "2/2 finished, 0 failed" in output
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert "Missing" not in table.read_text()
    suite = {"steps": 2560, "seeds": 2, "methods": ("hard-sharing",), "settings": "cartpole-goals-physics10"}
    job = Suite("cartpole10", **suite, flags=SMALL).job("hard-sharing", 2)
    assert job.finished and launch.run(job._replace(flags=f"{job.flags} --gamma 0.9")) == 2
    assert "has other settings than today" in capsys.readouterr().err
    for name in ("runs.csv", "configs.csv", "curves.png"):
        assert (Path("results/suites/cartpole10") / name).exists()

    first = table.read_text()  # and again from the CSVs alone
    os.rename("runs", "elsewhere")
    table.unlink()
    report(Suite("cartpole10", **suite))
    assert table.read_text() == first
    report(Suite("cartpole-goals10"))
    assert "cartpole-goals10: no run has finished yet" in capsys.readouterr().out


def alive(folder):
    """Processes below this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder and b"python" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return set(found) - {os.getpid()}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.slow
def test_an_interrupted_grid_ends_its_runs_and_continues_to_the_same_result(here):
    changes = {"STEPS": "128000", "SEEDS": "1", "FLAGS": f"{SMALL} --checkpoint-interval 0.1"}
    folder = here / "runs/cartpole10__hard-sharing__1"
    for signum, to_all in ((signal.SIGINT, False), (signal.SIGKILL, True)):
        process, before = benchmark("cartpole10", **TINY | changes), time.time()
        while not (folder / "checkpoint.pt").exists() or (folder / "checkpoint.pt").stat().st_mtime < before:
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        if to_all:  # whatever the runs belong to
            for pid in (process.pid, *alive(here)):
                os.kill(pid, signum)
        else:
            os.killpg(process.pid, signum)  # as a terminal does
        code, output = finish(process)
        while alive(here):
            time.sleep(0.05)
        assert not (folder / "evaluation.csv").exists() and not (folder / "failed").exists()
        assert to_all or (code == 130 and "the same command continues" in output)
    code, output = finish(benchmark("cartpole10", **TINY | changes))
    assert code == 0, output
    code, output = finish(benchmark("commands", "cartpole10", **TINY | changes))
    (here / "again").mkdir()
    os.chdir(here / "again")
    script, args = parse(shlex.split(output))
    probes.assert_same_runs(folder, script.train(args))


class Unsafe:
    """Like a process of multiprocessing: to start one polls all others, and a code that two poll is lost."""

    all = []

    def __init__(self, **_):
        self.polled, self.codes = threading.Lock(), iter([None, None, None, 0])

    def start(self):
        self.all.append(self)
        for process in self.all:
            _ = process.exitcode

    @property
    def exitcode(self):
        if not self.polled.acquire(blocking=False):
            self.codes = itertools.repeat(255)
            return 255
        time.sleep(0.01)
        self.polled.release()
        return next(self.codes, 0)


def test_two_threads_never_ask_for_the_exit_code_of_a_run_at_once(here, monkeypatch):
    monkeypatch.setattr(launch.server, "Process", Unsafe, raising=False)
    jobs = [launch.Job(f"run{i}", "varshare_ppo.py", "--seed 1") for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(launch.run, jobs)) == {0}


FAKE_SBATCH = """#!/bin/sh
printf "%s\\n" "$@" >>calls
echo "---" >>calls
echo "77;cluster"
"""


@pytest.mark.slow
def test_slurm_gets_one_array_job_and_a_report_after_it(here):
    (here / "bin").mkdir()
    (here / "bin/sbatch").write_text(FAKE_SBATCH)
    (here / "bin/sbatch").chmod(0o755)
    path = f"{here / 'bin'}:{PATH}"
    variables = TINY | {"LAUNCHER": "slurm", "PATH": path}

    def submit(**more):
        Path("calls").unlink(missing_ok=True)
        code, output = finish(benchmark("cartpole10", **variables | more))
        assert code == 0, output
        *calls, _ = [call.split("\n") for call in Path("calls").read_text().split("---\n")]
        return output, *calls

    output, array, report = submit()
    assert "array job 77" in output
    assert array[array.index("--array") + 1] == "1-2%2"
    assert report[report.index("--dependency") + 1] == "afterany:77"
    assert not any("partition" in word for word in array + report)
    task = {"SLURM_ARRAY_TASK_ID": "2", "PATH": path}
    wrapped = array[array.index("--wrap") + 1]
    subprocess.run(["bash", "-c", wrapped], check=True, env=os.environ | task)
    (model,) = Path("runs").glob("*__*/evaluation.csv")
    assert model.parent.name == "cartpole10__hard-sharing__2"
    wrapped = report[report.index("--wrap") + 1]
    subprocess.run(["bash", "-c", wrapped], check=True, env=os.environ | TINY | task)
    assert "Missing: 1 run," in Path("results/suites/cartpole10/table.md").read_text()

    _, array, report = submit(SBATCH="--partition=long --time=2:00:00", JOBS="")
    assert array[array.index("--array") + 1] == "1-1"  # what is left
    for call in (array, report):
        assert "--partition=long" in call and "--time=2:00:00" in call
