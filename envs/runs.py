"""The folder of a run, the same for every script: settings, log, checkpoint, model.

    runs/NAME/config.json     script, settings, tasks, versions, git commit, hardware
    runs/NAME/heartbeat.csv   every logged number: global_step, metric, task ("mean": all tasks), value
    runs/NAME/events.*        the same for TensorBoard
    runs/NAME/checkpoint.pt   what --resume continues from
    runs/NAME/model.pt        the trained agent; its presence says that the run is finished
    runs/latest               a link to the newest

What is logged and kept is the script's business; here is only how.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import make
from envs.evaluation import Evaluation, evaluate, spread_seeds
from envs.types import BOUNDS
from envs.vector import final_success
from envs.video import open_stages, record, save_films

ROOT = Path(__file__).resolve().parents[1]
MAY_DIFFER = {"run_name", "resume", "checkpoint_interval", "track", "capture_video"}
MAY_DIFFER |= {"wandb_project_name", "wandb_entity"}  # between a run and its resumption
FORMAT = 3  # of models and checkpoints
LOGS = 50  # of a run, at most; every third is printed


def fail(message: str) -> NoReturn:
    """Bad input: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(args_class: type, env_defaults: dict[str, dict[str, Any]], description: str | None) -> Any:
    """Read the command line into `args_class`, over the defaults of the environment it names."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env-id", "--env_id", default=args_class.env_id)
    env_id = peek.parse_known_args()[0].env_id
    default = args_class(**{"env_id": env_id} | env_defaults.get(env_id, {}))
    return tyro.cli(args_class, default=default, description=description)


def check_args(args: Any) -> None:
    """Refuse settings of any script that make no sense, such as numbers beyond the bounds of their type."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        if isinstance(value, tuple):
            hint = get_args(hint)[0]
        for bound in getattr(hint, "__metadata__", ()):
            for x in value if isinstance(value, tuple) else (value,):
                if not BOUNDS[bound](x):
                    fail(f"--{name.replace('_', '-')} must be {bound}, not {x}")
    if args.seed >= 2**63:
        fail(f"--seed must be below 2^63, not {args.seed}")
    if args.num_threads > os.cpu_count():
        fail(f"--num-threads must be at most {os.cpu_count()}, this machine's cores, not {args.num_threads}")
    if args.run_name in (".", "..", "latest") or Path(args.run_name).name != args.run_name:
        fail(f"--run-name is the name of a folder below runs/, not {args.run_name!r}")
    if getattr(args, "freeze_theta", False):
        if not args.load:
            fail("--freeze-theta needs a theta from --load")
        if getattr(args, "reptile_alpha", 0):
            fail("--freeze-theta goes without --reptile-alpha, which moves theta: --reptile-alpha 0")
    if getattr(args, "clip_vloss", False) and args.norm_value:
        fail("--clip-vloss goes with --no-norm-value only: what it clips around would be in other units")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: PyTorch finds no CUDA device")
    if args.track:
        log_in()


def log_in() -> None:
    """To Weights & Biases, or refuse."""
    import wandb  # a slow import that few need

    try:
        wandb.login()
    except wandb.errors.Error as error:
        fail(f"--track: {' '.join(str(error).split())}")


def build(maker: Callable, *args: Any) -> Any:
    """An environment from `envs.make` or `envs.make_single`, whose complaints are about the user's input."""
    try:
        return maker(*args)
    except ValueError as error:
        fail(str(error))


def set_up_torch(args: Any) -> torch.device:
    """Number of threads, device and compiler, by args.num_threads, args.cuda and args.compile."""
    torch.set_num_threads(args.num_threads)
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # torch.compile takes in torch.autograd.grad
    torch.empty(8_000_000)  # having freed 32 MB, glibc no longer returns every large block to the system
    return torch.device("cuda" if args.cuda else "cpu")


