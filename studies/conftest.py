"""What the tests of studies have in common: a folder of their own, and made-up runs."""

import sys

import numpy as np
import pandas as pd
import probes
import pytest

from bench.figures import STYLE
from studies import folder_of

TASKS = ["a", "b"]
STEPS = 1000


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Results are below an empty folder, and figures checked, and drawn in a fraction of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # which `probes.parse` changes
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)
    probes.check_all_figures(monkeypatch)
    return tmp_path


def made_up(study, cases):
    """runs.csv of a study as its report gets it: (env, method@setting, seed) -> returns of both tasks.

    Half-way there is an evaluation that is not to count; success is a thousandth of the return.
    """
    folder_of(study).mkdir(parents=True, exist_ok=True)
    rows = []
    for (env, name, seed), final in cases.items():
        method, _, setting = name.partition("@")
        key = {"env": env, "method": method, "setting": setting, "seed": seed, "steps": STEPS}
        for task, value in zip([*TASKS, "mean"], [*final, np.mean(final)]):
            metrics = {"eval/episodic_return": value, "eval/success_rate": value / 1000}
            rows += [key | {"metric": m, "task": task, "step": STEPS, "value": x} for m, x in metrics.items()]
        early = {"metric": "eval/episodic_return", "task": "mean", "step": STEPS // 2, "value": -1.0}
        rows.append(key | early)
    return pd.DataFrame(rows)


def cells_of(text, heading=""):
    """The first table below a heading: row by its first cell -> column -> cell."""
    lines = text[text.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    columns, _, *rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines[first:last]]
    return {row[0]: dict(zip(columns, row)) for row in rows}
