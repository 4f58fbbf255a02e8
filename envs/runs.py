"""The folder of a run, the same for every script: settings, log, checkpoint, model.

    runs/NAME/config.json     script, settings, tasks, versions, git commit, hardware
    runs/NAME/heartbeat.csv   every logged number: global_step, metric, task ("mean": all tasks), value
    runs/NAME/events.*        the same for TensorBoard
    runs/NAME/checkpoint.pt   what --resume continues from
    runs/NAME/model.pt        the trained agent; its presence says that the run is finished

What is logged and saved is the script's business; here is only how.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, make_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
MAY_DIFFER = {"run_name", "resume", "checkpoint_interval", "track"}  # between a run and its resumption


def fail(message: str) -> NoReturn:
    """Bad input: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(args_class: type, env_defaults: dict[str, dict[str, Any]], description: str | None) -> Any:
    """Read the command line into `args_class`, over the defaults of the environment it names.

    The base classes of `args_class`, last one first, are the groups of --help.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env-id", "--env_id", default=args_class.env_id)
    env_id = peek.parse_known_args()[0].env_id
    settings = asdict(args_class(**{"env_id": env_id} | env_defaults.get(env_id, {})))
    groups = {group.__name__: group for group in reversed(args_class.__bases__)}
    defaults = [group(**{f.name: settings[f.name] for f in fields(group)}) for group in groups.values()]
    grouped = make_dataclass("Groups", groups.items())
    options = {"description": description, "config": (tyro.conf.OmitArgPrefixes,)}
    parsed = tyro.cli(grouped, default=grouped(*defaults), **options)
    return args_class(**{name: x for group in vars(parsed).values() for name, x in vars(group).items()})


def check_numbers(args: Any, may_be_0: Sequence[str], at_most_1: Sequence[str]) -> None:
    """Refuse settings that are negative, not finite, 0 (but for the named) or, of the named, above 1."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        for x in value if isinstance(value, tuple) and name != "tasks" else (value,):  # make checks tasks
            if type(x) in (int, float) and not (0 < x < math.inf or (x == 0 and name in may_be_0)):
                fail(f"{flag} must be positive{' or 0' if name in may_be_0 else ''}, not {x}")
        if name in at_most_1 and value > 1:
            fail(f"{flag} must be at most 1, not {value}")
        if name == "seed" and value >= 2**63:
            fail(f"{flag} must be below 2^63, not {value}")


def check_memory(size: int, cuda: bool) -> str:
    """Refuse a replay buffer of `size` bytes that the machine, or its GPU, cannot hold; else say its size."""
    total = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * size > total:  # a checkpoint takes a copy
        needed = f"the replay buffer needs {size / 2**30:,.1f} GiB, and as much while it is saved"
        fail(f"{needed}; here are {total / 2**30:.1f}: reduce --buffer-size")
    return f"{size / 2**30:.3f} GiB"


def build(maker: Callable, *args: Any) -> Any:
    """An environment from `envs.make` or `envs.make_single`, whose complaints are about the user's input."""
    try:
        return maker(*args)
    except ValueError as error:
        fail(str(error))


