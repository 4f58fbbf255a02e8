"""One environment of each task beside eight, and embeddings."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from bench.collect import Run
from studies.conftest import cells_of, made_up
from studies.serial.__main__ import SPREAD, report, rows_of


def test_serial_compares_one_environment_with_eight():
    cases = {}
    for seed, env in ((s, e) for s in range(4) for e in ("goals", "same")):
        for method, number in ((m, n) for m in ("varshare", "contextual") for n in "18"):
            gain = 50.0 * (number == "8" and method == "varshare" and env == "goals")
            cases[env, f"{method}@{number}", seed] = np.array([90.0, 110.0]) + seed + gain
    runs = made_up("serial", cases)
    spread = runs[(runs.task == "mean") & (runs.method == "contextual") & (runs.step == 1000)]
    text = report(pd.concat([runs, spread.assign(metric=SPREAD, value=0.5)]))
    assert cells_of(text, "## goals")["VarShare"]["8 minus 1"] == "50.0 [50.0, 50.0]"
    assert cells_of(text, "## same")["VarShare"]["8 minus 1"] == "0.0 [0.0, 0.0]"
    assert cells_of(text, "## goals")["VarShare"]["1 environment"].startswith("101.5 [")
    assert cells_of(text, "## goals")["Contextual"]["worst task, 8"].startswith("91.5 [")
    assert "| Contextual | 8 | -50.0 [-50.0, -50.0] | 0 | worse |" in text
    assert "| same | 8 | 0.50 [0.50, 0.50] |" in text
    with Image.open("results/studies/serial/serial.png") as image:
        image.load()


def test_the_spread_of_embeddings_is_over_that_of_their_draws():
    config = {"args": {"embedding_std": 0.5}, "task_names": ["a", "b"]}
    Path("config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"agent": {"embedding": 2 * torch.tensor([[1.0, -1], [-1, 1]]) / 2**0.5 + 3}}, "model.pt")
    log = pd.DataFrame([(9, "eval/episodic_return", "mean", 1.0)])
    run = Run(Path(), config, log.set_axis(["global_step", "metric", "task", "value"], axis=1))
    assert round(rows_of(run).set_index("metric").value[SPREAD], 4) == 4.0
