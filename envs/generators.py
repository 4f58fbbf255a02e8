"""The global generators of Python, NumPy and PyTorch, which environments of others may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from envs.evaluation import spread_seeds


def seed_generators(seed: int, stream: int = 0) -> None:
    """Seed all three, from a run's seed and the number of a stream as `spread_seeds`."""
    python, numpy, pytorch = spread_seeds(seed, stream, 3)
    random.seed(python)
    np.random.seed(numpy)  # noqa: NPY002
    torch.manual_seed(pytorch)


def generators_state() -> dict[str, Any]:
    """Their states: numbers, strings, lists and a tensor."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    key = numpy["state"]["key"].tolist()
    numpy = numpy | {"state": numpy["state"] | {"key": key}}
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}


def set_generators_state(state: dict[str, Any]) -> None:
    """Continue from `generators_state()`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])


@contextmanager
def generators_of(seed: int, stream: int) -> Iterator[None]:
    """Seed them for a while; afterwards they go on as if nothing had been drawn."""
    state = generators_state()
    seed_generators(seed, stream)
    try:
        yield
    finally:
        set_generators_state(state)
