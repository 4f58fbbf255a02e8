"""Files of weights: models and checkpoints, written whole or not at all, and read with care."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from envs.folders import find_run
from envs.settings import fail

FORMAT = 4  # of models and checkpoints
POSTERIOR = ("sigma", "h_sum", "h_count")  # tensors of an agent that its mean weights do not need


def save(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a "model" or a "checkpoint", whole or not at all.

    Raises:
        OSError: the disk is full; what was there before is left as it was.
    """
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save({**content, "kind": kind, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # PyTorch's own says nothing of the disk
        unfinished.unlink(missing_ok=True)
        raise OSError(f"no space left for {path.name}") from error
    os.replace(unfinished, path)


def read(path: Path, kind: str) -> dict[str, Any]:
    """Load what `save` wrote; anything else is bad input."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about the file, which is refused in a line anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a spoilt file, or one of another origin, can fail in any way
        fail(f"{path} cannot be read: it is spoilt, or no {kind} of this project ({type(error).__name__})")
    try:
        if not isinstance(content, dict):
            raise TypeError("not the content of a saved agent")
        found = content["kind"]
        if "script" in content and content.get("format") != FORMAT:
            fail(f"{path} is of an earlier version of this project")
        if not all(isinstance(x, Tensor) for x in content["agent"].values()) or "args" not in content:
            raise TypeError("not the content of a saved agent")
    except (AttributeError, KeyError, TypeError) as error:
        fail(f"{path} is not a {kind} of this project ({type(error).__name__})")
    if found != kind:
        fail(f"{path} is a {found}, not a {kind}")
    return content


def mean_weights(model: dict[str, Any]) -> dict[str, Any]:
    """What `read` gave, without what only drawn weights and further training need."""
    agent = {name: x for name, x in model["agent"].items() if name not in POSTERIOR}
    return model | {"agent": agent}


@torch.no_grad()
def load_agent(agent: nn.Module, args: Any, task_names: Sequence[str]) -> None:
    """Copy the saved model --load, of a run's folder or in a file, into an agent.

    Every shared tensor is copied, and of the tensors and modules in `agent.per_task`, (task, ...), the rows
    of the tasks that the model knows by name; the rows of other tasks stay as they are. So does sigma if the
    model has mean weights only.
    """
    path = find_run(Path(args.load))
    saved = read(path / "model.pt" if path.is_dir() else path, "model")
    for name in ("hidden_sizes", "norm_obs", "norm_value", "norm_critic"):
        theirs, mine = saved["args"].get(name, False), getattr(args, name, False)
        if theirs != (list(mine) if isinstance(mine, tuple) else mine):
            fail(f"{path} was trained with {name.replace('_', '-')} {theirs}, not {mine}")
    known = {task: row for row, task in enumerate(saved["task_names"])}
    for name, value in agent.state_dict().items():
        if name in POSTERIOR and name not in saved["agent"]:
            continue
        rows = name.partition(".")[0] in agent.per_task
        old = saved["agent"].get(name, torch.empty(0))
        if old.shape[rows:] != value.shape[rows:]:
            fail(f"{path} does not fit: its {name} is {list(old.shape)}, here it is {list(value.shape)}")
        if not rows:
            value.copy_(old)
        for m, task in enumerate(task_names):
            if rows and task in known:
                value[m] = old[known[task]]


def agent_of_task(agent: nn.Module, m: int) -> nn.Module:
    """The agent that has task m only, in the same memory.

    It shares parameters and modules with `agent`, has row m of those in `agent.per_task`, and of its buffers.
    """
    own = {name: copy.copy(x) for name, x in agent._modules.items() if name in agent.per_task}
    one = copy.copy(agent)
    one._modules = agent._modules | own
    for module in (one, *own.values()):
        module._buffers = {name: x[m, None] for name, x in module._buffers.items()}
    one._parameters = dict(agent._parameters)
    for name, x in agent._parameters.items():
        if name in agent.per_task:
            one._parameters[name] = nn.Parameter(x.detach()[m, None], x.requires_grad)
    return one
