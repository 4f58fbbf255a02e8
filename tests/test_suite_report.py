"""Tests of what report.py makes of many runs: tables, figures and verdicts, on made-up numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import report
from report import Scores

SAC = ["varshare-ppo", "varshare-sac"]  # a suite of their own
METHODS = [method for method in report.TITLES if method not in SAC]
TASKS = ["a", "b", "c"]
LAYERS = ["actor.0", "critic.0"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures are drawn in a fraction of the time."""
    monkeypatch.setitem(report.STYLE, "savefig.dpi", 30)


def write_run(folder, env, method, seed, final, mu_norm=1.0, steps=1000, evaluations=True, success=False):
    """A finished run whose returns rise linearly to the final ones; final is (task,)."""
    name = f"suite__{env}__{steps}__{method}__{seed}"
    folder = folder / name
    folder.mkdir(parents=True)
    args = {"env_id": env, "total_timesteps": steps, "exp_name": method, "seed": seed}
    config = {"script": "a.py", "args": args, "task_names": TASKS, "git_commit": "abc", "hardware": "abacus"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = ["global_step,metric,task,value"]

    def log(step, metric, values):
        lines.extend(f"{step},{metric},{task},{x}" for task, x in zip(TASKS, values))
        lines.append(f"{step},{metric},mean,{np.mean(values)}")

    for step in range(100, steps + 1, 100):
        log(step, "charts/episodic_return", final * step / steps)
        log(step, "charts/wall_time", np.full(3, step / 10))
        log(step, "charts/SPS", np.full(3, 10.0))
        if method == "independent":  # the only one to have a theta of every task
            log(step, "varshare/theta_norm", np.full(3, 2.0))
        else:
            lines.append(f"{step},varshare/theta_norm,mean,2.0")
        if method in report.RESIDUAL:
            log(step, "varshare/mu_norm", np.full(3, mu_norm))
            for layer in LAYERS:
                log(step, f"varshare/sharing_ratio/{layer}", np.full(3, 0.9))
        if evaluations and step % 200 == 0 and step < steps:
            log(step, "eval/episodic_return", final * step / steps)
    log(steps, "eval/episodic_return", final)
    if success:
        log(steps, "eval/success_rate", np.array([1.0, 0.5, 0.0]))
    (folder / "heartbeat.csv").write_text("\n".join(lines) + "\n")
    agent = {"theta": torch.ones(5), "return_stats": torch.zeros(3, 3), "obs_norm.std": torch.ones(4)}
    if method in report.RESIDUAL:  # what they have in common is to make no difference
        mu = torch.tensor([[1.0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]])
        common = torch.tensor([seed, 0.0, 1, 0, 2])
        agent["mu"] = mu_norm * (mu - mu.mean(0)) + common
        agent["theta"] -= common
    torch.save({"kind": "model", "agent": agent}, folder / "model.pt")
    return name


def write_suite(folder, means, env="cartpole10", runs=6, spread=5.0, **options):
    """Runs of methods with these mean returns; tasks differ by 0, 10 and 20. Returns the runs' names."""
    rng = np.random.default_rng(0)
    names = []
    for method, mean in means.items():
        for seed in range(runs):
            final = mean + spread * rng.normal() + np.array([-10.0, 0.0, 10.0])
            names.append(write_run(folder, env, method, seed, final, **options))
    (folder / "suite.tsv").write_text("".join(f"{name}\tscript.py --flags\n" for name in names))
    return names


def scores(final, curve=None, steps=(100, 200)):
    final = pd.DataFrame(np.asarray(final, float))
    curve = pd.DataFrame(
        np.zeros((len(final), 2)) if curve is None else np.asarray(curve, float), columns=steps
    )
    return Scores(final, curve, curve)


def test_a_run_is_the_unit():
    """Tasks of a run that all are the same say no more than one task does."""
    runs = np.random.default_rng(0).normal(size=(10, 1))
    one, many = (report.mean_interval(scores(np.repeat(runs, n, axis=1)).means) for n in (1, 50))
    assert one == pytest.approx(many) and one.low < runs.mean() < one.high


def test_improvement_counts_pairs_of_runs_within_tasks():
    x, y = pd.DataFrame([[3.0, 1.0], [5.0, 1.0]]), pd.DataFrame([[4.0, 1.0], [2.0, 1.0]])
    assert report.improvement(x, y) == ((1 + 2) / 4 + 0.5) / 2  # first task: 3 of 4 pairs; second: ties
    assert report.improvement(y, x) == 1 - report.improvement(x, y)


def test_steps_to_a_target():
    s = scores(np.zeros((2, 1)), [[10, 50, 90], [10, 20, 30]], (100, 200, 300))
    assert report.steps_to(s, 50).tolist() == [200, np.inf]
    assert report.area(s).tolist() == [50, 20]
    assert report.area(scores(np.zeros((1, 1)), [[0, 10, 10]], (100, 200, 400))).tolist() == [25 / 3]


def test_a_suite_and_the_same_again_from_its_csv(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    means = {method: 100.0 + 20 * i for i, method in enumerate(METHODS)}
    write_suite(tmp_path / "runs", means, success=True)
    report.main((tmp_path / "runs",), suite="suite")
    out = tmp_path / "results/suite"
    table = (out / "table.md").read_text()
    order = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][2:]
    assert order == ["Task-blind", *(report.TITLES[method] for method in reversed(METHODS[1:]))]  # best first
    assert table.startswith("- cartpole10, 1,000 steps: **this suite can tell methods apart**")
    runs = pd.read_csv(out / "runs.csv")
    cagrad = runs[(runs.method == "cagrad") & (runs.metric == "eval/episodic_return") & (runs.task != "mean")]
    head, _, *lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[1:-1]] for line in lines}
    columns = [x.strip() for x in head.split("|")[1:-1]]
    row = dict(zip(columns, rows["CAGrad"]))
    mean = report.mean_interval(cagrad.groupby("seed").value.mean())
    assert row["runs"] == "6" and row["mean"] == mean.text()
    assert row["worst task"] == report.mean_interval(cagrad.groupby("seed").value.min()).text()
    assert row["success"] == "50%" and row["against task-blind"] == "better"
    blind = runs[(runs.method == "task-blind") & (runs.metric == "eval/episodic_return")]
    blind = blind[(blind.task == "mean") & (blind.step == 1000)]
    assert row["minus task-blind"].split(" ")[0] == f"{mean.center - blind.value.mean():.1f}"
    assert row["area under evaluations"].split(" ")[0] == f"{mean.center * 0.6:.1f}"  # 0.2, 0.4, ... 1
    assert row["steps to 400 (median)"] == "- [-, -]" and row["runs that get there"] == "0 of 6"
    assert [*row.values()][-4:] == ["0", "5", "100.0", "10"]
    assert rows["VarShare"][-4:-2] == ["5", "20"]
    assert set(rows["Task-blind"][columns.index("minus task-blind") :][:3]) == {""}
    pictures = sorted(out.glob("*.png"))
    assert [p.name.split("_")[0] for p in pictures] == ["curves", "improvement", "sharing", "tasks"]
    for path in pictures:
        with Image.open(path) as image:
            image.load()
    claims = (out / "claims.md").read_text()
    assert "## C1" in claims and "**not supported**" in claims

    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in out.iterdir():
        if path.suffix not in (".csv", ".txt"):
            path.unlink()
    report.main((out,))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents


