"""Environments in several processes, for those whose steps take longer than the policy's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from envs.generators import generators_state, seed_generators, set_generators_state
from envs.vector import SUCCESS, Step, TaskVectorEnv

INFOS = ("final_obs", "_final_obs", "_final_info")  # that every environment gives, and of final_info
FINAL_INFOS = ("episode", "_episode", *SUCCESS, *(f"_{name}" for name in SUCCESS))
FORKING = threading.Lock()
ENDS: WeakSet[Connection] = WeakSet()  # of pipes to all workers of this process: a fork has them too


class WorkerVectorEnv(TaskVectorEnv):
    """What `envs.make` builds, bit for bit, but each process has all environments of some of the tasks.

    A generator that environments share is another one in each process; global ones are seeded by `reset`. If
    a process ends, so does the program, with a line.
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
            with FORKING:
                pipe, other_end = context.Pipe()
                ENDS.add(pipe)
                worker = context.Process(target=serve, args=(other_end, build, own.tolist()), daemon=True)
                worker.start()
                other_end.close()
            self.workers.append(worker)
            self.pipes.append(pipe)

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
        try:
            for i, pipe in enumerate(self.pipes):
                with suppress(ConnectionError):  # `_receive` will see that it is gone
                    pipe.send((method, *(x[i] for x in arguments)))
            results, returns, lengths = zip(*map(self._receive, range(len(self.pipes))))
        except BaseException:  # with answers on the way nothing more can be asked
            self.close()
            raise
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
            shape, dtype = np.shape(some)[1:], np.asarray(some).dtype
            zeros = [np.zeros((size, *shape), dtype) for size in sizes]
            found[name] = np.concatenate([x.get(name, zero) for x, zero in zip(infos, zeros)])
    return found


def serve(pipe: Connection, build: Callable[[list[int]], TaskVectorEnv], tasks: list[int]) -> None:
    """A worker: build the environments of these tasks and do what is asked, until the pipe is closed."""
    os.setsid()  # Ctrl-C is for the run, which finishes what it has begun
    for signum in (signal.SIGINT, signal.SIGTERM):  # a fork has the run's handlers
        signal.signal(signum, signal.SIG_DFL)
    for other in list(ENDS):  # else a pipe would stay open when the run is gone
        other.close()
    torch.set_num_threads(1)  # a fork has none of the others, and would wait for them
    envs = None
    with suppress(EOFError, ConnectionError):  # of the pipe: the run is over
        while True:
            request = pipe.recv()
            try:
                envs = envs or build(tasks)
                reply = False, (answer(envs, *request), envs.episode_returns, envs.episode_lengths)
            except Exception:  # whatever an environment of one's own raises, the run is to show
                reply = True, traceback.format_exc()
            pipe.send(reply)


def answer(envs: TaskVectorEnv, method: str, *arguments: Any) -> Any:
    """Call a method of a worker's environments; global generators go with their state."""
    if method == "reset":
        seeds, options = arguments
        if seeds[0] is None:
            return envs.reset(options=options)[0]
        seed_generators(seeds[0])
        return envs.reset(seed=seeds, options=options)[0]
    if method == "step":
        *arrays, infos = envs.step(*arguments)
        if "final_info" not in infos:
            return *arrays, {}
        final = infos["final_info"]
        final = {name: final[name] for name in FINAL_INFOS if name in final}
        return *arrays, {name: infos[name] for name in INFOS} | {"final_info": final}
    if method == "get_state":
        return envs.get_state(), generators_state()
    state, generators = arguments[0]
    observations = envs.set_state(state)
    set_generators_state(generators)
    return observations