def read(path: Path, kind: str) -> dict[str, Any]:
    """Load a "model" or a "checkpoint" that `Run` wrote; anything else is bad input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about the file, which is refused in a line anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError("not the content of a saved agent")
        found = content["kind"]
        if "script" in content and content.get("format") != FORMAT:
            fail(f"{path} is of an earlier version of this project")
        if not all(isinstance(x, Tensor) for x in content["agent"].values()) or "args" not in content:
            raise TypeError("not the content of a saved agent")
    except Exception as error:  # a file of another origin can fail in any way
        fail(f"{path} is not a {kind} of this project ({type(error).__name__})")
    if found != kind:
        fail(f"{path} is a {found}, not a {kind}")
    return content


@torch.no_grad()
def load_agent(agent: torch.nn.Module, args: Any, task_names: Sequence[str]) -> None:
    """Copy the saved model --load, of a run's folder or in a file, into an agent.

    Every shared tensor is copied, and of the tensors and modules in `agent.per_task`, (task, ...), the rows
    of the tasks that the model knows by name; the rows of other tasks stay as they are.
    """
    path = Path(args.load)
    saved = read(path / "model.pt" if path.is_dir() else path, "model")
    for flag in ("norm_obs", "norm_value", "norm_critic"):
        if (theirs := saved["args"].get(flag, False)) != getattr(args, flag, False):
            name = flag.replace("_", "-")
            how, cure = ("with", f"--{name}") if theirs else ("without", f"--no-{name}")
            fail(f"{path} was trained {how} --{name}: add {cure}")
    known = {task: row for row, task in enumerate(saved["task_names"])}
    for name, value in agent.state_dict().items():
        rows = name.partition(".")[0] in agent.per_task
        old = saved["agent"].get(name, torch.empty(0))
        if old.shape[rows:] != value.shape[rows:]:
            fail(f"{path} does not fit: its {name} is {list(old.shape)}, here it is {list(value.shape)}")
        if not rows:
            value.copy_(old)
        for m, task in enumerate(task_names):
            if rows and task in known:
                value[m] = old[known[task]]


class Episodes:
    """Returns, lengths and successes of the training episodes of each task, between two logs.

    Attributes:
        latest: (3, task), their means at the latest log with an episode of the task; NaN before, and where
            environments report no success.
    """

    def __init__(self, envs: gym.vector.VectorEnv):
        # since the last log: returns, lengths, successes, number of episodes
        self.sums = np.zeros((4, envs.num_envs))
        self.latest = np.full((3, envs.num_tasks), np.nan)

    def add(self, infos: dict[str, Any]) -> None:
        """Count the episodes that ended in a step of `envs.vector.TaskVectorEnv`."""
        if "final_info" in infos:
            ended, episode = infos["_final_info"], infos["final_info"]["episode"]
            for total, x in zip(self.sums, (episode["r"], episode["l"], final_success(infos), 1)):
                total += np.where(ended, x, 0)

    def means(self) -> np.ndarray:
        """Mean return, length and success (3, task) since the last call, NaN where no episode ended."""
        *sums, number = self.sums.reshape(4, len(self.latest[0]), -1).sum(2)
        new = number > 0
        self.latest[:, new] = np.stack(sums)[:, new] / number[new]
        self.sums[:] = 0
        return np.where(new, self.latest, np.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"sums": torch.from_numpy(self.sums), "latest": torch.from_numpy(self.latest)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.sums[:], self.latest[:] = state["sums"].numpy(), state["latest"].numpy()


class Means:
    """Running means of what an update says to log, between two logs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, stats: dict[str, Tensor]) -> None:
        """Count the numbers of one update."""
        self.count += 1
        self.sums = {name: self.sums[name].to(x) + x if name in self.sums else x for name, x in stats.items()}

    def pop(self) -> dict[str, Tensor]:
        """The means since the last call; empty where there was no update."""
        means = {name: x / self.count for name, x in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint."""
        return {"count": self.count, **self.sums}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """From a checkpoint."""
        self.sums = dict(state)
        self.count = self.sums.pop("count")


class Run:
    """The folder of one run: opens it, or finds the one to resume, and writes everything in it.

    In this order: `keep` what a checkpoint holds, `reset` the environments, loop over `iterations`, in which
    `log` goes to the current `global_step`, and `finish`.

    Attributes:
        folder: runs/{run_name}, by default runs/{env_id}__{exp_name}__{seed}__{time}.
        checkpoint: content of the checkpoint to continue from, None to start from the beginning.
        finished: nothing is left to do.
        global_step: environment steps, all tasks together, at the end of the current iteration.
        log_due, eval_due: whether the current iteration is one to log, to evaluate after.
    """

    def __init__(self, args: Any, script: str, envs: gym.vector.VectorEnv):
        """Find the folder and check it; nothing is written yet.

        Args:
            args: the script's settings, a dataclass with env_id, exp_name, seed, run_name, resume, track,
                checkpoint_interval and cuda.
            script: the script's __file__.
            envs: from `envs.make`, for the tasks.
        """
        self.args, self.task_names = args, list(envs.task_names)
        self.kept: dict[str, Any] = {}
        self.stop: list[int] = []  # signals received: the first saves and leaves, the second ends the process
        self.iteration, self.seconds = 0, 0.0
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
        for path in (self.folder.parent, self.folder):
            if path.exists() and not path.is_dir():
                fail(f"{path} is a file, where a folder is to be")
        if self.folder.exists() and not args.resume:
            fail(f"{self.folder} exists: continue it with --resume, or choose another --run-name")
        if config_file.exists():
            try:
                earlier = dict(json.loads(config_file.read_text())["args"])
            except (ValueError, TypeError, KeyError):
                fail(f"{config_file} is spoilt: move the folder away to start anew")
            if unknown := self.config["args"].keys() - earlier.keys():
                fail(f"{self.folder} cannot be resumed: it is of a version without {min(unknown)}")
            for name, value in self.config["args"].items():
                if name not in MAY_DIFFER and earlier.get(name) != value:
                    fail(f"{self.folder} cannot be resumed: its {name} is {earlier.get(name)}, not {value}")
        self.finished = (self.folder / "model.pt").exists()
        if self.finished:
            print(f"{self.folder} is finished")
        elif (self.folder / "checkpoint.pt").exists():
            self.checkpoint = read(self.folder / "checkpoint.pt", "checkpoint")
            if lost := {"iteration", "seconds", "envs", "heartbeat_bytes"} - self.checkpoint.keys():
                fail(f"{self.folder / 'checkpoint.pt'} does not fit: it has no {min(lost)}")
            self.iteration, self.seconds = self.checkpoint["iteration"], self.checkpoint["seconds"]
        self.stages = []
        if args.capture_video:
            self.stages = build(open_stages, args.env_id, args.tasks or range(len(self.task_names)))
        self.lock = FileLock(self.folder / "lock")
        if self.folder.exists() and not self.finished:
            self._acquire_lock()

    def _acquire_lock(self) -> None:
        """Of the folder, which one process at a time writes in; it falls with the process."""
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            fail(f"{self.folder} is in use by another process")

    def _find_folder(self) -> Path:
        stem = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}".replace("/", "-")
        if self.args.resume and not self.args.run_name:  # the newest of the same experiment and seed
            earlier = sorted(Path("runs").glob(f"{stem}__*/config.json"), key=lambda p: p.stat().st_mtime)
            if earlier:
                return earlier[-1].parent
        return Path("runs", self.args.run_name or f"{stem}__{int(time.time())}")

    def keep(self, **things: Any) -> None:
        """Say what a checkpoint holds; where there is one, bring it back, in place.

        Args:
            things: agent, the module that a model consists of; tensors, generators, what has a state_dict.
        """
        self.kept |= things
        self.theta_start = getattr(things.get("agent"), "theta", torch.empty(0)).detach().clone()
        for name, x in things.items() if self.checkpoint else ():
            try:
                state = self.checkpoint.pop(name)  # which may be large
                if isinstance(x, Tensor):
                    x.copy_(state)
                else:
                    getattr(x, "load_state_dict", getattr(x, "set_state", None))(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                fail(f"{self.folder / 'checkpoint.pt'} does not fit: {name} ({' '.join(str(error).split())})")

    def reset(self, envs: gym.vector.VectorEnv, *of_episodes: Tensor) -> np.ndarray:
        """The environments' first observations (n, obs).

        After a resumption those that follow the last step before it, or, where environments cannot be saved,
        those of new episodes; of_episodes, sums over the running episodes, are then set to 0.
        """
        self.envs = envs
        state = self.checkpoint["envs"] if self.checkpoint else None
        if state is not None:
            try:
                return envs.set_state(state)
            except ValueError as error:
                fail(f"{self.folder / 'checkpoint.pt'} does not fit: {error}")
        for x in of_episodes:
            x.zero_()
        stream = 1 + self.iteration if self.checkpoint else 0  # 1 is the evaluation's
        return envs.reset(seed=spread_seeds(self.args.seed, stream, envs.num_envs))[0]

    def iterations(self, num_iterations: int, steps: int) -> Iterator[int]:
        """Yield the numbers of the iterations, of `steps` environment steps each, from 1 or the checkpoint.

        Between two of them a checkpoint is saved if it is time, and the run ends if a signal came or a kept
        number is not finite.
        """
        self._open(self.iteration * steps, num_iterations * steps)
        log_interval, first = math.ceil(num_iterations / LOGS), self.iteration + 1
        self.last_time = last_save = time.perf_counter()
        for self.iteration in range(first, num_iterations + 1):
            last = self.iteration == num_iterations
            self.global_step = self.iteration * steps
            self.log_due = last or self.iteration % log_interval == 0
            self.show_due = last or self.iteration % (3 * log_interval) == 0
            self.eval_due = not last and self._passes(self.args.eval_interval, steps)
            yield self.iteration
            self.bar.update(steps)
            if self.log_due or self.eval_due:
                self._flush()
            if self.iteration == first:
                gc.freeze()  # what lives now stays: a full collection would go through it for 0.1 s
                self.start_clock()
            now = time.perf_counter()
            save_due = last or bool(self.stop) or now - last_save >= self.args.checkpoint_interval
            if (self.log_due or save_due) and not self._is_finite():
                self.close()
                sys.exit(
                    f"{self.folder}: NaN or infinite by step {self.global_step}; earlier checkpoints stay"
                )
            if save_due:
                self.seconds, self.last_time, last_save = self._wall_time(), now, now
                state = {name: _state(x) for name, x in self.kept.items()}
                progress = {"iteration": self.iteration, "seconds": self.seconds}
                self._save("checkpoint", **progress, **state, envs=self.envs.get_state())
            if save_due and self.stop:  # else the signal came since the line above: the next one saves
                self.close()
                resume = f"--resume --run-name {self.folder.name}"
                print(f"stopped at step {self.global_step}: continue with {resume}")
                sys.exit(128 + self.stop[0])

    def _passes(self, interval: int, steps: int) -> bool:
        """Whether the last `steps` steps have passed a multiple of the interval, 0 for none."""
        return interval > 0 and self.global_step // interval > (self.global_step - steps) // interval

    def _open(self, step: int, total_steps: int) -> None:
        """Open the folder's files at `step`, of the checkpoint or 0: what was logged later is dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire_lock()  # again, where it was there before
        _link(self.folder.parent / "latest", self.folder.name)
        if not (self.folder / "config.json").exists():
            (self.folder / "config.tmp").write_text(json.dumps(self.config, indent=2))
            os.replace(self.folder / "config.tmp", self.folder / "config.json")
        if self.args.track:
            import wandb  # a slow import that few need

            wandb.init(
                project=self.args.wandb_project_name,
                entity=self.args.wandb_entity or None,
                id=self.folder.name,
                resume="allow",
                config=self.config,
                sync_tensorboard=True,
            )
        self.writer, self.scalars = SummaryWriter(str(self.folder), purge_step=step + 1), []
        self.file = open(self.folder / "heartbeat.csv", "a", newline="")
        self.file.truncate(self.checkpoint["heartbeat_bytes"] if self.checkpoint else 0)
        self.file.seek(
            0, os.SEEK_END
        )  # truncating leaves the position, which a checkpoint stores, where it was
        self.csv = csv.writer(self.file)
        if not self.checkpoint:
            self.csv.writerow(("global_step", "metric", "task", "value"))
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=step, unit="step", unit_scale=True, disable=hidden)
        self.global_step = step
        self.start_clock()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: Any) -> None:
        if self.stop:
            os._exit(128 + signum)
        self.stop.append(signum)

    def _is_finite(self) -> bool:
        """Of all tensors kept, but for the statistics of episodes, where NaN says that there was none yet."""
        states = [_state(x) for x in self.kept.values() if not isinstance(x, Episodes)]
        values = [x for state in states for x in (state.values() if isinstance(state, dict) else [state])]
        return all(x.isfinite().all() for x in values if isinstance(x, Tensor))

    def start_clock(self) -> None:
        """Steps per second are counted from here: `iterations` calls it after the first, which compiles."""
        self.clock = self.global_step, time.perf_counter()

    def _wall_time(self) -> float:
        """Seconds of training, interruptions left out."""
        return self.seconds + time.perf_counter() - self.last_time

    def log(self, metric: str, overall: float, per_task: Iterable[float] = ()) -> None:
        """Log a value for all tasks, and one of each task where given (NaN: none yet), at `global_step`."""
        rows = [(task, float(x)) for task, x in zip(self.task_names, per_task) if not math.isnan(x)]
        self.csv.writerows((self.global_step, metric, *row) for row in [*rows, ("mean", float(overall))])
        self.scalars.append(Summary.Value(tag=metric, simple_value=overall))
        if metric.startswith(("charts/", "eval/")):  # of the rest TensorBoard gets the mean only
            self.scalars += [Summary.Value(tag=f"{metric}/{task}", simple_value=x) for task, x in rows]

    def _flush(self) -> None:
        """Write what was logged; TensorBoard gets all of it at once, as every event costs 0.1 ms."""
        self.writer.file_writer.add_summary(Summary(value=self.scalars), self.global_step)
        self.scalars = []
        self.file.flush()  # for plots of a run that is going on

    def log_tasks(self, metric: str, x: Tensor) -> None:
        """Log a value of each task (task,), and their mean."""
        self.log(metric, x.mean().item(), x.tolist())

    def log_explained_variance(self, values: Tensor, returns: Tensor) -> None:
        """Log 1 - Var(returns - values) / Var(returns), (task, sample); for all tasks of summed variances."""
        unexplained, variance = (returns - values).var(1), returns.var(1)
        overall = 1 - unexplained.sum() / variance.sum()
        self.log("losses/explained_variance", overall.item(), (1 - unexplained / variance).tolist())

    def log_sharing(self, theta: dict[str, Tensor], mu: dict[str, Tensor], group: str = "varshare") -> None:
        """Log |theta|, |theta - theta_0|, |mu_m|, and of every layer |theta|^2 / (|theta|^2 + |mu_m|^2).

        The latter, its sharing ratio, is for all tasks with mean_m |mu_m|^2. As theta + c with mu_m - c is
        the same network, theta is measured as theta + mean_m(mu_m), and mu_m as mu_m - mean_m(mu_m); but
        where theta is frozen.

        Args:
            theta, mu: weights by name, of all tasks (1, ...) and of each (task, ...). Where mu has factors
                "layer.B" and "layer.A" in place of "layer.weight" they are multiplied, without being formed.
            group: what the names of the metrics begin with.
        """
        start = self.theta_start.to(next(iter(theta.values()))).split([x.numel() for x in theta.values()])
        products: dict[str, Tensor] = {}  # of theta, theta_0, mu_1, ... with each other, by layer
        for (name, x), x0 in zip(theta.items(), start):
            layer = name.rpartition(".")[0] or name
            shared = torch.cat((x.flatten(1), x0.unsqueeze(0))).double()
            own = (mu[name],) if name in mu else (mu[f"{layer}.B"], mu[f"{layer}.A"])
            products[layer] = products.get(layer, 0) + _inner_products(shared, *(y.double() for y in own))
        free = not getattr(self.args, "freeze_theta", False)
        tasks = len(next(iter(products.values()))) - 2
        change = torch.eye(2 + tasks, dtype=torch.float64)  # to theta + mean, theta_0, mu_1 - mean, ...
        change[0, 2:] += free / tasks
        change[2:, 2:] -= free / tasks
        products = {layer: change @ x.cpu() @ change.T for layer, x in products.items()}
        total = sum(products.values())
        theta_norm, _, *mu_norms = total.diagonal().clamp(min=0).sqrt().tolist()
        self.log(f"{group}/theta_norm", theta_norm)
        if not self.args.load:  # else what a resumed run started from is not at hand
            moved = total[0, 0] - 2 * total[0, 1] + total[1, 1]
            self.log(f"{group}/theta_moved", moved.clamp(min=0).sqrt().item())
        self.log(f"{group}/mu_norm", sum(mu_norms) / len(mu_norms), mu_norms)
        for layer, x in products.items():
            theta2, _, *mu2 = x.diagonal().clamp(min=0).tolist()
            overall = theta2 / (theta2 + sum(mu2) / len(mu2))
            self.log(f"{group}/sharing_ratio/{layer}", overall, [theta2 / (theta2 + x) for x in mu2])

    def log_sigma(self, theta: dict[str, Tensor], sigma: dict[str, Tensor], live: dict[str, Tensor]) -> None:
        """Log sigma among live weights: its median, per task, and quantiles of every layer, all tasks pooled.

        A weight is dead for a task if it had no gradient in the last update (PPO: all minibatches over a
        rollout, SAC: one), behind or before a ReLU that is off at all samples: nothing determines it, and it
        would blur the quantiles. The share of dead weights is logged too.

        Args:
            theta, sigma, live: weights by name, of all tasks (1, ...) and of each (task, ...).
        """
        sigmas, lives = _by_layer(sigma), _by_layer(live)
        rows = zip(torch.cat([*sigmas.values()], 1), torch.cat([*lives.values()], 1))
        median = torch.stack([x[on if on.any() else ...].median() for x, on in rows])  # all, before an update
        self.log_tasks("varshare/sigma", median)
        size = torch.cat([x.flatten() for x in theta.values()]).abs().median()
        self.log_tasks("varshare/sigma_over_theta", median / size)
        for layer, x in sigmas.items():
            on = lives[layer]
            among = x[on if on.any() else ...].cpu().numpy()  # NumPy's quantile takes any number
            for q, value in zip((1, 50, 99), np.quantile(among, (0.01, 0.5, 0.99))):
                self.log(f"varshare/sigma_q{q}/{layer}", value)
            self.log_tasks(f"varshare/dead/{layer}", 1 - on.float().mean(1))

    def log_charts(self, episodes: Episodes, learning_rate: float) -> None:
        """Log, and print some of the time, how far the run has come."""
        names = ("episodic_return", "episodic_length", "success_rate")
        for name, new, latest in zip(names, episodes.means(), episodes.latest):
            if name != "success_rate":
                self.log(f"charts/{name}", latest.mean(), new)
            elif not np.isnan(latest).all():  # few environments report it
                self.log(f"charts/{name}", np.nanmean(latest), new)
        step, start = self.clock
        self.log("charts/SPS", (self.global_step - step) / (time.perf_counter() - start))
        self.log("charts/wall_time", self._wall_time())
        self.log("charts/learning_rate", learning_rate)
        if self.show_due:
            returns = episodes.latest[0]
            line = f"step {self.global_step:>9,}  return {returns.mean():7.1f}"
            if not np.isnan(episodes.latest[2]).all():
                line += f"  success {np.nanmean(episodes.latest[2]):4.0%}"
            self.bar.write(f"{line}  tasks {' '.join(f'{x:.0f}' for x in returns)}")

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """What takes place here counts neither for steps per second nor as wall time."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.clock, self.last_time = (self.clock[0], self.clock[1] + spent), self.last_time + spent

    def evaluate(self, episodes: int) -> Evaluation:
        """Log an evaluation of the agent kept, so many episodes of each task, outside the clock."""
        args = self.args
        with self.stopped_clock():
            envs = make(args.env_id, episodes, args.tasks or None)
            played = evaluate(self.kept["agent"], envs, args.seed)
            envs.close()
        self.log("eval/episodic_return", played.returns.mean(), played.returns.mean(1))
        self.log("eval/episodic_length", played.lengths.mean(), played.lengths.mean(1))
        successes = played.successes.mean(1)
        if not np.isnan(successes).all():  # few environments report it
            self.log("eval/success_rate", np.nanmean(successes), successes)
        return played

    def _save(self, kind: str, **content: Any) -> None:
        """Write a "model" or a "checkpoint", whole or not at all."""
        self.writer.flush()
        path = self.folder / f"{kind}.tmp"
        with open(path, "wb") as file:
            content |= {"kind": kind, "format": FORMAT, "heartbeat_bytes": self.file.tell(), **self.config}
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, path.with_suffix(".pt"))

    def finish(self) -> Path:
        """Evaluate for the last time, save the model, print both and what to do next; returns the folder."""
        played = self.evaluate(self.args.eval_episodes)
        self._flush()
        self._save("model", agent=self.kept["agent"].state_dict())
        films = self._film() if self.stages else []
        self.close()
        reported = not np.isnan(played.successes).all()  # few environments do
        rows = [*zip(self.task_names, played.returns, played.successes)]
        rows.append(("mean of tasks", played.returns.mean(1), played.successes.mean(1)))
        for task, x, success in rows:
            line = f"{task:>24}  return {x.mean():8.1f} +- {x.std():<7.1f}"
            print(f"{line}  success {np.nanmean(success):4.0%}" if reported else line.rstrip())
        print(f"saved  {self.folder}")
        for path in films:
            print(f"film   {path}")
        print(f"plots  python report.py {self.folder}\nplay   python enjoy.py {self.folder}")
        return self.folder

    def _film(self) -> list[Path]:
        """The first episode of every task of the final evaluation."""
        agent = self.kept["agent"]
        W, device = agent.unpack(agent.weights().detach()), next(agent.parameters()).device
        seeds = spread_seeds(self.args.seed, 1, len(self.stages) * self.args.eval_episodes)
        seeds = seeds[:: self.args.eval_episodes]
        with torch.no_grad():
            reels, duration, _ = record(
                lambda obs: agent.policy(W, obs.to(device)), self.stages, self.task_names, seeds
            )
        return save_films(self.folder / "videos", self.task_names, reels, duration)

    def close(self) -> None:
        """Close the files; Ctrl-C is Python's own again."""
        gc.unfreeze()
        self.bar.close()
        self.file.close()
        self.writer.close()
        self.lock.release(force=True)
        for signum, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGTERM, signal.SIG_DFL),
        ):
            signal.signal(signum, handler)


