"""Weights of networks by name: their first draw, and views of the matrix that holds those of every task."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def init_layers(net: str, sizes: tuple[int, ...], last_gain: float, rng) -> dict[str, Tensor]:
    """One draw of a network's weights, by a generator on the CPU: layers orthogonal, biases 0, as CleanRL's.

    Args:
        net: the network's name, "actor": its layers are "actor.0", "actor.1", ...
        sizes: numbers of inputs, of units in the hidden layers, and of outputs.
        last_gain: of the output layer; the hidden ones have sqrt(2).

    Returns:
        "actor.0.weight" (out, in), "actor.0.bias" (out,), ...
    """
    weights = {}
    gains = [math.sqrt(2)] * (len(sizes) - 2) + [last_gain]
    for i, gain in enumerate(gains):
        weight = torch.empty(sizes[i + 1], sizes[i])
        weights[f"{net}.{i}.weight"] = nn.init.orthogonal_(weight, gain, generator=rng)
        weights[f"{net}.{i}.bias"] = torch.zeros(sizes[i + 1])
    return weights


def split(matrix: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Named views of a (task, weight) matrix whose columns have these shapes: (task, *shape) each."""
    columns = matrix.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {name: x.unflatten(1, shape) for (name, shape), x in zip(shapes.items(), columns)}


def units(shapes: dict[str, torch.Size]) -> Tensor:
    """Number of the output unit that each column of a (task, weight) matrix belongs to, (weight,).

    A bias belongs to the unit of its row.
    """
    parts, number = [], 0
    for name, shape in shapes.items():
        rows = number + torch.arange(shape[0])
        parts.append(rows.repeat_interleave(math.prod(shape[1:])))
        if not name.endswith(".weight"):
            number += shape[0]
    return torch.cat(parts)
