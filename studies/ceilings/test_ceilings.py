"""Ceilings are those of every task, and the project's are known to the reports."""

import probes
import pytest

from bench.collect import read
from bench.tables import ceiling
from studies import by_env
from studies.ceilings.__main__ import finals, report
from studies.conftest import cells_of, made_up


def test_a_ceiling_is_the_best_seed_of_every_task():
    finals = {1: (100.0, 300.0), 2: (200.0, 200.0), 3: (300.0, 400.0)}
    text = report(made_up("ceilings", {("goals", "independent", s): x for s, x in finals.items()}))
    rows = cells_of(text, "## goals")
    assert list(rows["a"].values()) == ["a", "100", "200", "300", "200", "300"]
    assert list(rows["b"].values()) == ["b", "300", "200", "400", "300", "400"]
    assert cells_of(text, "## What each")["goals"]["ceiling"] == "350"


def test_the_table_of_ceilings_is_that_of_the_committed_runs():
    runs, _ = read(probes.ROOT / "results/studies/ceilings")
    for env, group in by_env(runs).items():
        best = finals(group).drop("mean").max(axis=1)
        assert ceiling(env) == pytest.approx(best.mean(), rel=1e-5)
    assert ceiling("cartpole10") == 500 and ceiling("elsewhere") is None
