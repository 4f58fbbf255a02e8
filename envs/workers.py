"""Environments in several processes, for those whose steps take longer than the policy's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from envs.generators import generators_state, seed_generators, set_generators_state
from envs.vector import Step, TaskVectorEnv

INFOS = ("final_obs", "_final_obs", "final_info", "_final_info")  # that every environment gives


class WorkerVectorEnv(TaskVectorEnv):
    """What `envs.make` builds, bit for bit, but each process has all environments of some of the tasks.

    Environments that draw from a global generator have another one in each process, seeded by `reset`. If a
    process ends, so does the program, with a line.
    """

    def __init__(
        self, build: Callable[[list[int]], TaskVectorEnv], tasks: list[int], num_workers: int
    ) -> None:
        """Start the processes.

        Args:
            build: makes the environments of some tasks.
            tasks: indices of all.
            num_workers: number of processes.

        Raises:
            ValueError: there are more processes than tasks; or as `build`.
        """
        if num_workers > len(tasks):
            raise ValueError(f"{num_workers} processes cannot each have tasks of {len(tasks)}")
        first = build(tasks)  # what can be wrong with them is seen here; and what was loaded the workers have
        spaces = first.single_observation_space, first.single_action_space
        about = first.task_names, first.task_params, *spaces, None, first.max_episode_steps
        super().__init__(first.num_envs, *about)
        first.close()
        # a fork has all that this process has loaded; where that is not safe a new one has to load it
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        parts = np.array_split(tasks, num_workers)
        self.ends = self.envs_per_task * np.cumsum([0, *map(len, parts)])  # of the rows of each worker
        self.workers, self.pipes = [], []
        for own in parts:
            pipe, other_end = context.Pipe()
            self.pipes.append(pipe)
            worker = context.Process(target=serve, args=(other_end, self.pipes, build, own.tolist()))
            worker.daemon = True
            worker.start()
            other_end.close()
            self.workers.append(worker)

    def _receive(self, i: int) -> Any:
        """What worker i has to say."""
        try:
            error, content = self.pipes[i].recv()
        except (EOFError, ConnectionError):
            self.workers[i].join(timeout=1)
            sys.exit(f"process {i} of the environments is gone, its exit code is {self.workers[i].exitcode}")
        if error:
            raise RuntimeError(content)
        return content

    def _ask(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Call a method of the environments of every worker; of each argument worker i gets [i]."""
        for i, pipe in enumerate(self.pipes):
            try:
                pipe.send((method, *(x[i] for x in arguments)))
            except ConnectionError:
                pass  # `_receive` will see that it is gone
        results, returns, lengths = zip(*map(self._receive, range(len(self.pipes))))
        self.episode_returns[:], self.episode_lengths[:] = np.concatenate(returns), np.concatenate(lengths)
        return list(results)

    def _split(self, x: Any) -> list[Any]:
        """Of each worker its rows."""
        return [x[start:end] for start, end in zip(self.ends, self.ends[1:])]

    def _reset(self, seeds: list[int | None], options: dict[str, Any] | None) -> np.ndarray:
        return np.concatenate(self._ask("reset", self._split(seeds), [options] * len(self.pipes)))

    def step(self, actions: np.ndarray) -> Step:
        """Step every environment."""
        *arrays, infos = zip(*self._ask("step", self._split(actions)))
        if any(infos):
            infos = [x or {"final_obs": obs} for x, obs in zip(infos, arrays[0])]
        return *(np.concatenate(x) for x in arrays), join(infos, np.diff(self.ends))

    def get_state(self) -> list[Any] | None:
        """Everything needed to continue bit for bit, in as many processes; None if that is impossible."""
        states = self._ask("get_state")
        return None if states[0][0] is None else states

    def set_state(self, state: list[Any]) -> np.ndarray:
        """As `TaskVectorEnv`'s."""
        if len(state) != len(self.pipes):
            raise ValueError(f"the saved state is of {len(state)} processes, here are {len(self.pipes)}")
        return np.concatenate(self._ask("set_state", state))

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()  # at which its worker leaves the loop
        for worker in self.workers:
            worker.join(timeout=10)
            worker.kill()  # if an environment hangs


def join(infos: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """One dictionary of arrays from those of the workers; what some do not have is 0 for their rows."""
    found = {}
    for name in dict.fromkeys(name for x in infos for name in x):
        some = next(x[name] for x in infos if name in x)
        if isinstance(some, dict):
            found[name] = join([x.get(name, {}) for x in infos], sizes)
        else:
            zeros = [np.zeros((size, *some.shape[1:]), some.dtype) for size in sizes]
            found[name] = np.concatenate([x.get(name, zero) for x, zero in zip(infos, zeros)])
    return found


def serve(
    pipe: Connection, others: list[Connection], build: Callable[[list[int]], TaskVectorEnv], tasks: list[int]
) -> None:
    """A worker: build the environments of these tasks and do what is asked, until the pipe is closed."""
    os.setsid()  # Ctrl-C is for the run, which finishes what it has begun
    for signum in (signal.SIGINT, signal.SIGTERM):  # a fork has the run's handlers
        signal.signal(signum, signal.SIG_DFL)
    for other in others:  # else a pipe would stay open when the run is gone
        other.close()
    try:
        envs = build(tasks)
        while True:
            method, *arguments = pipe.recv()
            result = answer(envs, method, *arguments)
            pipe.send((False, (result, envs.episode_returns, envs.episode_lengths)))
    except (EOFError, ConnectionError):
        return
    except Exception:  # whatever an environment of one's own raises, the run is to show
        pipe.send((True, traceback.format_exc()))


def answer(envs: TaskVectorEnv, method: str, *arguments: Any) -> Any:
    """Call a method of a worker's environments; global generators go with their state."""
    if method == "reset":
        seeds, options = arguments
        if seeds[0] is not None:
            seed_generators(seeds[0])
        return envs.reset(seed=seeds, options=options)[0]
    if method == "step":
        *arrays, infos = envs.step(*arguments)
        return *arrays, {name: infos[name] for name in INFOS if name in infos}
    if method == "get_state":
        return envs.get_state(), generators_state()
    state, generators = arguments[0]
    observations = envs.set_state(state)
    set_generators_state(generators)
    return observations
