"""Runs of a suite: several at a time on this machine, or one array job on Slurm.

Every run is its script's own command, started by a process that has imported PyTorch already: that saves
the 3 seconds a short run would spend on it. What it prints goes to output.txt in its folder. A finished run
is skipped, an interrupted one continues from its checkpoint.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from bench.methods import METHODS, ROOT, Settings, fail, write_flags

BUSY = 75  # exit code of a run that another process has begun
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a run that was told to stop, and saved
server = multiprocessing.get_context("forkserver")
# torch._dynamo: a second and more, which torch's optimizers import when they are made
preloaded = ["bench.launch", "torch._dynamo", "envs.runs", "envs.cartpole", "envs.lunarlander"]
server.set_forkserver_preload(preloaded)
stopping = threading.Event()  # of the whole launcher
# a process that starts asks for the exit codes of all others, and one that two threads ask for is lost
polling = threading.Lock()


class Job(NamedTuple):
    """A run: its folder below runs/, and its command."""

    name: str
    script: str
    flags: str

    @property
    def command(self) -> str:
        """As in the file `command` of the run's folder."""
        return f"{self.script} {self.flags}".strip()

    @property
    def finished(self) -> bool:
        """Its model is saved, of this command."""
        folder = Path("runs", self.name)
        saved = (folder / "evaluation.csv").exists() and (folder / "command").exists()
        return saved and (folder / "command").read_text().strip() == self.command


def job(name: str, method: str, env: str, steps: int, seed: int, settings: Settings, methods=METHODS) -> Job:
    """The run of a method, which may be named method@setting, with its fixed flags and these settings."""
    found = methods[method.partition("@")[0]]
    given = {"exp-name": method, "env-id": env, "total-timesteps": str(steps), "seed": str(seed)}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}__{seed}")  # as scripts want the name of a run
    return Job(name, found.script, write_flags(given | found.flags | settings))


def _main(script: str, argv: list[str], output: str) -> None:
    """In the process of a run: the script, as if from the command line."""
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(stream, standard)
    os.setsid()  # Ctrl-C is the launcher's, which then tells its runs to stop
    sys.argv = [script, *argv]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run(job: Job) -> int:
    """Start or continue a run and wait for it; returns its exit code, 0 if it had finished, or BUSY."""
    if stopping.is_set():
        return STOPPED[0]
    folder = Path("runs", job.name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "launch.lock", timeout=0):
            with FileLock(folder / "lock", timeout=0):
                pass  # nor has it a run whose launcher died
            return _run(job, folder)
    except Timeout:
        time.sleep(1)  # not to ask again at once
        return BUSY


def _run(job: Job, folder: Path) -> int:
    """The same, with the folder's lock."""
    command, failed = folder / "command", folder / "failed"
    failed.unlink(missing_ok=True)
    if not command.exists():
        command.write_text(job.command + "\n")
    if command.read_text().strip() != job.command:
        failed.write_text("2")
        print(f"failed: {folder.resolve()} has other settings than today; move it away", file=sys.stderr)
        return 2
    if job.finished:
        return 0
    argv = [*job.flags.split(), "--run-name", job.name, "--resume"]
    process = server.Process(target=_main, args=(str(ROOT / job.script), argv, str(folder / "output.txt")))
    with polling:
        process.start()
    code, told = None, False
    while code is None:
        time.sleep(0.1)
        if stopping.is_set() and not told:
            process.terminate()  # it saves first
            told = True
        with polling:
            code = process.exitcode
    code = code if code >= 0 else 128 - code  # of a signal that has ended it, its number
    if code and code not in STOPPED:
        failed.write_text(str(code))
        tail = "\n".join((folder / "output.txt").read_text().splitlines()[-5:])
        where = folder.resolve() / "output.txt"
        print(f"failed: {job.name} (exit code {code}); {where} ends with\n{tail}", file=sys.stderr)
    return code


def set_up() -> None:
    """Refuse bad input before anything starts; the first Ctrl-C, SIGTERM or SIGHUP lets all runs save."""
    on_slurm()
    jobs_at_a_time()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: stopping.set())


def on_slurm() -> bool:
    """Whether the environment variable LAUNCHER says so."""
    launcher = os.environ.get("LAUNCHER", "")
    if launcher not in ("", "slurm"):
        fail(f"LAUNCHER is slurm or nothing, not {launcher!r}")
    return launcher == "slurm"


def show_commands(jobs: Iterable[Job]) -> None:
    """One a line."""
    for x in jobs:
        print(f"python {ROOT / x.script} {x.flags} --run-name {x.name} --resume")


def jobs_at_a_time() -> int:
    """Of the environment variable JOBS; by default as many as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = os.environ.get("JOBS") or str(cores)
    if not text.isdigit() or int(text) < 1:
        fail(f"JOBS is a number of runs at a time, not {text!r}")
    return int(text)


def launch(jobs: Iterable[Job]) -> bool:
    """Run all that have not finished, here; whether all have then."""
    jobs, failed = list(jobs), 0
    waiting = [job for job in jobs if not job.finished]
    while waiting and not stopping.is_set():
        busy = []
        with ThreadPoolExecutor(jobs_at_a_time()) as pool:
            for job, code in zip(waiting, pool.map(run, waiting)):
                if code == BUSY:
                    busy.append(job)
                failed += code not in (0, BUSY, *STOPPED)
                finished = sum(job.finished for job in jobs)
                print(f"{finished}/{len(jobs)} finished, {failed} failed", flush=True)
        waiting = busy  # come back to them when the others are done
    leave_if_stopped()
    return all(job.finished for job in jobs)


def leave_if_stopped() -> None:
    """End the launcher if it was told to."""
    if stopping.is_set():
        print("stopped; the same command continues")
        raise SystemExit(128 + signal.SIGINT)


def submit(name: str, jobs: Iterable[Job], after: list[str]) -> None:
    """Submit what has not finished as one array job to Slurm, and a command of benchmark.sh after it."""
    left = [job for job in jobs if not job.finished]
    array, order = "", []
    if left:  # sbatch refuses an empty array
        Path("runs").mkdir(exist_ok=True)
        number, path = tempfile.mkstemp(".tsv", f"{name}-", "runs")  # its own, as jobs read it later
        with open(number, "w", encoding="utf-8") as file:
            file.writelines("\t".join(job) + "\n" for job in left)
        at_a_time = f"%{jobs_at_a_time()}" if os.environ.get("JOBS") else ""
        size = ["--array", f"1-{len(left)}{at_a_time}"]
        array = sbatch(name, f"job {path} $SLURM_ARRAY_TASK_ID", size)
        order = ["--dependency", f"afterany:{array}"]
    sbatch(f"{name}-report", shlex.join(after), order)
    print(f"array job {array}, then the report: squeue; the same command submits what is left")


def sbatch(name: str, words: str, options: list[str]) -> str:
    """Submit a command of benchmark.sh as a job to Slurm; returns its number."""
    command = ["sbatch", "--parsable", "--cpus-per-task=1", "--job-name", name, "--chdir", os.getcwd()]
    command += ["--output", f"{os.getcwd()}/runs/slurm-%j.out", *options]
    command += shlex.split(os.environ.get("SBATCH", ""))
    door = shlex.quote(str(ROOT / "benchmark.sh"))
    wrapped = f"OUT={shlex.quote(os.getcwd())} bash {door} {words}"
    done = subprocess.run([*command, "--wrap", wrapped], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().partition(";")[0]  # of several clusters, the number comes first