def test_older_names_of_layers_and_norms_of_every_task_make_no_difference(tmp_path, monkeypatch):
    """results/*/runs.csv may have actor_0 for actor.0, and a theta_norm of every task."""
    monkeypatch.chdir(tmp_path)
    for suite, env, norm in (("cartpole", "cartpole10", 1.0), ("identical", "cartpole-identical10", 0.5)):
        write_suite(tmp_path / suite, {"varshare": 100}, env=env, runs=3, mu_norm=norm)
        report.main((tmp_path / suite,), suite="suite", out=tmp_path / "results" / suite)
    out = tmp_path / "results/identical"
    claims, runs = (out / "claims.md").read_text(), pd.read_csv(out / "runs.csv")
    assert "## C8" in claims and "quotient 0.50" in claims  # as the norms, and whatever the gauge
    older = runs.assign(metric=runs.metric.str.replace(r"(actor|critic)\.", r"\1_", regex=True))
    assert set(older.metric) - set(runs.metric) == {
        f"varshare/sharing_ratio/{x}_0" for x in ("actor", "critic")
    }
    norms = older[older.metric == "varshare/theta_norm"]
    assert set(norms.task) == {"mean"}
    older = pd.concat([older, *(norms.assign(task=task) for task in TASKS)])
    mixed = pd.concat([runs[runs.seed == 0], older[older.seed > 0]])
    for table in (runs, older, mixed):
        figure = report.plot_sharing_map(table, "title")
        assert [x.get_text() for x in figure.axes[1].get_yticklabels()] == LAYERS
        assert (figure.axes[1].get_images()[0].get_array() == 0.9).all()
        table.to_csv(out / "runs.csv", index=False)
        report.main((out,))
        assert (out / "claims.md").read_text() == claims