def read(path: Path, kind: str) -> dict[str, Any]:
    """Load a "model" or a "checkpoint" that `Run.save` wrote; anything else is bad input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about the file, which is refused in a line anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["kind"] if isinstance(content, dict) else None
        if not all(isinstance(x, torch.Tensor) for x in content["agent"].values()) or "args" not in content:
            raise TypeError("not the content of a saved agent")
    except Exception as error:  # a file of another origin can fail in any way
        fail(f"{path} is not a {kind} of this project ({type(error).__name__})")
    if found != kind:
        fail(f"{path} is a {found}, not a {kind}")
    return content


@torch.no_grad()
def load_agent(agent: torch.nn.Module, path: Path, task_names: Sequence[str]) -> None:
    """Copy a saved model, of a run's folder or in a file, into an agent.

    Every shared tensor is copied, and of the tensors in `agent.per_task`, (task, ...), the rows of the tasks
    that the model knows by name; the rows of other tasks stay as they are.
    """
    saved = read(path / "model.pt" if path.is_dir() else path, "model")
    known = {task: row for row, task in enumerate(saved["task_names"])}
    for name, value in agent.state_dict().items():
        old, rows = saved["agent"].get(name, torch.empty(0)), name in agent.per_task
        if old.shape[rows:] != value.shape[rows:]:
            fail(f"{path} does not fit: its {name} is {list(old.shape)}, here it is {list(value.shape)}")
        if not rows:
            value.copy_(old)
        for m, task in enumerate(task_names):
            if rows and task in known:
                value[m] = old[known[task]]


class Run:
    """The folder of one run: opens it, or finds the one to resume, and writes everything in it.

    Attributes:
        folder: runs/{run_name}, by default runs/{env_id}__{exp_name}__{seed}__{time}.
        checkpoint: content of the checkpoint to continue from, None to start from the beginning.
        finished: nothing is left to do.
        stop: set by the first SIGINT or SIGTERM (then save and leave); the second ends the process.
    """

    def __init__(self, args: Any, script: str, envs: gym.vector.VectorEnv):
        """Find the folder and check it; nothing is written yet.

        Args:
            args: the script's settings, a dataclass with env_id, exp_name, seed, run_name, resume, track and
                cuda.
            script: the script's __file__.
            envs: from `envs.make`, for the tasks.
        """
        self.args, self.task_names = args, list(envs.task_names)
        self.stop: list[int] = []
        self.checkpoint: dict[str, Any] | None = None
        self.config = {
            "script": Path(os.path.relpath(script, ROOT)).as_posix(),
            "args": json.loads(json.dumps(asdict(args))),
            "task_names": self.task_names,
            "task_params": list(envs.task_params),
            "versions": {name: version(name) for name in ("torch", "gymnasium", "numpy")},
            "python": platform.python_version(),
            "git_commit": _git_commit(),
            "hardware": torch.cuda.get_device_name() if args.cuda else _cpu_name(),
        }
        self.folder = self._find_folder()
        config_file = self.folder / "config.json"
        if self.folder.exists() and not args.resume:
            fail(f"{self.folder} exists: continue it with --resume, or choose another --run-name")
        if config_file.exists():
            earlier = json.loads(config_file.read_text())["args"]
            for name, value in self.config["args"].items():
                if name not in MAY_DIFFER and earlier.get(name) != value:
                    fail(f"{self.folder} cannot be resumed: its {name} is {earlier.get(name)}, not {value}")
        self.finished = (self.folder / "model.pt").exists()
        if (self.folder / "checkpoint.pt").exists():
            self.checkpoint = read(self.folder / "checkpoint.pt", "checkpoint")

    def _find_folder(self) -> Path:
        stem = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}".replace("/", "-")
        if self.args.resume and not self.args.run_name:  # the newest of the same experiment and seed
            earlier = sorted(Path("runs").glob(f"{stem}__*/config.json"), key=lambda p: p.stat().st_mtime)
            if earlier:
                return earlier[-1].parent
        return Path("runs", self.args.run_name or f"{stem}__{int(time.time())}")

    def start(self, step: int, total_steps: int) -> None:
        """Open the folder's files at `step`, of the checkpoint or 0: what was logged later is dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "config.json").exists():
            (self.folder / "config.tmp").write_text(json.dumps(self.config, indent=2))
            os.replace(self.folder / "config.tmp", self.folder / "config.json")
        if self.args.track:
            import wandb  # a slow import that few need

            wandb.init(
                project="varshare",
                id=self.folder.name,
                resume="allow",
                config=self.config,
                sync_tensorboard=True,
            )
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.file = open(self.folder / "heartbeat.csv", "a", newline="")
        self.file.truncate(self.checkpoint["heartbeat_bytes"] if self.checkpoint else 0)
        self.csv = csv.writer(self.file)
        if not self.checkpoint:
            self.csv.writerow(("global_step", "metric", "task", "value"))
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=step, unit="step", unit_scale=True, disable=hidden)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: Any) -> None:
        if self.stop:
            os._exit(128 + signum)
        self.stop.append(signum)

    def log(self, step: int, metric: str, overall: float, per_task: Iterable[float] = ()) -> None:
        """Log a value for all tasks, and one of each task where given (NaN: none yet)."""
        rows = [(task, float(x)) for task, x in zip(self.task_names, per_task) if not math.isnan(x)]
        self.csv.writerows((step, metric, task, x) for task, x in [*rows, ("mean", float(overall))])
        self.writer.add_scalar(metric, overall, step)
        if metric.startswith(("charts/", "eval/")):  # of the rest TensorBoard gets the mean only
            for task, x in rows:
                self.writer.add_scalar(f"{metric}/{task}", x, step)

    def show(self, step: int, returns: Sequence[float]) -> None:
        """Print a line with the return of every task."""
        tasks = " ".join(f"{x:.0f}" for x in returns)
        self.bar.write(f"step {step:>9,}  return {sum(returns) / len(returns):7.1f}  tasks {tasks}")
        self.file.flush()  # for plots of a run that is going on

    def save(self, kind: str, **content: Any) -> None:
        """Write a "model" or a "checkpoint", whole or not at all."""
        self.file.flush()
        self.writer.flush()
        path = self.folder / f"{kind}.tmp"
        with open(path, "wb") as file:
            content |= {"kind": kind, "heartbeat_bytes": self.file.tell(), **self.config}
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, path.with_suffix(".pt"))

    def finish(self, returns: np.ndarray) -> None:
        """Close the files and print the final evaluation, returns (task, episode), and what to do next."""
        self.close()
        for task, x in zip([*self.task_names, "mean of tasks"], [*returns, returns.mean(1)], strict=True):
            print(f"{task:>24}  return {x.mean():8.1f} +- {x.std():.1f}")
        print(f"saved  {self.folder}")
        print(f"plots  python report.py {self.folder}\nplay   python enjoy.py {self.folder}")

    def close(self) -> None:
        """Close the files; Ctrl-C is Python's own again."""
        self.bar.close()
        self.file.close()
        self.writer.close()
        for signum, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
        ):
            signal.signal(signum, handler)


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return f"{name}, {os.cpu_count()} cores"
