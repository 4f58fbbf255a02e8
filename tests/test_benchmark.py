"""benchmark.sh: which runs it starts, and what it does when they crash, are killed, or go to Slurm."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import probes
import pytest

SMALL = "--num-steps 16 --hidden-sizes 8 --eval-episodes 1"


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def heed_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def benchmark(*argv, **variables):
    """Exit code and output of benchmark.sh in the current folder."""
    environment = os.environ | {
        "OUT": os.getcwd(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", str(probes.ROOT / "benchmark.sh"), *argv]
    options = {"env": environment | variables, "text": True, "stdin": subprocess.DEVNULL}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    # a background job, as these tests may be, has SIGINT ignored, and so would have its children
    return subprocess.Popen(command, preexec_fn=heed_sigint, **pipes, **options)


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(*argv, **variables):
    """The commands of a suite as lists of words."""
    code, output = finish(benchmark(*argv, "--dry-run", **variables))
    assert code == 0 and not list(Path().iterdir())
    return [shlex.split(line) for line in output.splitlines()]


def option(command, name):
    return command[command.index(name) + 1]


def parse(command):
    """The script of a command and its settings."""
    script = probes.load_script(str(Path(command[1]).relative_to(probes.ROOT)))
    argv, sys.argv = sys.argv, command[1:]
    try:
        return script, script.parse_args(script.Args, script.ENV_DEFAULTS, script.__doc__)
    finally:
        sys.argv = argv


def test_suites_have_every_method_and_seed_with_settings_that_scripts_accept():
    runs = commands("cartpole")
    parsed = [parse(command) for command in runs[::20]]
    for script, args in parsed:
        script.check(args)
        assert args.resume and args.run_name.startswith(f"cartpole__cartpole10__{args.total_timesteps}__")
    names = [option(command, "--run-name") for command in runs]
    assert len(names) == len(set(names)) == 2 * 10 * 10
    assert {option(command, "--seed") for command in runs} == {str(seed) for seed in range(1, 11)}
    assert {option(command, "--exp-name") for command in runs[:10]} == {
        option(command, "--exp-name") for command in runs
    }
    assert all(option(c, "--eval-interval") == str(int(option(c, "--total-timesteps")) // 10) for c in runs)
    assert len(commands("identical")) == len(commands("lunarlander")) == 100
    search = commands("search")
    per_method = {}
    for command in search:
        per_method.setdefault(option(command, "--exp-name"), []).append(option(command, "--seed"))
    assert len(per_method) == 11
    sac = per_method.pop("varshare-sac")  # at the short budget only, three step sizes
    assert len(sac) == 27
    more = per_method.pop("contextual")  # of which one more value of the coefficient is tried
    assert len({len(seeds) for seeds in per_method.values()}) == 1 and len(more) > len(per_method["varshare"])
    per_method["contextual"] = more
    assert {seed for seeds in per_method.values() for seed in seeds} == set(sac) == {"101", "102", "103"}
    pairs = [(option(c, "--exp-name"), option(c, "--seed")) for c in commands("sac")]
    methods = ("task-blind", "varshare-ppo", "varshare-sac")
    assert pairs == [(method, str(seed)) for seed in range(1, 11) for method in methods]


@pytest.mark.parametrize(
    ("suite", "number"),
    [("power", 4 * 3 * 4 * 5 + 2 * 3 * 3), ("ceilings", 9), ("normalisation", 144), ("posterior", 436)],
)
def test_control_suites_have_settings_that_scripts_accept(suite, number):
    runs = commands(suite)
    assert len({option(command, "--run-name") for command in runs}) == len(runs) == number
    seen = {}
    for command in runs:
        method, _, setting = option(command, "--exp-name").partition("@")
        script = Path(command[1]).stem.removesuffix("_ppo")
        other = {"task-blind": "shared", "varshare-fixed": "varshare_fixed_sigma"}
        other |= {"varshare-shuffled": "varshare_shuffled_sigma"}
        other |= {"varshare-fixed-sac": "varshare_fixed_sigma_sac"}
        assert script == other.get(method, method.replace("-", "_"))
        seen[method, option(command, "--env-id"), setting] = command
    for (method, env, setting), command in seen.items():
        script, args = parse(command)
        script.check(args)
        assert args.env_id == env and args.total_timesteps == int(option(command, "--total-timesteps"))
        if suite == "power":
            assert args.learning_rate == float(setting) and args.eval_interval == args.total_timesteps // 10
        if suite == "normalisation":
            assert (args.norm_obs, args.norm_value) == ("obs" in setting, "value" in setting)
            if method == "varshare":  # the same penalty as L2Soft's
                penalty = args.beta / (2 * args.samples_per_task * args.sigma_prior**2)
                assert penalty == pytest.approx(0.01, rel=0.05)
        if suite == "posterior" and not method.endswith("sac"):
            penalty = 0.003
            if hasattr(args, "beta"):
                penalty = args.beta / (2 * args.samples_per_task * args.sigma_prior**2)
            assert getattr(args, "l2_coef", penalty) == pytest.approx(0.003, rel=0.01)
            acts = "sample" if setting.startswith("sample") else "mean"
            assert getattr(args, "rollout_weights", "mean") == acts
            assert (getattr(args, "reptile_alpha", 0) > 0) == setting.endswith("recentred")
    if suite == "power":
        assert {method for method, *_ in seen} == {"task-blind", "independent", "hard-sharing", "varshare"}
        without = {"lunarlander20-continuous", "cartpole-goals10-sparse"}
        assert {env for _, env, _ in seen} == set(probes.envs.ENV_IDS) - without


def test_settings_come_from_the_search():
    with open(probes.ROOT / "results/search/settings.csv") as file:
        rows = [line.strip().split(",")[:4] for line in file][1:]
    both = commands("cartpole", SEEDS="1"), commands("sac", SEEDS="1")
    grid, sac = ([" ".join(command) for command in runs] for runs in both)
    methods = {option(command, "--exp-name") for command in both[0]}
    assert {
        row[2] for row in rows if row[1] == "500000"
    } >= methods  # none is compared with its settings unsearched
    for env, steps, method, flags in rows:
        run, *_ = [run for run in grid + sac if f"__{env}__{steps}__{method}__1 " in f"{run} "]
        assert flags in run
    assert (
        next(flags for _, steps, method, flags in rows if (steps, method) == ("102400", "varshare")) in sac[1]
    )
    (longer,) = commands("cartpole", SEEDS="1", STEPS="2000000", METHODS="cagrad")
    flags = next(flags for _, steps, method, flags in rows if (steps, method) == ("500000", "cagrad"))
    assert flags in " ".join(longer)
    (recentred,) = commands("lunarlander", SEEDS="1", METHODS="varshare-recentred")
    assert option(recentred, "--reptile-alpha") == "0.1"  # not searched there, but not plain VarShare either


def test_knobs():
    runs = commands(
        "cartpole", METHODS="l2soft pcgrad", SEEDS="3 5", ENVS="CartPole-v1", STEPS="7", FLAGS="--cuda"
    )
    assert len(runs) == 4 and all("--cuda" in command for command in runs)
    assert {option(command, "--exp-name") for command in runs} == {"l2soft", "pcgrad"}
    assert {option(command, "--seed") for command in runs} == {"3", "5"}
    assert {option(command, "--env-id") for command in runs} == {"CartPole-v1"}
    for argv, variables in ((["nonsense"], {}), (["cartpole"], {"METHODS": "nonsense"})):
        code, output = finish(benchmark(*argv, **variables))
        assert code == 2 and "unknown" in output and not list(Path().iterdir())
    assert "METHODS" in finish(benchmark("help"))[1]


TINY = {"STEPS": "2560", "SEEDS": "1 2", "METHODS": "varshare", "FLAGS": SMALL, "JOBS": "2"}


def test_a_crashed_run_is_reported_and_the_others_go_on():
    spoilt = Path("runs/cartpole__cartpole10__2560__varshare__2")
    spoilt.mkdir(parents=True)
    (spoilt / "checkpoint.pt").write_text("spoilt")
    code, output = finish(benchmark("cartpole", **TINY))
    assert code == 1
    assert f"failed: {spoilt.name} (exit code 2)" in output
    assert "checkpoint.pt is not a checkpoint" in output  # the last line of its log
    assert "1/2 finished, 1 failed" in output
    assert f"Missing: 1 runs, as {spoilt.name}" in Path("results/cartpole/table.md").read_text()
    finished = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/model.pt")}
    assert len(finished) == 1

    (spoilt / "checkpoint.pt").unlink()  # mended: only this one is run again
    code, output = finish(benchmark("cartpole", **TINY))
    assert code == 0 and "2/2 finished, 0 failed" in output
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    Path("runs/other.tsv").write_text(
        Path("runs/cartpole.tsv").read_text().replace("--seed", "--gamma 0.9 --seed")
    )
    code, output = finish(benchmark("run", "runs/other.tsv", "1"))
    assert code == 1 and "has other settings than today" in output
    assert "Missing" not in Path("results/cartpole/table.md").read_text()
    for name in ("runs.csv", "configs.csv", "claims.md"):
        assert (Path("results/cartpole") / name).exists()


def alive(folder):
    """Python processes of runs below this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder and b"--run-name" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_an_interrupted_grid_ends_its_runs_and_continues_to_the_same_result(here):
    changes = {"STEPS": "256000", "SEEDS": "1", "METHODS": "hard-sharing"}
    changes["FLAGS"] = f"{SMALL} --checkpoint-interval 0.1"
    folder = here / "runs/cartpole__cartpole10__256000__hard-sharing__1"
    for signum, to_all in ((signal.SIGINT, False), (signal.SIGKILL, True)):
        process, before = benchmark("cartpole", **TINY | changes), time.time()
        while not (folder / "checkpoint.pt").exists() or (folder / "checkpoint.pt").stat().st_mtime < before:
            assert process.poll() is None
            time.sleep(0.05)
        if to_all:  # whatever the runs belong to
            for pid in (process.pid, *alive(here)):
                os.kill(pid, signum)
        else:
            process.send_signal(signum)
        code, output = finish(process)
        assert not alive(here) and not (folder / "model.pt").exists()
        assert not (folder / "failed").exists() or to_all
        assert to_all or (code == 130 and "the same command continues" in output)
    assert finish(benchmark("cartpole", **TINY | changes))[0] == 0
    (here / "again").mkdir()
    os.chdir(here / "again")
    (command,) = commands("cartpole", **TINY | changes)
    script, args = parse(command)
    probes.assert_same_runs(folder, script.train(args))


