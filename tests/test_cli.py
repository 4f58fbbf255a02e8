"""The command line: defaults, bad input, what is printed, signals from outside, and copies of a script."""

import inspect
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from math import inf, nan
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import probes
import pytest
import torch
from probes import parse
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from envs.settings import ENVIRONMENTS, InputError, check_args

varshare, sac = map(probes.load_script, ("varshare_ppo.py", "varshare_sac.py"))
TINY = ["--total-timesteps", "640", "--hidden-sizes", "8", "--eval-episodes", "1"]
TINY_PPO = [*TINY, "--num-steps", "8"]

pytestmark = pytest.mark.usefixtures("elsewhere")


def python(*argv, **options):
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


# Defaults


def test_every_environment_has_its_defaults_and_flags_win(script):
    table, changed = (
        ENVIRONMENTS[probes.stem(script)[-3:]],
        {"total_timesteps": 123, "gamma": 0.5, "compile": True},
    )
    assert parse(script) == parse(script, f"--env-id={script.Args.env_id}")
    own_table = getattr(script, "ENV_DEFAULTS", {})
    for env_id in {*table, *own_table}:
        common, own = table.get(env_id, {}), own_table.get(env_id, {})
        assert not common.keys() & own.keys()
        lacking = {name for name in common if not hasattr(script.Args, name)}
        assert lacking <= ({"hidden_sizes", "reward_scale", "critics"} if "brc" in script.__file__ else set())
        common = {name: x for name, x in common.items() if name not in lacking}
        expected = script.Args(env_id=env_id, **common, **own)
        assert expected != script.Args(env_id=env_id)
        assert parse(script, "--env-id", env_id) == expected
    argv = [*probes.flags(changed), "--env_id", env_id]
    assert parse(script, *argv) == script.Args(**vars(expected) | changed)


