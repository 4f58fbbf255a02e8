"""Each method's best step size counts, and a verdict says whether a suite can tell."""

import numpy as np
from PIL import Image

from bench.statistics import mean_interval
from studies.conftest import cells_of, made_up
from studies.power.__main__ import report


def test_power_takes_each_methods_best_step_size_and_says_whether_a_suite_can_tell():
    rng = np.random.default_rng(0)
    means = {"cartpole10": {"task-blind": (390, 480), "varshare": (470, 482), "independent": (300, 320)}}
    means["lander"] = {"task-blind": (-100, -90), "varshare": (100, 50), "independent": (60, 20)}
    cases = {}
    for env, methods in means.items():
        for (method, both), seed in ((x, s) for x in methods.items() for s in range(5)):
            for rate, mean in zip(("0.003", "0.012"), both):
                cases[env, f"{method}@{rate}", seed] = mean + 4 * rng.normal() + np.array([-10, 10])
    text = report(made_up("power", cases))
    summary = cells_of(text)
    assert summary["cartpole10"]["methods apart"] == "**cannot tell**"
    assert summary["cartpole10"]["why"].startswith("task-blind is not beaten")
    assert summary["lander"]["why"].startswith("the best method, VarShare, scores ")
    rows = cells_of(text, "## lander")
    assert list(rows) == ["task-blind", "varshare", "independent"]  # the control, then by their means
    best = [cases["lander", "varshare@0.003", seed] for seed in range(5)]
    row = rows["varshare"]
    assert row["runs"] == "5" and row["against task-blind"] == "better"
    assert row["mean at the best"] == mean_interval(np.mean(best, axis=1)).text()
    assert row["its worst task"] == mean_interval(np.min(best, axis=1)).text()
    assert rows["task-blind"]["mean at the best"].startswith("-8")
    with Image.open("results/studies/power/power.png") as image:
        image.load()