FAKE_SBATCH = """#!/bin/sh
printf "%s\\n" "$@" >>calls
echo "---" >>calls
echo "77;cluster"
"""


def test_slurm_gets_one_array_job_and_a_report_after_it(here):
    (here / "bin").mkdir()
    (here / "bin/sbatch").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >>calls\necho "---" >>calls\necho "77;cluster"\n'
    )
    (here / "bin/sbatch").chmod(0o755)
    path = f"{here / 'bin'}:{PATH}"
    variables = TINY | {"LAUNCHER": "slurm", "PATH": path}
    code, output = finish(benchmark("cartpole", **variables))
    assert code == 0 and "77" in output
    array, report, _ = [call.split("\n") for call in Path("calls").read_text().split("---\n")]
    assert array[array.index("--array") + 1] == "1-2%2"
    assert report[report.index("--dependency") + 1] == "afterany:77"
    assert not any("partition" in word for word in array + report)
    wrapped = array[array.index("--wrap") + 1]
    task = {"SLURM_ARRAY_TASK_ID": "2", "PATH": path}
    subprocess.run(["bash", "-c", wrapped], check=True, env=os.environ | task)
    line = Path("runs/cartpole.tsv").read_text().splitlines()[1]
    assert [folder.name for folder in Path("runs").iterdir() if folder.is_dir()] == [line.split("\t")[0]]
    assert (Path("runs") / line.split("\t")[0] / "model.pt").exists()
    subprocess.run(["bash", "-c", report[report.index("--wrap") + 1]], check=True, env=os.environ | task)
    assert "Missing: 1 runs" in Path("results/cartpole/table.md").read_text()

    Path("calls").unlink()
    finish(benchmark("cartpole", **variables))
    assert "1-1%2" in Path("calls").read_text()  # what is left
    Path("calls").unlink()
    finish(benchmark("cartpole", **variables | {"SBATCH": "--partition=long --time=2:00:00", "JOBS": ""}))
    array, report, _ = [call.split("\n") for call in Path("calls").read_text().split("---\n")]
    assert array[array.index("--array") + 1] == "1-1"
    for call in (array, report):
        assert "--partition=long" in call and "--time=2:00:00" in call
