"""The folder of a run, the same for every script: settings, log, checkpoint, model.

    runs/NAME/config.json     script, settings, tasks, versions, git commit, hardware
    runs/NAME/heartbeat.csv   every logged number: global_step, metric, task ("mean": all tasks), value
    runs/NAME/events.*        the same for TensorBoard
    runs/NAME/checkpoint.pt   what --resume continues from
    runs/NAME/model.pt        the trained agent
    runs/NAME/evaluation.csv  its evaluation, episode by episode; its presence says that the run is finished
    runs/latest               a file with the name of the newest

What is logged and kept is the script's business; here is only how.
"""

from __future__ import annotations

import csv
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from envs import make
from envs.evaluation import Evaluation, evaluate, spread_seeds
from envs.folders import point_latest_to
from envs.generators import generators_of, generators_state, seed_generators, set_generators_state
from envs.log import Log
from envs.metrics import Episodes, Metrics
from envs.models import read, save
from envs.settings import RunArgs, fail

ROOT = Path(__file__).resolve().parents[1]
MAY_DIFFER = "run_name resume checkpoint_interval track capture_video wandb_project_name wandb_entity".split()
KEPT = ("iteration", "seconds", "envs", "generators", "heartbeat_bytes")  # in a checkpoint of any script
SHOWN = 10  # names of tasks in the header
LOGS = 50  # of a run, at most; every third is printed
CHARTS = ("episodic_return", "episodic_length", "success_rate")  # as `Episodes` and `Evaluation` order them


class Interrupted(Exception):
    """A signal to stop came while the agent was evaluated."""


def build(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function whose ValueErrors are about the user's input."""
    try:
        return function(*args)
    except ValueError as error:
        fail(str(error))


def make_envs(args: RunArgs, envs_per_task: int) -> gym.vector.VectorEnv:
    """The environments that --env-id and --tasks name, or a complaint about these.

    The global generators are seeded before, because environments may draw from them.
    """
    if args.capture_video:
        from envs.video import draw_without_screen  # needs packages that few runs do

        draw_without_screen()
    seed_generators(args.seed)
    envs = build(make, args.env_id, envs_per_task, args.tasks or None, args.env_workers)
    if envs.discrete and getattr(args, "noise_color", 0):
        fail(f"--noise-color needs continuous actions, those of {args.env_id} are discrete")
    return envs


def set_up_torch(args: RunArgs) -> torch.device:
    """Number of threads, device and compiler, by --num-threads, --cuda and --compile."""
    torch.set_num_threads(args.num_threads)
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward() becomes a part of the compiled function
    libc = ctypes.CDLL(None)  # glibc is to keep what was freed: mapping it anew takes longer than the sums
    for option, value in ((-4, 0), (-1, 2**31 - 1)) if hasattr(libc, "mallopt") else ():
        libc.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return torch.device("cuda" if args.cuda else "cpu")


def keep_signals(train: Callable[[Any], Path]) -> Callable[[Any], Path]:
    """For a script's `train`: however it ends, signals are handled as before, in a notebook too."""

    @functools.wraps(train)
    def wrapper(args: Any) -> Path:
        if threading.current_thread() is not threading.main_thread():  # which gets no signals
            return train(args)
        before = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)}
        try:
            return train(args)
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    return wrapper