@pytest.mark.parametrize("suite", ["cartpole", "identical", "sac"])
def test_the_committed_results_can_be_read(suite):
    runs = pd.read_csv(Path(report.__file__).parent / "results" / suite / "runs.csv")
    for _, group in runs.groupby(["env", "steps"]):
        figure = report.plot_sharing_map(group, "title")
        maps = [ax for ax in figure.axes if "sharing ratio" in ax.get_title()]
        layers = {x.get_text() for ax in maps for x in ax.get_yticklabels()}
        assert {"actor.0", "actor.1", "actor.2"} < layers and not any("_" in x for x in layers)


def test_partial_results_are_reported_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = write_suite(tmp_path / "runs", {"varshare": 100, "pcgrad": 90}, runs=2)
    (tmp_path / "runs" / names[0] / "model.pt").unlink()
    for name in names[2:]:  # a whole method
        (tmp_path / "runs" / name / "model.pt").unlink()
    report.main((tmp_path / "runs",), suite="suite")
    table = (tmp_path / "results/suite/table.md").read_text()
    assert (tmp_path / "results/suite/missing.txt").read_text().split()[0] == names[0]
    assert (
        f"Missing: 3 runs, as {names[0]}" in table and "| VarShare | 1 |" in table and "PCGrad" not in table
    )
    with pytest.raises(SystemExit) as stop:
        report.main((tmp_path / "runs",), suite="other")
    assert stop.value.code == 2


def test_no_verdict_where_settings_were_not_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    means = {"task-blind": 10, "varshare": 100, "pcgrad": 90}
    write_suite(tmp_path / "runs", means, env="lunarlander20", runs=3)
    report.main((tmp_path / "runs",), suite="suite")
    claims = (tmp_path / "results/suite/claims.md").read_text()
    assert "no verdict" in claims and "supported" not in claims


def test_no_axes_have_more_than_eight_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path / "runs", dict.fromkeys(METHODS, 100.0), runs=2)
    report.collect(tmp_path / "runs", "suite", tmp_path / "out")
    figure = report.plot_curves(pd.read_csv(tmp_path / "out/runs.csv"), "title")
    assert figure.axes[0].get_ylabel() == "evaluation, mean over tasks"
    drawn = [[line.get_label() for line in ax.get_lines()] for ax in figure.axes]
    assert max(map(len, drawn)) <= report.MAX_CURVES
    assert {name for names in drawn for name in names} == {report.TITLES[method] for method in METHODS}
    colors = [report.color_of(method) for method in METHODS]
    for names in drawn:
        assert len({colors[list(report.TITLES.values()).index(name)] for name in names}) == len(names)


def make_scores(**means):
    rng = np.random.default_rng(0)
    names = {name.replace("_", "-"): mean for name, mean in means.items()}
    return {name: scores(mean + rng.normal(size=(10, 1)) + np.zeros((1, 3))) for name, mean in names.items()}


def test_verdicts_on_claim_1():
    best = make_scores(varshare=100, l2soft=100, pcgrad=90, hard_sharing=80)
    assert report.claim_1(best).startswith("**supported**")
    assert report.claim_1(best | make_scores(contextual=110)).startswith(
        "**supported in 4 of 6 comparisons**"
    )
    assert report.claim_1(make_scores(varshare=50, pcgrad=90)).startswith("**not supported**")
    text = report.claim_1(make_scores(varshare=100, pcgrad=99))  # significant, of no importance
    assert text.startswith("**not supported**") and "| the same |" in text
    assert report.claim_1(make_scores(varshare=100)) is None
    single = {name: scores(s.final[:1]) for name, s in best.items()}
    text = report.claim_1(single)
    assert text.startswith("**not decided**") and "| undecided |" in text