def _by_layer(W: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of weights by name, (row, ...) each, those of every layer, (row, weight): actor.0 has two kinds."""
    layers: dict[str, list[Tensor]] = {}
    for name, x in W.items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(x.flatten(1))
    return {layer: torch.cat(parts, 1) for layer, parts in layers.items()}


def _inner_products(shared: Tensor, *own: Tensor) -> Tensor:
    """Of rows (row, weight), and of each task's X (task, ...) or B A: (row + task, row + task)."""
    if len(own) == 1:
        rows = torch.cat((shared, own[0].flatten(1)))
        return rows @ rows.T
    B, A = own
    shared_B = torch.einsum("xoi,tor->xtri", shared.unflatten(1, (B.shape[1], A.shape[2])), B)
    with_shared = torch.einsum("xtri,tri->xt", shared_B, A)
    BB, AA = torch.einsum("sor,toq->strq", B, B), torch.einsum("sri,tqi->strq", A, A)
    of_tasks = (BB * AA).sum((2, 3))  # <B_s A_s, B_t A_t> = tr(B_s' B_t A_t A_s')
    upper = torch.cat((shared @ shared.T, with_shared), 1)
    return torch.cat((upper, torch.cat((with_shared.T, of_tasks), 1)))


def _state(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x
    return x.state_dict() if hasattr(x, "state_dict") else x.get_state()


def _link(path: Path, target: str) -> None:
    """Let a symbolic link point to another target, without a moment in which there is none."""
    new = path.with_name(f"{path.name}-{target}")
    with suppress(OSError):  # of a file system that has no such links: nothing but comfort is lost
        new.symlink_to(target)
        os.replace(new, path)


def _git_commit() -> str | None:
    """HEAD, and "-dirty" if a file of it has changed, but for those in results/: they are what runs make."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return git("rev-parse", "--verify", "-q", "HEAD") + "-dirty" * bool(changed) or None
    except FileNotFoundError:  # no git here
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return f"{name}, {os.cpu_count()} cores"