class Run:
    """The folder of one run: opens it, or finds the one to resume, and writes everything in it.

        run = Run(args, __file__, envs)
        obs = run.start_or_resume(envs, num_iterations, steps, agent=agent, optimizer=optimizer, rng=rng)
        for iteration in range(run.first_iteration, num_iterations + 1):
            ...  # if run.log_due: run.log(...)
            run.end_iteration()
        return run.finish()

    Attributes:
        folder: runs/{run_name}, by default runs/{env_id}__{exp_name}__{seed}__{time}.
        finished: nothing is left to do.
        resumes: it continues from a checkpoint.
        first_iteration: number of the first iteration, 1 or the one after the checkpoint.
        theta_start: theta at the start of the run (weight,); None if it was loaded or there is none.
        global_step: environment steps, all tasks together, at the end of the current iteration.
        log_due, eval_due: the current iteration is one to log, to evaluate after.
    """

    def __init__(self, args: RunArgs, script: str, envs: gym.vector.VectorEnv):
        """Find the folder and check it, but write nothing yet; `script` is the script's __file__."""
        args.exp_name = args.exp_name or Path(script).stem
        self.args, self.task_names = args, list(envs.task_names)
        self.evaluating, self.last = False, True  # if only the final evaluation is left
        self.stop: list[int] = []  # signals received: the first saves and leaves, the second ends the process
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
        self.tasks = json.dumps((self.task_names, self.config["task_params"]))
        self.folder = self._find_folder()
        self._check_folder()
        self.finished = (self.folder / "evaluation.csv").exists()
        self.checkpoint: dict[str, Any] = {}
        if self.finished:
            print(f"{self.folder} is finished")
        elif (self.folder / "checkpoint.pt").exists():
            self.checkpoint = read(self.folder / "checkpoint.pt", "checkpoint")
            if lost := set(KEPT) - self.checkpoint.keys():
                fail(f"{self.folder / 'checkpoint.pt'} does not fit: it has no {min(lost)}")
        self.resumes = bool(self.checkpoint)
        self.iteration = self.checkpoint.get("iteration", 0)
        self.seconds = self.checkpoint.get("seconds", 0.0)
        self.first_iteration = self.iteration + 1
        self.stages: list[gym.Env] = []
        if args.capture_video:
            from envs.video import open_stages

            self.stages = build(open_stages, args.env_id, args.tasks or range(len(self.task_names)))
        self.lock = FileLock(self.folder / "lock")
        if self.folder.exists() and not self.finished:
            self._acquire_lock()

    def _find_folder(self) -> Path:
        stem = f"{self.args.env_id}__{self.args.exp_name}__{self.args.seed}"
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)  # what every file system, scp and W&B take
        earlier = sorted(Path("runs").glob(f"{stem}__*/config.json"), key=lambda p: p.stat().st_mtime)
        if self.args.resume and not self.args.run_name and earlier:
            return earlier[-1].parent  # the newest of the same experiment and seed
        if self.args.run_name:
            return Path("runs", self.args.run_name)
        folder = Path("runs", f"{stem}__{int(time.time())}")
        more = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
        return next(x for x in itertools.chain([folder], more) if not x.exists())

    def _check_folder(self) -> None:
        """Refuse a folder that is in the way, or that is not of a run with these settings."""
        for path in (self.folder.parent, self.folder):
            if path.exists() and not path.is_dir():
                fail(f"{path} is a file, where a folder is to be")
        if self.folder.exists() and not self.args.resume:
            fail(f"{self.folder} exists: continue it with --resume, or choose another --run-name")
        config_file = self.folder / "config.json"
        if not config_file.exists():
            return
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            earlier, tasks = dict(config["args"]), (config["task_names"], config["task_params"])
        except (ValueError, TypeError, KeyError):
            fail(f"{config_file} is spoilt: move the folder away to start anew")
        if unknown := self.config["args"].keys() - earlier.keys():
            fail(f"{self.folder} cannot be resumed: it is of a version without {min(unknown)}")
        for name, value in self.config["args"].items():
            if name not in MAY_DIFFER and earlier.get(name) != value:
                fail(f"{self.folder} cannot be resumed: its {name} is {earlier.get(name)}, not {value}")
        if json.dumps(tasks) != self.tasks:
            fail(f"{self.folder} cannot be resumed: the tasks of {self.args.env_id} are others now")

    def _acquire_lock(self) -> None:
        """Of the folder, which one process at a time writes in; it falls with the process."""
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            fail(f"{self.folder} is in use by another process")

    def start_or_resume(
        self, envs: gym.vector.VectorEnv, num_iterations: int, steps: int, **state: Any
    ) -> np.ndarray:
        """Open the folder's files; from a checkpoint, bring everything back in place.

        Args:
            envs: the environments to train in.
            num_iterations: of the run, each of `steps` steps of the environments, all tasks together.
            state: what a checkpoint holds beside the environments: "agent", the module that a model consists
                of; "episodes"; tensors, generators, what has a state_dict.

        Returns:
            The first observations (n, obs). After a resumption those that follow the last step before it or,
            if the environments cannot be saved, those of new episodes.
        """
        if num_iterations < 1:
            fail(f"--total-timesteps {self.args.total_timesteps} is less than one rollout of {steps} steps")
        self.envs, self.state = envs, state
        self.num_iterations, self.steps = num_iterations, steps
        theta = getattr(state["agent"], "theta", None)
        known = theta is not None and not self.args.load  # what a resumed run had loaded is not at hand
        self.theta_start = theta.detach().clone() if known else None
        for name, x in state.items() if self.resumes else ():
            self._restore(name, x)
        if self.checkpoint.get("envs") is not None:
            obs = self._restore("envs", envs)
        else:
            state["episodes"].discounted.zero_()  # of episodes that are gone
            stream = 1 + self.iteration if self.resumes else 0  # 1 is the evaluation's
            obs, _ = envs.reset(seed=spread_seeds(self.args.seed, stream, envs.num_envs))
        if self.resumes:
            set_generators_state(self.checkpoint.pop("generators"))
        self._open(self.iteration * steps)
        self._print_header()
        if self.iteration < num_iterations:  # else only the final evaluation is left
            self._begin_iteration()
        return obs

    def _print_header(self) -> None:
        """Say what runs, where, and from which step."""
        names, total = self.task_names, self.num_iterations * self.steps
        shown = " ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
        agent, own = self.state["agent"], 0
        for name, x in agent.named_parameters():
            own += x.numel() * (name.partition(".")[0] in agent.per_task)
        shared = sum(x.numel() for x in agent.parameters()) - own
        device = "GPU" if self.args.cuda else f"CPU, {self.args.num_threads} thread(s)"
        print(f"{self.args.env_id}, {len(names)} task(s): {shown}")
        parameters = f"parameters {shared:,} shared, {own // len(names):,} per task"
        print(f"{self.config['script']} on {device}: {parameters}")
        print(f"{total:,} steps -> {self.folder}; Ctrl-C saves, the same command with --resume continues")
        if self.resumes:
            print(f"continuing at step {self.global_step:,} of {total:,}")

    def _restore(self, name: str, x: Any) -> Any:
        """Bring back what the checkpoint holds by this name; of environments the observations."""
        try:
            saved = self.checkpoint.pop(name)  # which may be large
            if isinstance(x, Tensor):
                return x.copy_(saved)
            return x.load_state_dict(saved) if hasattr(x, "load_state_dict") else x.set_state(saved)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            fail(f"{self.folder / 'checkpoint.pt'} does not fit: {name} ({' '.join(str(error).split())})")

    def _make_folder(self) -> None:
        """Its own: another run may have started in the same second."""
        given = bool(self.args.run_name or self.args.resume)
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=given)
                break
            except FileExistsError:
                self.folder = self._find_folder()
        self.lock = FileLock(self.folder / "lock")

    def _open(self, step: int) -> None:
        """Open the folder's files at `step`: what was logged later is dropped."""
        self._make_folder()
        self._acquire_lock()  # again, if it was there before
        point_latest_to(self.folder)
        if not (self.folder / "config.json").exists():
            text = json.dumps(self.config, indent=2, ensure_ascii=False)
            (self.folder / "config.tmp").write_text(text, encoding="utf-8")
            os.replace(self.folder / "config.tmp", self.folder / "config.json")
        if self.args.track:
            import wandb  # a slow import that few need

            place = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity or None}
            what = {"id": self.folder.name, "config": self.config, "sync_tensorboard": True}
            wandb.init(**place, **what, resume="allow")
        size = self.checkpoint.get("heartbeat_bytes", 0)
        self.output = Log(self.folder, self.task_names, self.config["args"], step, size)
        hidden, total = not sys.stderr.isatty(), self.num_iterations * self.steps
        self.bar = tqdm(total=total, initial=step, unit="step", unit_scale=True, disable=hidden)
        self.global_step = self.saved_step = step
        self.start_clock()
        self.last_time = self.last_save = time.perf_counter()
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _: Any) -> None:
        if self.stop:
            os._exit(128 + signum)
        self.stop.append(signum)
        if self.evaluating:  # which may take long, and is repeated
            raise Interrupted

    def _begin_iteration(self) -> None:
        self.iteration += 1
        before, self.global_step = self.global_step, self.iteration * self.steps
        self.last = self.iteration == self.num_iterations
        log_interval = math.ceil(self.num_iterations / LOGS)
        self.log_due = self.last or self.iteration % log_interval == 0
        self.show_due = self.last or self.iteration % (3 * log_interval) == 0
        interval = self.args.eval_interval or math.inf
        self.eval_due = not self.last and self.global_step // interval > before // interval

    def end_iteration(self) -> None:
        """Save a checkpoint if it is time, and leave if a signal came or a number is not finite."""
        self.bar.update(self.steps)
        if self.log_due or self.eval_due:
            with self._writing():
                self.output.flush(self.global_step)
        if self.iteration == self.first_iteration:
            gc.freeze()  # what lives now stays: a full collection would go through it for 0.1 s
            self.start_clock()
        now = time.perf_counter()
        save_due = self.last or bool(self.stop) or now - self.last_save >= self.args.checkpoint_interval
        if (self.log_due or save_due) and not self._is_finite():
            self.close()
            sys.exit(f"{self.folder}: NaN or infinite by step {self.global_step}; earlier checkpoints stay")
        if save_due:
            self._save_checkpoint(now)
        if save_due and self.stop:  # else the signal came since the line above: the next one saves
            self._leave()
        if not self.last:
            self._begin_iteration()

    def _leave(self) -> NoReturn:
        """End the process that was told to stop."""
        self.close()
        print(f"stopped at step {self.saved_step}: continue with {self._command()}")
        sys.exit(128 + self.stop[0])

    def _command(self) -> str:
        """What continues the run: the command that started it, or what is to be set if that was in Python."""
        flags = ["--resume", "--run-name", self.folder.name]
        if Path(sys.argv[0]).name != Path(self.config["script"]).name:
            return shlex.join(flags)
        if self.args.run_name:
            flags = flags[:1]
        if self.args.resume:
            flags = flags[1:]
        return shlex.join(["python", *sys.argv, *flags])

    def _save_checkpoint(self, now: float) -> None:
        self.seconds, self.last_time, self.last_save = self._wall_time(), now, now
        content = {name: _state(x) for name, x in self.state.items()}
        content |= {"iteration": self.iteration, "seconds": self.seconds, "envs": self.envs.get_state()}
        self._save("checkpoint", content | {"generators": generators_state()})
        self.saved_step = self.global_step

    def _save(self, kind: str, content: dict[str, Any]) -> None:
        with self._writing():
            size = self.output.flush(self.global_step)
            save(self.folder / f"{kind}.pt", kind, self.config | content | {"heartbeat_bytes": size})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Leave with a line if the disk is full."""
        try:
            yield
        except OSError as error:
            self.close()
            reason = error.strerror or error
            sys.exit(f"{self.folder}: {reason}. The last good checkpoint stays: continue with --resume")

    def _is_finite(self) -> bool:
        """Of all tensors kept, except statistics of episodes, whose NaN says that there was none yet."""
        states = [_state(x) for x in self.state.values() if not isinstance(x, Episodes)]
        values = [x for state in states for x in (state.values() if isinstance(state, dict) else [state])]
        return all(x.isfinite().all() for x in values if isinstance(x, Tensor))

    def start_clock(self) -> None:
        """Steps per second are counted from here: the end of the first iteration, which compiles."""
        self.clock = self.global_step, time.perf_counter()

    def _wall_time(self) -> float:
        """Seconds of training, interruptions left out."""
        return self.seconds + time.perf_counter() - self.last_time

    def log(self, metric: str, x: float | Tensor, overall: float | None = None) -> None:
        """Log at `global_step` a value of all tasks, or one of each (task,) and their mean or `overall`."""
        per_task = x.tolist() if isinstance(x, Tensor | np.ndarray) and x.ndim else ()
        mean = float(x.mean() if per_task else x)
        self.output.add(self.global_step, metric, per_task, mean if overall is None else float(overall))

    def log_all(self, metrics: dict[str, Tensor] | Metrics) -> None:
        """Log values of each task (task,), or pairs of these, None if there are none, and a value of all."""
        for name, x in metrics.items():
            per_task, overall = x if isinstance(x, tuple) else (x, None)
            self.log(name, overall if per_task is None else per_task, overall)

    def log_charts(self, episodes: Episodes, learning_rate: float) -> None:
        """Log, and print some of the time, how far the run has come."""
        means = episodes.means()
        reported = not np.isnan(episodes.latest[2]).all()  # few environments report success
        for name, new, latest in zip(CHARTS, means, episodes.latest):
            if name != "success_rate":
                self.log(f"charts/{name}", new, latest.mean())
            elif reported:
                self.log(f"charts/{name}", new, np.nanmean(latest))
        step, start = self.clock
        speed = (self.global_step - step) / (time.perf_counter() - start)
        self.log("charts/SPS", speed)
        self.log("charts/wall_time", self._wall_time())
        self.log("charts/learning_rate", learning_rate)
        if self.show_due:
            returns, _, successes = episodes.latest
            line = f"step {self.global_step:>9,}  return {returns.mean():7.1f}"
            line += f"  success {np.nanmean(successes):4.0%}" if reported else ""
            if speed:  # 0 in the first iteration
                left = (self.num_iterations * self.steps - self.global_step) / speed
                line += f"  {speed:,.0f} steps/s  {tqdm.format_interval(left)} left"
            self.bar.write(f"{line}  tasks {' '.join(f'{x:.0f}' for x in returns)}")

    def evaluate(self, episodes: int) -> Evaluation:
        """Log an evaluation of the agent, so many episodes of each task; the clocks do not count its time."""
        start = time.perf_counter()
        self.evaluating = True
        try:
            if self.stop:
                raise Interrupted
            with generators_of(self.args.seed, 1):
                envs = build(make, self.args.env_id, episodes, self.args.tasks or None, self.args.env_workers)
                if json.dumps((envs.task_names, envs.task_params)) != self.tasks:
                    fail(f"the tasks of {self.args.env_id} are others whenever they are built")
                played = evaluate(self.state["agent"], envs, self.args.seed)
                envs.close()
        except Interrupted:
            self._leave()
        self.evaluating = False
        spent = time.perf_counter() - start
        self.clock, self.last_time = (self.clock[0], self.clock[1] + spent), self.last_time + spent
        for name, x in zip(CHARTS, played):
            if not np.isnan(x).all():  # few environments report success
                self.log(f"eval/{name}", x.mean(1), np.nanmean(x))
        if not self.last:
            means, success = played.returns.mean(1), played.successes
            line = (
                f"step {self.global_step:>9,}  evaluation {means.mean():7.1f} +- {means.std():.1f} over tasks"
            )
            self.bar.write(line if np.isnan(success).all() else f"{line}  success {np.nanmean(success):4.0%}")
        return played

    def finish(self) -> Path:
        """Evaluate for the last time, save the model, print both and what to do next; returns the folder."""
        self._save("model", {"agent": self.state["agent"].state_dict()})
        played = self.evaluate(self.args.eval_episodes)
        with self._writing():
            self.output.flush(self.global_step)
            self._write_evaluation(played)
        self.close()
        reported = not np.isnan(played.successes).all()  # few environments do
        rows = [*zip(self.task_names, played.returns, played.successes)]
        rows.append(("mean of tasks", played.returns.mean(1), played.successes.mean(1)))
        for task, x, success in rows:
            over = "episodes" if task != "mean of tasks" else "tasks"
            line = f"{task:>24}  return {x.mean():8.1f} +- {x.std():<7.1f} over {over}"
            print(f"{line}  success {np.nanmean(success):4.0%}" if reported else line.rstrip())
        print(f"saved  {self.folder}")
        if self.stages:  # the first episode of every task
            from envs.video import film_agent

            seeds = spread_seeds(self.args.seed, 1, played.returns.size)[:: self.args.eval_episodes]
            folder = self.folder / "videos"
            for path in film_agent(self.state["agent"], self.stages, self.task_names, seeds, folder):
                print(f"film   {path}")
        print(f"plots  python report.py {self.folder}\nplay   python enjoy.py {self.folder}")
        return self.folder

    def _write_evaluation(self, played: Evaluation) -> None:
        """evaluation.csv, whole or not at all."""
        unfinished = self.folder / "evaluation.tmp"
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("task", "episode", "return", "length", "success"))
            for task, *rows in zip(self.task_names, *played):
                for episode, (x, length, success) in enumerate(zip(*rows)):
                    reported = "" if math.isnan(success) else int(success)
                    writer.writerow((task, episode, x, int(length), reported))
        os.replace(unfinished, self.folder / "evaluation.csv")

    def close(self) -> None:
        """Close files and environments."""
        gc.unfreeze()
        self.envs.close()
        self.bar.close()
        self.output.close()
        self.lock.release(force=True)


def _state(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x
    return x.state_dict() if hasattr(x, "state_dict") else x.get_state()


def _git_commit() -> str | None:
    """HEAD, and "-dirty" if a file has changed, except those in results/: they are what runs make."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
        return git("rev-parse", "--verify", "-q", "HEAD") + "-dirty" * bool(changed) or None
    except FileNotFoundError:  # no git here
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return f"{name}, {os.cpu_count()} cores"