def test_no_verdict_where_task_blind_does_as_well(tmp_path, monkeypatch):
    """However far the methods are apart among themselves."""
    monkeypatch.chdir(tmp_path)
    for blind, able in ((100, False), (60, True)):
        means = {"task-blind": blind, "varshare": 100, "l2soft": 99, "pcgrad": 50}
        write_suite(tmp_path / str(blind), means)
        report.main((tmp_path / str(blind),), suite="suite", out=tmp_path / f"out{blind}")
        claims, table = ((tmp_path / f"out{blind}" / name).read_text() for name in ("claims.md", "table.md"))
        assert ("**this suite cannot tell**" in claims) != able and ("## C1 (" in claims) == able
        assert f"this suite {'can' if able else 'cannot'} tell methods apart" in table.splitlines()[0]


def test_verdicts_on_claim_2():
    assert report.claim_2(make_scores(varshare=100, l2soft=101)).startswith("**supported**")
    assert report.claim_2(make_scores(varshare=100, l2soft=50)).startswith("**not supported**")
    both = {"varshare_recentred": 100, "l2soft_recentred": 99}
    assert report.claim_2(make_scores(varshare=103, l2soft=100, **both)).startswith("**supported**")
    assert report.claim_2(make_scores(varshare=50, l2soft=100, **both)).startswith("**not supported**")
    unclear = {"varshare": scores([[0.0], [200.0]]), "l2soft": scores([[10.0], [195.0]])}
    assert report.claim_2(unclear).startswith("**not decided**")
    assert report.claim_2(make_scores(varshare=100)) is None


def test_verdicts_on_claim_6(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def both(sac, ppo):  # runs that reach 100 after so many of 1000 steps
        steps, names = np.arange(100, 1001, 100), dict(zip(SAC, (ppo, sac)))
        curves = {name: [100.0 * (steps >= s) for s in reached] for name, reached in names.items()}
        return {name: scores(np.full((5, 3), 100.0), np.array(c), steps) for name, c in curves.items()}

    fast, slow = [200, 200, 200, 300, 300], [800, 800, 900, 900, 900]
    text = report.claim_6(both(fast, slow), 80)
    assert text.startswith("**supported**") and "median 200 [" in text
    assert report.claim_6(both(slow, fast), 80).startswith("**not supported: PPO needs fewer**")
    assert report.claim_6(both(slow, [200, 900, 900, 900, 9999]), 80).startswith("**not decided**")
    never = report.claim_6(both([9999] * 5, slow), 80)
    assert never.startswith("**not supported") and "reached in 0 of 5" in never
    assert report.claim_6(both(fast, slow), None).startswith("**not decided**")
    assert report.claim_6(make_scores(varshare_ppo=1), 80) is None
    write_suite(tmp_path / "runs", dict.fromkeys(SAC, 100.0), runs=3)
    report.main((tmp_path / "runs",), suite="suite")
    claims = Path("results/suite/claims.md").read_text()
    assert "## C6" in claims and "## C1" not in claims and list(Path("results/suite").glob("cost_*.png"))


@pytest.mark.parametrize(
    ("identical", "verdict"),
    [(0.01, "**supported**"), (0.5, "**not supported: smaller"), (1.5, "**not supported**")],
)
def test_verdicts_on_claim_8(tmp_path, monkeypatch, identical, verdict):
    monkeypatch.chdir(tmp_path)
    for name, env, norm in (("cartpole", "cartpole10", 1.0), ("suite", "cartpole-identical10", identical)):
        write_suite(tmp_path / name, {"varshare": 100}, env=env, runs=3, mu_norm=norm)
        report.main((tmp_path / name,), suite="suite", out=Path("results", name))
    claims = Path("results/suite/claims.md").read_text()
    assert "## C8" in claims and verdict in claims and "## C1" not in claims
    assert claims.startswith("- cartpole-identical10, 1,000 steps: **this suite cannot tell")
    runs = pd.read_csv("results/suite/runs.csv")  # as collected before
    runs[runs.metric != "residual/ratio"].to_csv("results/suite/runs.csv", index=False)
    report.main((Path("results/suite"),))
    assert "**not decided**" in Path("results/suite/claims.md").read_text()
    assert list(Path("results/suite").glob("residuals_*.png"))