def test_every_setting_can_be_given_and_has_a_help_text(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    changes = {
        "tasks": (3, 1),
        "seed": 5,
        "load": "x",
        "cuda": True,
        "track": True,
    }
    changes |= {"hidden_sizes": (5, 6, 7)} if hasattr(script.Args, "hidden_sizes") else {}
    argv = ["--env-id", "cartpole10", *probes.flags(changes)]
    assert parse(script, *argv) == script.Args(env_id="cartpole10", **changes)
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help")
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert max(map(len, help_text.splitlines())) == 80
    help_text = help_text.replace("│", " ")  # there is a box where stdout knows the character
    headings = re.findall(r"^    # (\w+)$", inspect.getsource(script.Args), re.M)
    titles = ["options", *(f"{heading} options" for heading in [*headings, "run"])]
    assert re.findall(r"^\W*([\w ]*options)\W*$", help_text, re.M) == titles
    options = re.split(r"\n {1,3}--", help_text)  # each of one line or more
    texts = {re.split(r"[ ,\n]", text)[0]: " ".join(text.split()) for text in options}
    source = "".join(map(inspect.getsource, script.Args.__mro__[:2]))
    for name in vars(script.Args()):
        comment = re.search(rf"^    {name}: .* = .*?  # (.*)", source, re.M)
        assert comment and f" {comment[1]} (default: " in texts[name.replace("_", "-")], name


def test_every_number_has_bounds_that_are_checked(script):
    values = {"positive": (0, -1, inf, nan), "positive or 0": (-1, inf, nan), "from 0 to 1": (-0.1, 1.1, nan)}
    edges = {"positive": (1e-9,), "positive or 0": (0,), "from 0 to 1": (0, 1)}
    for name, hint in get_type_hints(script.Args, include_extras=True).items():
        default, several = getattr(script.Args, name), get_origin(hint) is tuple
        hint = get_args(hint)[0] if several else hint
        if hint in (bool, str) or get_origin(hint) is Literal or name == "tasks":  # which `make` checks
            continue
        kind, bound = get_args(hint)
        assert kind in (int, float) and (isinstance(default, kind) or several)
        for x in (v for v in values[bound] if kind is float or isinstance(v, int)):
            with pytest.raises(InputError) as refusal:
                script.check(script.Args(**{name: (8, x) if several else x}))
            assert str(refusal.value) == f"--{name.replace('_', '-')} must be {bound}, not {x}"
        for x in (v for v in edges[bound] if kind is float or isinstance(v, int)):
            check_args(script.Args(**{name: x}))


# Bad input


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of files to load, among them a tiny run of each trunk and of a baseline."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "text").write_text("no model\n")
    (folder / "bytes").write_bytes(bytes(range(256)) * 16)
    (folder / "nothing").write_bytes(b"")
    (folder / "folder").mkdir()

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    with open(folder / "pickle", "wb") as file:
        pickle.dump({"kind": "model", "agent": Code()}, file)
    torch.save({"kind": "model", "agent": Code()}, folder / "code")
    torch.save(torch.zeros(3), folder / "tensor")
    torch.save({"weights": torch.zeros(3)}, folder / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", sys.argv)
        for name in ("varshare_ppo.py", "varshare_sac.py", "baselines/cagrad_ppo.py"):
            tiny = [*TINY, "--learning-starts", "8"] if "sac" in name else TINY_PPO
            probes.main(probes.load_script(name), *tiny, "--run-name", Path(name).stem)
    return folder


def assert_refused(script, capsys, argv, message):
    """Exit code 2, one line, nothing written."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore", DeprecationWarning)  # of which users see none
        probes.main(script, *argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and not warned  # which would be on stderr too
    assert err.startswith(f"{Path(script.__file__).name}: error: ") and err.endswith("\n")
    assert err.count("\n") == 1, err
    assert message in err, err
    assert sorted(Path().rglob("*")) == before


KNOWN = "cartpole10, cartpole-identical10, cartpole-goals10, cartpole-goals10-sparse, cartpole-goals"
TOO_FEW = "--envs-per-task times --num-steps must be 2 or more and divide into --num-minibatches"
BAD = [
    ("--env-id nonsense", KNOWN),
    ("--env-id=", KNOWN),
    ("--env-id CartPole-v99", KNOWN),
    ("--env-id no_such_module:Env-v0", "no_such_module"),
    ("--env-id ..:", KNOWN),
    ("--env-id Blackjack-v1", "one-dimensional Box"),
    ("--tasks 10", "from 0 to 9"),
    ("--tasks 3 3", "different"),
    ("--tasks -1", "from 0 to 9"),
    ("--tasks 0 4 --env-workers 3", "3 processes cannot each have tasks of 2"),
    ("--env-id CartPole-v1 --tasks 1", "from 0 to 0"),
    (f"--seed {2**63}", "--seed must be below 2^63"),
    ("--num-threads 1000000", f"--num-threads must be at most {os.cpu_count()}, this machine's cores"),
    ("--hidden-sizes 64 -3", "--hidden-sizes must be positive"),
    ("--freeze-theta", "--freeze-theta needs a theta from --load"),
    ("--freeze-theta --load x --reptile-alpha 0.1", "cannot be combined with --reptile-alpha"),
    ("--capture-video --env-id RewardOfAction", "cannot build RewardOfAction"),
    ("--run-name a/b", "--run-name"),
    ("--run-name a/", "--run-name"),
    ("--run-name ..", "--run-name"),
    ("--run-name latest", "--run-name"),
]
BAD_PPO = [
    ("--num-steps 1 --envs-per-task 1 --num-minibatches 1", TOO_FEW),
    ("--num-minibatches 3", TOO_FEW),
    ("--num-minibatches 2048", TOO_FEW),
    ("--total-timesteps 10239", "less than one rollout of 10240 steps"),
    ("--noise-color 1", "--noise-color needs continuous actions, those of cartpole-goals10 are discrete"),
]
BAD_SAC = [
    ("--buffer-size 10", "--buffer-size must be at least"),
    ("--total-timesteps 1999", "--total-timesteps must be at least 2000:"),
    ("--total-timesteps 9 --learning-starts 0", "--total-timesteps must be at least 10:"),
]
CASES = [(script, *case) for script in (varshare, sac) for case in BAD]
CASES += [(varshare, *case) for case in BAD_PPO] + [(sac, *case) for case in BAD_SAC]


@pytest.mark.parametrize(("script", "argv", "message"), CASES)
def test_bad_input_is_one_line_and_nothing_is_written(capsys, script, argv, message):
    assert_refused(script, capsys, argv.split(), message)


def test_bad_input_of_a_method(capsys):
    sharing = [x for x in probes.ALL_SCRIPTS if re.search("hard_sharing|pcgrad|cagrad|moore|modular", x)]
    assert len(sharing) > 8
    for name, argv in (
        ("annealed_ppo", "--warmup 0.6 --hold 0.6"),
        ("learned_prior_ppo", "--prior-bounds 1 0.1"),
        ("baselines/moore_ppo.py", "--num-experts 8 --hidden-sizes 16 7"),
        *((name, "--hidden-sizes") for name in sharing),
    ):
        assert_refused(probes.load_script(name), capsys, argv.split(), argv.split()[0])


def test_a_file_where_a_folder_is_to_be(capsys):
    Path("runs").write_text("a file\n")
    assert_refused(varshare, capsys, [], "runs is a file")
    Path("runs").unlink()
    Path("runs").mkdir()
    Path("runs/mine").write_text("a file\n")
    for more in ([], ["--resume"]):
        assert_refused(varshare, capsys, ["--run-name", "mine", *more], "runs/mine is a file")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"args": 3}'])
def test_a_spoilt_config(capsys, text):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.json").write_text(text)
    assert_refused(varshare, capsys, ["--run-name", "mine", "--resume"], "config.json is spoilt")


def test_a_folder_is_one_process_at_a_times_and_a_signal_from_outside_stops_it(capsys):
    argv = ["--total-timesteps", "1000000000", "--checkpoint-interval", "0", "--run-name", "mine"]
    command = [sys.executable, str(probes.ROOT / "varshare_ppo.py"), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not Path("runs/mine/checkpoint.pt").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)  # else it writes, and files come and go
    assert_refused(varshare, capsys, [*argv, "--resume"], "runs/mine is in use by another process")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGINT, "")
    assert re.match("stopped.*python .*varshare_ppo.py .*--run-name mine --resume$", out.splitlines()[-1])
    assert probes.load(Path("runs/mine"), "checkpoint")["iteration"] >= 1
    assert not Path("runs/mine/model.pt").exists()
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:  # it is free again
        patch.setattr(varshare, "rollout", lambda *_: sys.exit("resumed"))
        probes.main(varshare, *argv, "--resume")
    assert stop.value.code == "resumed"


def test_tracking_needs_a_key_and_goes_to_the_project_and_entity(capsys, monkeypatch):
    wandb, calls = pytest.importorskip("wandb"), []

    def login():
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "login", login)
    assert_refused(varshare, capsys, ["--track"], "--track: No API key configured. Use `wandb login`.")
    monkeypatch.setattr(wandb, "login", lambda: True)
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options))
    probes.main(varshare, *TINY_PPO, "--track", "--wandb-entity", "team", "--run-name", "mine")
    (options,) = calls
    assert (options["project"], options["entity"], options["id"]) == ("varshare", "team", "mine")


def test_the_newest_run_is_named_and_filmed(capsys):
    tasks = ["--tasks", "3", "5", "--capture-video"]
    for name, more in (("first", []), ("second", tasks)):
        probes.main(varshare, *TINY_PPO, "--run-name", name, *more)
        assert Path("runs/latest").read_text() == f"{name}\n"
    names = json.loads(Path("runs/second/config.json").read_text())["task_names"]
    films = {film.name for film in Path("runs/second/videos").iterdir()}
    assert films == {f"{name}.{kind}" for name in (*names, "all-tasks") for kind in ("mp4", "gif")}
    assert f"film   {Path('runs/second/videos') / names[0]}.mp4" in capsys.readouterr().out
    assert not Path("runs/first/videos").exists()
    found = EventMultiplexer().AddRunsFromDirectory("runs").Reload().Runs()  # as TensorBoard does
    assert found.keys() == {"first", "second"}  # each once
    probes.main(varshare, *TINY_PPO, "--run-name", "third", "--load", "runs/latest")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(trunk, capsys):
    assert_refused(trunk, capsys, ["--cuda"], "no CUDA device")


def test_a_file_that_is_no_model(capsys, saved):
    for name in ("missing", "text", "bytes", "nothing", "folder", "pickle", "code", "tensor", "other"):
        assert_refused(varshare, capsys, ["--load", str(saved / name)], str(saved / name))
    assert not (saved / "executed").exists()


def test_a_model_that_does_not_fit(either, capsys, saved):
    run = saved / "runs" / probes.stem(either)
    assert_refused(either, capsys, ["--load", str(run / "checkpoint.pt")], "is a checkpoint, not a model")
    assert_refused(either, capsys, ["--load", str(run)], "was trained with hidden-sizes")
    other = ["--env-id", "lunarlander20", "--hidden-sizes", "8", "--no-norm-value"]
    assert_refused(either, capsys, ["--load", str(run / "model.pt"), *other], "")


@pytest.mark.parametrize(
    "argv",
    [
        "--nonsense 1",
        "nonsense",
        "--rollout-weights foo",
        "--total-timesteps 1.5",
        "--learning-rate",
        "--no-seed",
    ],
)
def test_flags_that_cannot_be_read(trunk, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        probes.main(trunk, *argv.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err and "Traceback" not in out + err
    assert not Path("runs").exists()


# Processes of their own


def test_a_real_command_line():
    """Bad input; plain lines into a pipe: every third log, the last, the evaluation, what to do next."""
    done = python(probes.ROOT / "varshare_ppo.py", "--env-id", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"varshare_ppo.py: error: unknown environment 'nonsense', .*{KNOWN}.*\n", done.stderr)
    assert not Path("runs").exists()
    done = python(probes.ROOT / "varshare_ppo.py", *TINY_PPO, "--total-timesteps", "6400")
    assert (done.returncode, done.stderr) == (0, "")
    (folder,) = Path("runs").glob("cartpole-goals10__*")
    assert re.fullmatch(r"cartpole-goals10__varshare_ppo__1__\d+", folder.name)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 + 4 + 11 + 3 and "\r" not in done.stdout
    assert lines[0].startswith("cartpole-goals10, 10 task(s): goal-1.5 goal-1.2 ")
    assert re.fullmatch(r"varshare_ppo.py on CPU, .*: parameters ([\d,]+) shared, \1 per task", lines[1])
    assert lines[2].startswith(f"6,400 steps -> {folder}; ")
    for line, step in zip(lines[3:], ("1,920", "3,840", "5,760", "6,400")):
        how_fast = r"[\d,]+ steps/s  \d\d:\d\d left"
        assert re.match(rf"step +{step}  return +(\d+\.\d|nan)  {how_fast}  tasks( (\d+|nan)){{10}}$", line)
    assert re.match(r" +mean of tasks  return +\d+\.\d \+- \d+\.\d +over tasks$", lines[17])
    assert lines[18] == f"saved  {folder}"


def test_scripts_are_imported_without_side_effects(tmp_path):
    code = f"""
import signal, sys, threading, warnings
from importlib import util
before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
sys.argv = ["x", "--nonsense"]
for i, path in enumerate({[str(probes.ROOT / name) for name in probes.ALL_SCRIPTS]}):
    spec = util.spec_from_file_location(f"script{{i}}", path)
    spec.loader.exec_module(util.module_from_spec(spec))
assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert threading.active_count() == 1
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_copy_in_another_folder_of_the_project_runs(tmp_path):
    project = tmp_path / "project"
    shutil.copytree(probes.ROOT / "envs", project / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "forks/mine").mkdir(parents=True)
    fork = shutil.copy(probes.ROOT / "varshare_ppo.py", project / "forks/mine/my_idea.py")
    for folder, path in ((project / "forks", "mine/my_idea.py"), (tmp_path, fork)):
        done = python(path, *TINY_PPO, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        (run,) = (folder / "runs").glob("cartpole-goals10__*")
        assert run.name.startswith("cartpole-goals10__my_idea__1__")
        assert json.loads((run / "config.json").read_text())["script"] == "forks/mine/my_idea.py"
