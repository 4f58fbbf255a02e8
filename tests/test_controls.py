"""Tables of the control suites and of the noise suite, from made-up runs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bench import controls, noise
from bench.statistics import mean_interval
from bench.style import STYLE

TASKS = ["a", "b"]


def write_run(suite, env, method, seed, final, steps=500_000):
    """A finished run with an evaluation on the way, which is not to count; final is (task,)."""
    folder = Path("runs", f"{suite}__{env}__{method}__{seed}")
    folder.mkdir(parents=True)
    args = {"env_id": env, "total_timesteps": steps, "exp_name": method, "seed": seed}
    (folder / "config.json").write_text(json.dumps({"args": args, "git_commit": "abc", "hardware": "abacus"}))
    lines = ["global_step,metric,task,value"]
    for step, values in ((steps // 2, [-1.0, -1.0]), (steps, final)):
        for task, value in zip([*TASKS, "mean"], [*values, np.mean(values)]):
            lines += [f"{step},eval/episodic_return,{task},{value}", f"{step},charts/SPS,{task},5"]
            lines += [f"{step},eval/success_rate,{task},{value / 1000}"] * (env == "lander")
    (folder / "heartbeat.csv").write_text("\n".join(lines) + "\n")
    (folder / "model.pt").touch()


def rows_of(text, env):
    """Rows of the table below the heading of an environment, by their first cell."""
    lines = text.split(f"## {env}")[1].split("## ")[0].splitlines()
    table = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(table[0], row)) for row in table[2:]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(controls, "ROOT", tmp_path)
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)  # pictures are drawn in a fraction of the time
    return tmp_path


def table(suite):
    text = controls.main(suite)
    assert Path("results", suite, "table.md").read_text() == text
    for model in Path("runs").glob("*/model.pt"):
        model.unlink()
    assert controls.main(suite) == text  # from runs.csv alone
    assert Path("results", suite, "table.md").read_text() == text
    return text


def test_power_takes_each_methods_best_step_size_and_says_whether_a_suite_can_tell():
    rng = np.random.default_rng(0)
    means = {"cartpole10": {"task-blind": (390, 480), "varshare": (470, 482)}}
    means["lander"] = {"task-blind": (-100, -90), "varshare": (100, 50), "hard-sharing": (60, 20)}
    for env, methods in means.items():
        for (method, both), seed in ((x, s) for x in methods.items() for s in range(5)):
            for rate, mean in zip(("0.003", "0.012"), both):
                write_run(
                    "power", env, f"{method}@{rate}", seed, mean + 4 * rng.normal() + np.array([-10, 10])
                )
    text = table("power")
    assert text.splitlines()[2].startswith(
        "| cartpole10 | 500,000 | **cannot tell** | task-blind is not beaten"
    )
    with Image.open("results/power/power.png") as image:
        image.load()
    assert text.splitlines()[3].startswith("| lander | 500,000 | can tell | the best method, varshare, has ")
    rows = rows_of(text, "lander")
    assert list(rows) == ["task-blind", "varshare", "hard-sharing"]  # the control, then by their means
    runs = pd.read_csv("results/power/runs.csv")
    best = runs[(runs.env == "lander") & (runs.method == "varshare") & (runs.setting == 0.003)]
    best = best[best.metric == "eval/episodic_return"]
    mean = best[(best.task == "mean") & (best.step == 500_000)].value
    row = rows["varshare"]
    assert row["runs"] == "5" and row["against task-blind"] == "better"
    assert row["mean at the best"] == mean_interval(mean).text()
    assert row["its worst task"].startswith(f"{best[best.task == 'a'].value.mean():.1f} [")
    assert row["success"] == f"{mean.mean() / 1000:.0%}"
    assert rows["task-blind"]["minus task-blind"] == rows["task-blind"]["against task-blind"] == ""
    assert rows["task-blind"]["mean at the best"].startswith("-8")


def test_a_grid_that_is_not_complete_is_reported_as_far_as_it_went():
    for seed in (1, 2):
        write_run("power", "cartpole10", "varshare@0.003", seed, [100.0, 90.0 + seed])
    text = table("power")
    for seed in (1, 2):
        write_run("normalisation", "goals", "varshare@none", seed, [100.0, 100.0])
        write_run("normalisation", "goals", "varshare@obs", seed, [110.0, 110.0])
    write_run("normalisation", "goals", "l2soft@value", 1, [50.0, 50.0])
    assert "**cannot tell** | there is nothing to compare" in text
    assert rows_of(text, "cartpole10")["varshare"]["minus task-blind"] == ""
    rows = rows_of(table("normalisation"), "goals")
    assert list(rows["varshare"].values())[1:] == ["100.0 +- 0.0", "110.0 +- 0.0", "", ""]
    assert list(rows["mean gain over none"].values())[2] == "+10.0"


def test_serial_compares_one_environment_with_eight_and_measures_embeddings():
    for seed in range(4):
        for env, gain in (("goals", 50.0), ("same", 0.0)):
            for method in ("varshare", "contextual"):
                for number in ("1", "8"):
                    final = np.array([90.0, 110.0]) + seed + gain * (number == "8") * (method == "varshare")
                    write_run("serial", env, f"{method}@{number}", seed, final)
                    folder = Path("runs", f"serial__{env}__{method}@{number}__{seed}")
                    if method == "contextual":
                        config = json.loads((folder / "config.json").read_text())
                        config["args"]["embedding_std"] = 0.5
                        (folder / "config.json").write_text(json.dumps(config))
                        spread = 2.0 if env == "goals" else 0.25
                        embedding = spread * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2**0.5 + seed
                        torch.save({"agent": {"embedding": embedding}}, folder / "model.pt")
    text = table("serial")
    assert rows_of(text, "goals")["VarShare"]["8 minus 1"] == "50.0 [50.0, 50.0]"
    assert rows_of(text, "same")["VarShare"]["8 minus 1"] == "0.0 [0.0, 0.0]"
    assert rows_of(text, "goals")["VarShare"]["1 environment"].startswith("101.5 [")
    assert rows_of(text, "goals")["Contextual"]["worst task, 8"].startswith("91.5 [")
    assert "| goals | 1 | 4.00 [4.00, 4.00] |" in text and "| same | 8 | 0.50 [0.50, 0.50] |" in text
    with Image.open("results/serial/serial.png") as image:
        image.load()


def test_ranks_are_compared_with_full_rank():
    for seed in range(4):
        for setting, final in (("1", 80.0), ("8", 99.0)):
            write_run("ranks", "goals", f"varshare-lora@{setting}", seed, [final + seed, final + seed])
        write_run("ranks", "goals", "varshare@full", seed, [100.0 + seed, 100.0 + seed])
    lines = [line for line in table("ranks").splitlines() if line.startswith("| VarShare")]
    assert (
        sum("| -20.0 [-20.0, -20.0] |" in x for x in lines)
        == sum("| -1.0 [-1.0, -1.0] |" in x for x in lines)
        == 1
    )
    assert any(line.startswith("| VarShare | full | 101.5") and line.endswith("|  |") for line in lines)


def test_ceilings_are_those_of_every_task_and_known_to_the_reports():
    for seed, last in ((1, 300.0), (2, 200.0), (3, 400.0)):
        write_run("ceilings", "goals", "independent", seed, [100.0 * seed, last])
    rows = rows_of(table("ceilings"), "goals")
    assert list(rows["a"].values()) == ["a", "100", "200", "300", "200", "300"]
    assert list(rows["b"].values()) == ["b", "300", "200", "400", "300", "400"]
    assert controls.ceiling("goals") == pytest.approx(350) and controls.ceiling("cartpole10") == 500
    assert controls.ceiling("elsewhere") is None


def test_normalisation_says_what_either_adds():
    gains = {"none": 0, "obs": -10, "value": 30, "obs+value": 20}
    for method, seed in ((m, s) for m in ("l2soft", "varshare") for s in (101, 102)):
        for norm, gain in gains.items():
            mean = 100 * seed + gain * (1 + (method == "varshare"))
            write_run("normalisation", "goals", f"{method}@{norm}", seed, [mean, mean])
    rows = rows_of(table("normalisation"), "goals")
    assert list(rows["l2soft"].values())[1:] == [f"{10150 + x:.1f} +- 70.7" for x in gains.values()]
    assert list(rows["mean gain over none"].values())[2:] == ["-15.0", "+45.0", "+30.0"]


def test_noise_says_what_differs_between_settings_best_first():
    """beta and lambda only where a method has them; how noisy it is beside its return."""
    methods = {"l2soft@0.01": (100, None), "varshare@0.01,0.001": (130, 0.02), "varshare@0.01,1": (60, 0.5)}
    for (name, (mean, sigma)), seed in ((x, seed) for x in methods.items() for seed in (101, 102)):
        folder = Path("runs", f"noise__goals__500000__{name}__{seed}")
        folder.mkdir(parents=True)
        args = {"exp_name": name, "env_id": "goals", "total_timesteps": 500_000, "seed": seed}
        args |= {"beta": float(name.partition(",")[2])} if sigma else {"l2_coef": 0.01}
        config = {"args": args, "git_commit": "abc", "hardware": "abacus"}
        (folder / "config.json").write_text(json.dumps(config))
        lines = ["global_step,metric,task,value"]
        for step, share in ((1, 0.5), (2, 1.0)):  # of the clipped fraction the mean counts, else the last
            for task, value in (("a", mean - 10), ("b", mean + 10), ("mean", mean)):
                lines.append(f"{step},eval/episodic_return,{task},{share * value + seed - 101}")
            lines.append(f"{step},losses/clipfrac_first_minibatch,mean,{0.02 * share}")
            lines += [f"{step},varshare/sigma,mean,{sigma * share}"] if sigma else []
        (folder / "heartbeat.csv").write_text("\n".join(lines) + "\n")
        (folder / "model.pt").touch()
    unfinished = Path("runs/noise__goals__500000__l2soft@0.01__103")
    unfinished.mkdir()
    (unfinished / "config.json").write_text(json.dumps(config))
    text = noise.main()
    assert Path("results/noise/table.md").read_text() == text
    for model in Path("runs").glob("*/model.pt"):
        model.unlink()
    assert noise.main() == text  # from runs.csv alone
    table = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines()]
    del table[1]
    assert table == [
        ["exp_name", "beta", "seeds", "return", "std over seeds", "worst seed", "worst task"]
        + ["clipped at first minibatch", "sigma at end"],
        ["varshare", "0.001", "2", "130.5", "0.7", "130.0", "120.5", "1.50 %", "0.0200"],
        ["l2soft", "-", "2", "100.5", "0.7", "100.0", "90.5", "1.50 %", ""],
        ["varshare", "1.0", "2", "60.5", "0.7", "60.0", "50.5", "1.50 %", "0.5000"],
    ]


def test_recipes_by_success_and_runs_of_another_time_stay():
    for setting, mean in {"base": 400, "2-environments": 600}.items():
        for seed in (101, 102):
            write_run("recipe", "lander", f"hard-sharing@{setting}", seed, [mean - 100.0, mean + 100.0])
    rows = rows_of(table("recipe"), "lander")  # which unlinks the models
    assert list(rows) == ["2 environments", "base"]
    assert list(rows["base"].values())[1:] == ["2", "40.0 [40.0, 40.0]", "", "", "30", "50"]
    assert rows["2 environments"]["minus base, same seeds"] == "20.0 [20.0, 20.0]"
    write_run("recipe", "lander", "hard-sharing@base", 103, [700.0, 900.0])
    Path("runs/recipe__lander__hard-sharing@2-environments__101/model.pt").touch()  # again, not twice
    rows = rows_of(table("recipe"), "lander")
    assert rows["base"]["runs"] == "3" and rows["base"]["success, %"].startswith("53.3 [")
    assert rows["2 environments"]["runs"] == "2" and rows["2 environments"]["a"] == "50"
