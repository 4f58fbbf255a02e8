"""The tables of the study likelihood, of made-up runs and played models."""

import numpy as np
import pandas as pd
import pytest

from bench.collect import EVALUATION
from studies.likelihood import __main__ as likelihood
from studies.posterior.play import NOISE, PHYSICS, PRUNED


def make_up():
    """V-MPO loses 10 at beta 1, PPO 50; V-MPO's residuals can be pruned to 1 %, PPO's to 5 %."""
    rng, rows, played = np.random.default_rng(0), [], []
    for name, (algorithm, beta) in likelihood.NAMES.items():
        method, _, setting = name.partition("@")
        loss = {"PPO": 50, "V-MPO": 10}[algorithm] * (beta == "1")
        for seed in range(10):
            key = {"env": "goals", "steps": 1000, "method": method, "setting": setting, "seed": seed}
            mean = 300 + 5 * seed - loss + rng.normal()
            for task, value in (("mean", mean), ("a", mean + 9), ("b", mean - 9)):
                rows.append(key | {"step": 1000, "metric": EVALUATION, "task": task, "value": value})
            ways = [("mean", 0, mean)] + [("sampled", 0, mean - 1)] * (beta != "point")
            ways += [("noise", level, mean * (1 - level)) for level in NOISE]
            ways += [(*item, mean / 2) for x in PHYSICS for item in x.items()]
            least = 0.95 if algorithm == "PPO" else 0.99
            for score in ["|mu|"] + ["|mu| / sigma"] * (beta != "point"):
                ways += [(f"pruned by {score}", x, mean * (x <= least)) for x in PRUNED]
            played += [(*way, name, "goals", seed) for way in ways]
    columns = ["what", "level", "value", "run", "env", "seed"]
    return pd.DataFrame(rows), pd.DataFrame(played, columns=columns)


def test_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs, played = make_up()
    likelihood.folder_of(likelihood.STUDY).mkdir(parents=True)
    monkeypatch.setattr(likelihood, "play_all", lambda jobs, out, used: played.to_csv(out / "played.csv"))
    text = likelihood.report(runs)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    expected = {  # of returns; the same rows of what is pruned come later
        "PPO: 0.001 minus point": (0, "the same"),
        "PPO: 1 minus 0.001": (-50, "worse"),
        "V-MPO: 1 minus 0.001": (-10, "the same"),
        "V-MPO minus PPO: 1": (40, "better"),
        "V-MPO minus PPO, of 1 minus 0.001": (40, "better"),
    }
    for name, (center, verdict) in expected.items():
        [difference, _, found] = next(row[1:] for row in rows if row[0] == name)
        assert found == verdict and float(difference.split()[0]) == pytest.approx(center, abs=2)
    assert any(r[:2] == ["PPO", "1"] and "5 [5, 5]" in r for r in rows)
    assert any(r[:2] == ["V-MPO", "point"] and "1 [1, 1]" in r for r in rows)
    assert any(r[0] == "noise 0.4" and r[1].startswith("0.60") for r in rows)
