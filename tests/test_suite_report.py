"""Tests of what is made of the runs of suites: CSVs, tables, figures and verdicts, on made-up numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import report
from bench import claims, figures
from bench.collect import collect
from bench.methods import METHODS
from bench.statistics import BLIND, difference, holm, mean_interval
from bench.style import MAX_CURVES, STYLE
from bench.suite_report import write_claims, write_suite
from bench.suites import SETTINGS, Suite
from bench.tables import Scores, improvement, make_table, title_of

SAC = ("varshare-sac", "varshare")
SPACES = [m.name for m in METHODS.values() if m.space and m.script.endswith("_ppo.py")]
PORTFOLIO = [m for m in SPACES if METHODS[m].family in figures.PORTFOLIO]
PPO = [m for m in SPACES if m not in PORTFOLIO]  # all that are compared
RESIDUAL = [m for m in PPO if METHODS[m].family in ("varshare", "l2soft")]
TASKS = ["near", "far", "edge"]
RATIOS = {"actor.0": 0.9, "critic.0": 0.9999}  # sharing ratio of the layers
MOVED = 3.0  # |theta - theta_0| at the end
# without what they have in common: (1, -1/3), (-1, -1/3), (0, 2/3)
MU = torch.tensor([[1.0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs and results are below an empty folder, and pictures drawn in a fraction of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)


def write_run(job, method, env_id, steps, seed, final, mu_norm, success):
    """A finished run whose returns rise linearly to the final ones; final is (task,).

    success: whether it is in the final evaluation, or "always", where the better the return the less of it.
    """
    folder = Path("runs", job.name)
    folder.mkdir(parents=True)
    (folder / "command").write_text(job.command + "\n")
    args = {"env_id": env_id, "total_timesteps": steps, "exp_name": method, "seed": seed}
    config = {"script": METHODS[method].script, "args": args, "task_names": TASKS}
    config |= {"git_commit": "abc", "hardware": "abacus"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = ["global_step,metric,task,value"]
    group = "varshare" if METHODS[method].family == "varshare" else "method"

    def log(step, metric, values):
        lines.extend(f"{step},{metric},{task},{x}" for task, x in zip(TASKS, values))
        lines.append(f"{step},{metric},mean,{np.mean(values)}")

    for share in np.arange(1, 11) / 10:
        step = round(share * steps)
        log(step, "charts/episodic_return", final * share)
        lines.append(f"{step},charts/wall_time,mean,{100 * share**2}")  # slow at first
        lines.append(f"{step},charts/SPS,mean,10")
        if method == "independent":  # the only one to have a theta of every task
            log(step, f"{group}/theta_norm", np.full(3, 2.0))
        else:
            lines.append(f"{step},{group}/theta_norm,mean,2.0")
        if METHODS[method].family in ("varshare", "l2soft"):
            lines.append(f"{step},{group}/theta_moved,mean,{MOVED * share}")
            log(step, f"{group}/mu_norm", np.full(3, mu_norm * share))
            for layer, ratio in RATIOS.items():
                log(step, f"{group}/sharing_ratio/{layer}", np.full(3, ratio))
        if round(10 * share) % 2 == 0 and share < 1:
            log(step, "eval/episodic_return", final * share)
            if success == "always":
                log(step, "eval/success_rate", 1 - final / 200)
        if success == "always":
            log(step, "charts/success_rate", 0.5 * share * (1 - final / 200))
    log(steps, "eval/episodic_return", final)
    if success == "always":
        log(steps, "eval/success_rate", 1 - final / 200)
    elif success:
        log(steps, "eval/success_rate", np.array([1.0, 0.5, 0.0]))
    (folder / "heartbeat.csv").write_text("\n".join(lines) + "\n")
    agent = {"theta": torch.ones(5), "return_stats": torch.zeros(3, 3), "obs_norm.std": torch.ones(4)}
    if method == "independent":
        agent["theta"] = torch.ones(3, 5)
    if METHODS[method].family in ("varshare", "l2soft"):  # what they have in common is to make no difference
        common = torch.tensor([seed, 0.0, 1, 0, 2])
        agent["mu"] = mu_norm * (MU - MU.mean(0)) + common
        agent["theta"] -= common
        agent["sigma"] = torch.ones(3, 5)
    torch.save({"kind": "model", "agent": agent}, folder / "model.pt")


def write_runs(
    name, means, env_id="cartpole10", seeds=6, steps=1000, spread=5.0, mu_norm=1.0, success=False, settings=""
):
    """A suite whose methods have these mean returns, the tasks 10 apart, and what a search chose for them."""
    rng = np.random.default_rng(0)
    options = {"settings": settings, "score": "success" if success == "always" else "return"}
    suite = Suite(name, env_id, steps=steps, seeds=seeds, methods=tuple(means), **options)
    chosen = pd.DataFrame({"suite": name, "method": list(means), "settings": "--learning-rate 0.01"})
    SETTINGS.parent.mkdir(parents=True, exist_ok=True)
    chosen.to_csv(SETTINGS, mode="a", header=not SETTINGS.exists(), index=False)
    finals = {  # a method's seeds together, so that methods do not depend on one another
        (m, s): mean + spread * rng.normal() + np.array([0, -10, 10.0])
        for m, mean in means.items()
        for s in range(1, seeds + 1)
    }
    for job, (method, seed) in zip(suite.jobs(), suite.pairs()):
        write_run(job, method, env_id, steps, seed, finals[method, seed], mu_norm, success)
    return suite


def collected(name, means, **options):
    """The same collected; returns results/NAME."""
    collect(write_runs(name, means, **options), Path("results", name))
    return Path("results", name)


def runs_of(folder):
    return pd.read_csv(folder / "runs.csv")


def scores(final, curve=None, steps=(100, 200)):
    final = pd.DataFrame(np.asarray(final, float))
    curve = np.zeros((len(final), 2)) if curve is None else np.asarray(curve, float)
    return Scores(final, pd.DataFrame(curve, columns=steps))


def make_scores(**means):
    rng = np.random.default_rng(0)
    names = {name.replace("_", "-"): mean for name, mean in means.items()}
    return {name: scores(mean + rng.normal(size=(10, 1)) + np.zeros((1, 3))) for name, mean in names.items()}


def cells_of(text):
    """The first table of a text: row by its first cell -> column -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(columns, row)) for row in rows}


def table_of(folder):
    result = claims.read_result(folder)
    return cells_of(make_table(result.runs, result.target))


def test_a_run_is_the_unit():
    """Tasks of a run that all are the same say no more than one task does."""
    runs = np.random.default_rng(0).normal(size=(10, 1))
    one, many = (mean_interval(scores(np.repeat(runs, n, axis=1)).means) for n in (1, 50))
    assert one == pytest.approx(many) and one.low < runs.mean() < one.high


def test_improvement_counts_pairs_of_runs_within_tasks():
    x, y = pd.DataFrame([[3.0, 1.0], [5.0, 1.0]]), pd.DataFrame([[4.0, 1.0], [2.0, 1.0]])
    assert improvement(x, y) == ((1 + 2) / 4 + 0.5) / 2  # first task: 3 of 4 pairs; second: ties
    assert improvement(y, x) == 1 - improvement(x, y)


def test_steps_to_a_target_and_area():
    s = scores(np.zeros((2, 1)), [[10, 50, 90], [10, 20, 30]], (100, 200, 300))
    assert s.steps_to(50).tolist() == [200, np.inf]
    assert s.area.tolist() == [50, 20]
    assert scores(np.zeros((1, 1)), [[0, 10, 10]], (100, 200, 400)).area.tolist() == [25 / 3]
    assert scores([[3, 1], [2, 5]]).worst.tolist() == [1, 2]


def test_a_suite_and_the_same_again_from_its_csvs(capsys):
    means = {"task-blind": 100, "cagrad": 160, "varshare": 140, "l2soft": 120}
    out = collected("suite", means, seeds=4, success=True)
    text = write_suite(out)
    assert text == (out / "table.md").read_text()
    assert text.splitlines()[0] == "# cartpole10, 1,000 steps"
    assert text.splitlines()[2].startswith("**This suite can tell methods apart**: the best method, CAGrad,")
    assert "16 runs, one core each (abacus; commit `abc`)" in text and "Missing" not in text
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["change.png", "curves.png", "sharing.png", "tasks.png"]
    for name in pictures:
        with Image.open(out / name) as image:
            image.load()

    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in (*out.glob("*.png"), out / "table.md", *Path("runs").glob("*/model.pt")):
        path.unlink()
    report.main((out,))
    assert capsys.readouterr().out == text + "\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents


def test_what_the_table_says():
    means = {method: 100.0 + 20 * i for i, method in enumerate(PPO)}
    out = collected("suite", means, success=True)
    runs, table = runs_of(out), table_of(out)
    others = [method for method in PPO if method != BLIND]
    assert list(table) == [title_of(m) for m in (BLIND, *reversed(others))]  # the control, then best first
    final = runs[(runs.metric == "eval/episodic_return") & (runs.step == 1000)]
    by_task = final[final.task != "mean"].groupby(["method", "seed"]).value
    returns = {method: by_task.mean()[method] for method in PPO}
    row, mean = table["CAGrad"], mean_interval(returns["cagrad"])
    assert abs(mean.center - means["cagrad"]) < 6 and row["runs"] == "6" and row["mean"] == mean.text()
    assert row["worst task"] == mean_interval(by_task.min()["cagrad"]).text()
    assert row["success"] == "50%"
    differences = [difference(returns[method], returns[BLIND]) for method in others]
    for method, d, p in zip(others, differences, holm([d.p for d in differences])):
        cells = table[title_of(method)]
        assert (cells["minus task-blind"], cells["p (Holm)"]) == (d.interval.text(), f"{p:.2g}")
        assert cells["against task-blind"] == ("better" if means[method] > means[BLIND] else "worse")
    control = table["Task-blind"]
    assert control["minus task-blind"] == control["p (Holm)"] == control["against task-blind"] == ""
    assert row["area under evaluations"].split(" ")[0] == f"{mean.center * 0.6:.1f}"  # 0.2, 0.4, ... 1
    assert row["steps to 400 (median)"] == "- [-, -]" and row["runs that get there"] == "0 of 6"
    assert [*row.values()][-4:] == ["0", "5", "100.0", "10"]  # one set of weights, and no task's own
    assert [*table["VarShare"].values()][-4:-2] == ["5", "20"]  # theta and mu, but not sigma
    assert [*table["Independent"].values()][-4:-2] == ["5", "15"]


def test_a_suite_that_is_scored_by_success():
    """Whose order is the reverse of that of the returns."""
    means = {"task-blind": 150, "varshare": 40, "l2soft": 100}
    out = collected("suite", means, env_id="mt10", success="always")
    runs, text = runs_of(out), write_suite(out)
    assert "**This suite can tell methods apart**: the best method, VarShare," in text
    table = cells_of(text)
    assert list(table) == ["Task-blind", "VarShare", "L2Soft"]
    final = runs[(runs.method == "varshare") & (runs.step == 1000) & (runs.task != "mean")]
    by_seed = {m: x.groupby("seed").value for m, x in final.groupby("metric")}
    success, worst = 100 * by_seed["eval/success_rate"].mean(), 100 * by_seed["eval/success_rate"].min()
    row = table["VarShare"]
    assert row["success, %"] == mean_interval(success).text() and abs(success.mean() - 80) < 2
    assert row["worst task"] == mean_interval(worst).text()
    assert row["return"] == mean_interval(by_seed["eval/episodic_return"].mean()).text()
    assert row["success in training, %"] == mean_interval(success / 2).text()  # of the last tenth only
    assert row["against task-blind"] == "better" and "success" not in row
    drawn = {line.get_label(): line for ax in figures.plot_curves(runs, "", None).axes for line in ax.lines}
    assert drawn["VarShare"].get_ydata() == pytest.approx([success.mean()] * 5, rel=1e-4)
    dots = figures.plot_tasks(runs, "mt10", None)
    assert "success in %" in dots.get_suptitle()
    lander = collected("lander", means, env_id="lunarlander20-goals", success="always")
    assert claims.read_result(lander).ceiling == 100  # of success, whatever is known of its returns
    assert "runs that get there" in row and "steps to 80 (median)" in row
    by_return = runs[runs.metric != "charts/success_rate"]
    assert "success in %" not in figures.plot_tasks(by_return, "mt10", None).get_suptitle()


def test_steps_to_the_threshold():
    """80 % of the 500 that cartpole10 allows; at 450 it is the evaluation at 1000 steps, of 200, ... 1000."""
    out = collected("suite", {"task-blind": 100, "varshare": 450, "l2soft": 510}, spread=1.0)
    table = table_of(out)
    assert table["VarShare"]["steps to 400 (median)"] == "1,000 [1,000, 1,000]"
    assert table["L2Soft"]["steps to 400 (median)"] == "800 [800, 800]"
    assert table["L2Soft"]["runs that get there"] == "6 of 6"
    runs_of(out).query("step == 1000").to_csv(out / "runs.csv", index=False)  # not evaluated on the way
    table = table_of(out)
    assert not any("steps to" in column or "area" in column for column in table["VarShare"])


def test_what_is_collected():
    out = collected("suite", {"varshare": 100, "independent": 90}, seeds=2)
    runs, configs = runs_of(out), pd.read_csv(out / "configs.csv")
    norms = runs[runs.metric.str.endswith("/theta_norm")]
    assert set(norms.task) == {"mean"} and set(norms.method) == {"varshare", "independent"}
    assert set(runs[runs.metric == "charts/wall_time"].step) == {1000}  # on the way only of SAC
    cosines = runs[(runs.metric == "cosine") & (runs.seed == 2)].set_index("task").value
    expected = {"near|far": -0.8, "near|edge": -1 / 10**0.5, "far|edge": -1 / 10**0.5}
    assert cosines.to_dict() == pytest.approx(expected, abs=1e-4)
    mu = (MU - MU.mean(0)).norm(dim=1).mean() / 5**0.5
    ratio = runs[runs.metric == "residual/ratio"].value  # whatever the residuals have in common
    assert ratio.to_numpy() == pytest.approx(float(mu), abs=1e-4)
    assert configs.finished.all() and configs[["method", "seed"]].to_numpy().tolist()[:2] == [
        ["varshare", 1],
        ["independent", 1],
    ]
    assert configs.command[0].startswith("varshare_ppo.py --exp-name varshare --env-id cartpole10")
    assert configs.command[0].endswith("--seed 1 --learning-rate 0.01 --eval-interval 100")


def test_partial_results_are_reported_with_what_is_missing(capsys):
    suite = write_runs("suite", {"varshare": 100, "pcgrad": 90}, seeds=2)
    for name in ("varshare__1", "pcgrad__1"):
        Path("runs", f"suite__{name}", "model.pt").unlink()
    Path("runs/suite__pcgrad__2/command").write_text("of other settings\n")
    collect(suite, Path("results/suite"))
    text = write_suite(Path("results/suite"))
    assert "Missing: 3 runs, as varshare, seed 1." in text and "1 run, one core each (abacus;" in text
    assert "cannot tell methods apart**: there is nothing to compare" in text
    assert "minus task-blind" not in text
    table = cells_of(text)
    assert list(table) == ["VarShare"] and table["VarShare"]["runs"] == "1"
    assert table["VarShare"]["mean"].endswith(" [-, -]")
    Path("runs/suite__varshare__2/model.pt").unlink()
    other = Suite("suite", "cartpole10", methods=("varshare", "cagrad"))
    for bad, message in ((suite, "no run of the suite suite has finished"), (other, "no settings of cagrad")):
        with pytest.raises(SystemExit) as stop:
            collect(bad, Path("results/bad"))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not Path("results/bad").exists()


def test_no_axes_have_more_than_eight_curves():
    means = dict.fromkeys(PPO, 100.0) | {"l2soft-recentred": 120.0}
    runs = runs_of(collected("suite", means, seeds=3))
    drawn = []
    for ax in figures.plot_curves(runs, "title", 500.0).axes:
        lines = {line.get_label(): line for line in ax.get_lines()}
        assert len(ax.get_lines()) == len(lines) <= MAX_CURVES
        assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == len(lines)
        assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
        drawn.append(lines)
    residual, others = (set(lines) - {"what the tasks allow"} for lines in drawn)
    assert residual == {title_of(method) for method in RESIDUAL}
    assert others == {title_of(m) for m in PPO if m not in RESIDUAL} | {"L2Soft, re-centred"}  # the best
    line = drawn[1]["L2Soft, re-centred"]
    rows = runs[(runs.method == "l2soft-recentred") & (runs.metric == "eval/episodic_return")]
    expected = rows[rows.task == "mean"].groupby("step").value.mean()
    assert line.get_xdata().tolist() == [200, 400, 600, 800, 1000]
    np.testing.assert_allclose(line.get_ydata(), expected)
    few = runs[runs.method.isin(["varshare", "l2soft"])]
    (ax,) = figures.plot_curves(few, "title", None).axes
    assert [line.get_label() for line in ax.get_lines()] == ["VarShare", "L2Soft"]


def test_two_runs_are_drawn_and_three_have_an_interval():
    for seeds in (2, 3):
        runs = runs_of(collected(f"suite{seeds}", {"varshare": 100.0}, seeds=seeds))
        figure = figures.plot_curves(runs, "title", None)
        (ax,) = figure.axes
        mean, *thin = ax.get_lines()
        assert (len(thin), len(ax.collections)) == ((2, 0) if seeds == 2 else (0, 1))
        assert ("thin lines are runs" if thin else "95 % intervals") in figure.get_suptitle()
        if thin:
            expected = np.mean([line.get_ydata() for line in thin], axis=0)
            np.testing.assert_allclose(mean.get_ydata(), expected)


def test_variants_have_a_figure_of_their_own():
    means = {m: 100.0 + 30 * i for i, m in enumerate(PORTFOLIO)} | dict.fromkeys(PPO, 90.0)
    out = collected("suite", means, seeds=3)
    every, best = figures.plot_variants(runs_of(out), "title", 500.0).axes
    drawn = [[line.get_label() for line in ax.get_lines()][:-1] for ax in (every, best)]
    assert drawn[0] == [title_of(m) for m in ("varshare", *PORTFOLIO)] and len(drawn[0]) < MAX_CURVES
    controls = ("varshare-recentred", "l2soft-recentred", BLIND)
    assert drawn[1] == [title_of(m) for m in ("varshare", *PORTFOLIO[:-4:-1], *controls)]
    for ax in (every, best):
        assert len({(x.get_color(), x.get_linestyle()) for x in ax.get_lines()}) == len(ax.get_lines())
    write_suite(out)
    assert (out / "variants.png").exists()
    assert figures.plot_variants(runs_of(out)[lambda x: x.method.isin(PPO)], "title", None) is None


def test_variants_alone_have_a_report():
    out = collected("suite", dict.fromkeys(PORTFOLIO[:2], 100.0), seeds=2)
    assert len(cells_of(write_suite(out))) == 2
    assert [path.name for path in out.glob("*.png")] == ["variants.png"]


def test_methods_that_were_not_run_again_stay():
    """Unless their runs were longer or shorter."""
    out = collected("suite", {"task-blind": 50, "varshare": 120}, seeds=3)
    before = runs_of(out)
    collect(write_runs("suite", {"varshare-lora": 110, "l2soft": 90}, seeds=2), out)
    after, configs = runs_of(out), pd.read_csv(out / "configs.csv")
    kept = after[after.method.isin(["task-blind", "varshare"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    assert configs.groupby("method").size().to_dict() == {
        "task-blind": 3,
        "varshare": 3,
        "varshare-lora": 2,
        "l2soft": 2,
    }
    assert configs.finished.all()
    suite = Suite("suite", "cartpole10", steps=1000, seeds=2, methods=("l2soft",))
    collect(suite, out)  # again, alone
    pd.testing.assert_frame_equal(
        runs_of(out).sort_values(list(after), ignore_index=True),
        after.sort_values(list(after), ignore_index=True),
    )
    collect(write_runs("suite", {"pcgrad": 90}, seeds=2, steps=2000), out)
    assert set(runs_of(out).method) == {"pcgrad"}


def test_every_run_has_a_dot_in_the_panel_of_every_task():
    runs = runs_of(collected("suite", {"varshare": 100, "task-blind": 50, "l2soft": 120}, seeds=4))
    axes = figures.plot_tasks(runs, "title", None).axes
    assert [ax.get_title() for ax in axes] == TASKS
    assert [x.get_text() for x in axes[0].get_yticklabels()] == ["Task-blind", "L2Soft", "VarShare"]
    final = runs[(runs.metric == "eval/episodic_return") & (runs.step == 1000)]
    for ax, task in zip(axes, TASKS):
        for i, method in enumerate(("task-blind", "l2soft", "varshare")):
            dots, mean = ax.get_lines()[2 * i : 2 * i + 2]
            expected = final[(final.method == method) & (final.task == task)].value
            assert dots.get_xdata().tolist() == expected.tolist() and set(dots.get_ydata()) == {i}
            assert list(mean.get_xdata()) == pytest.approx([expected.mean()] * 2)


def test_sharing_and_change_of_methods_with_residuals():
    means = {"varshare": 100, "varshare-sac": 100, "l2soft": 90, "pcgrad": 80}
    runs = runs_of(collected("suite", means, seeds=3, mu_norm=4.0))
    maps = figures.plot_sharing(runs, "title", None).axes[:6]  # then the colour bars
    titles = ["VarShare", "VarShare-SAC", "L2Soft"]
    assert [ax.get_title().partition(":")[0] for ax in maps] == [x for x in titles for _ in (1, 2)]
    for cosines, shares in zip(maps[::2], maps[1::2]):
        for ax in (cosines, shares):
            assert [x.get_text() for x in ax.get_xticklabels()] == TASKS
        matrix = np.ma.filled(cosines.get_images()[0].get_array(), np.nan)
        np.testing.assert_allclose(matrix[0, 1:], [-0.8, -1 / 10**0.5], atol=1e-4)
        assert np.isnan(matrix.diagonal()).all() and matrix[2, 0] == matrix[0, 2]
        assert [x.get_text() for x in shares.get_yticklabels()] == list(RATIOS)
        image = shares.get_images()[0]
        np.testing.assert_allclose(image.get_array(), [[-1.0] * 3, [-4.0] * 3], atol=1e-3)
        assert [x.get_text() for x in shares.texts] == ["10.0%"] * 3 + ["1e-04"] * 3
    theta, mu, share = figures.plot_change(runs, "title", None).axes
    for ax, end in ((theta, MOVED), (mu, 4.0), (share, 4.0**2 / (4.0**2 + MOVED**2))):
        assert [line.get_label() for line in ax.get_lines()] == [
            "VarShare",
            "L2Soft",
        ]  # whose steps are alike
        for line in ax.get_lines():
            assert line.get_xdata().tolist() == list(range(100, 1001, 100))
            assert line.get_ydata()[-1] == pytest.approx(end)
    loaded = runs[~runs.metric.str.endswith("/theta_moved") | (runs.method != "l2soft")]  # as with --load
    assert len(figures.plot_change(loaded, "title", None).axes[0].get_lines()) == 1
    assert figures.plot_change(loaded[loaded.method == "l2soft"], "title", None) is None
    plain = runs[runs.method == "pcgrad"]
    assert figures.plot_sharing(plain, "", None) is figures.plot_change(plain, "", None) is None


def test_a_method_of_a_fork_is_reported_by_its_name():
    out = collected("suite", {"task-blind": 50, "varshare": 120, "l2soft": 105, "pcgrad": 90}, seeds=3)
    runs = runs_of(out).replace({"method": {"l2soft": "my-method"}})
    runs.to_csv(out / "runs.csv", index=False)
    table = cells_of(write_suite(out))
    assert list(table) == ["Task-blind", "VarShare", "my-method", "PCGrad"]
    assert len(figures.plot_change(runs, "title", None).axes[0].get_lines()) == 2
    assert "supported" in write_claims(Path("results"))


def test_verdicts_on_claim_1():
    best = make_scores(varshare=100, l2soft=100, pcgrad=90, hard_sharing=80)
    answer, text = claims.claim_1(best)
    assert answer == "supported" and text.count("| better |") == 4
    assert "better in 0 of 4 comparisons, worse in 0" in text  # as fast
    answer, _ = claims.claim_1(best | make_scores(contextual=110))
    assert answer == "supported in 4 of 6 comparisons, worse in 2"
    assert claims.claim_1(make_scores(varshare=50, pcgrad=90))[0] == "not supported"
    answer, text = claims.claim_1(make_scores(varshare=100, pcgrad=99))  # significant, of no importance
    assert answer == "not supported" and "| the same |" in text
    unrelated = {"varshare_sac": 50, "varshare_recentred": 50, "task_blind": 200}  # not what is claimed
    assert claims.claim_1(best | make_scores(**unrelated)) == claims.claim_1(best)
    assert claims.claim_1(make_scores(varshare=100)) is None
    assert claims.claim_1(make_scores(varshare_recentred=100, pcgrad=90))[0] == "supported"  # all there is
    rng = np.random.default_rng(1)
    fast = {m: scores(s.final, (m == "varshare") + rng.normal(size=(10, 2)) / 9) for m, s in best.items()}
    assert "better in 2 of 4 comparisons, worse in 0" in claims.claim_1(fast)[1]
    assert claims.claim_1(fast)[0] == "supported"  # which says where they end
    single = {name: scores(s.final[:1]) for name, s in best.items()}
    answer, text = claims.claim_1(single)
    assert answer == "not decided" and "| undecided |" in text


def test_verdicts_on_claim_2():
    assert claims.claim_2(make_scores(varshare=100, l2soft=101))[0] == "supported"
    assert claims.claim_2(make_scores(varshare=100, l2soft=50))[0] == "not supported"
    both = {"varshare_recentred": 100, "l2soft_recentred": 99}
    answer, text = claims.claim_2(make_scores(varshare=103, l2soft=100, **both))
    assert answer == "supported" and text.count("| the same |") == 2  # each with its own kind
    assert claims.claim_2(make_scores(varshare=50, l2soft=100, **both))[0] == "not supported"
    unclear = {"varshare": scores([[0.0], [200.0]]), "l2soft": scores([[10.0], [195.0]])}
    assert claims.claim_2(unclear)[0] == "not decided"
    assert claims.claim_2(make_scores(varshare=100)) is None
    assert claims.claim_2(make_scores(varshare_sac=100, l2soft=50)) is None  # of another algorithm


def test_verdicts_on_claim_4():
    others = {"varshare": 100, "varshare_recentred": 101, "varshare_lora": 99, "varshare_annealed": 90}
    for reptile, answer in ((130, "supported"), (101, "not supported"), (60, "not supported")):
        assert claims.claim_4(make_scores(varshare_reptile=reptile, **others))[0] == answer
    _, text = claims.claim_4(make_scores(varshare_reptile=100, **others, l2soft=90, pcgrad=80))
    assert len(cells_of(text)) == 1 and text.count("| VarShare-Reptile |") == 4  # one row for each variant
    assert claims.claim_4(make_scores(varshare=100, varshare_lora=100)) is None


def test_verdicts_on_claim_5():
    own = [
        {"method": m, "metric": "parameters/own", "value": x}
        for m, x in (("varshare", 900), ("varshare-lora", 90))
    ]
    for lora, answer in ((100, "supported"), (120, "supported"), (60, "not supported")):
        found, text = claims.claim_5(make_scores(varshare=100, varshare_lora=lora), pd.DataFrame(own))
        assert found == answer and "Parameters of a task's own: 90 and 900." in text
    assert claims.claim_5(make_scores(varshare=100, varshare_reptile=100), pd.DataFrame(own)) is None


def test_verdicts_on_claim_6():
    def both(sac, ppo, finals=(100.0, 100.0)):  # runs that reach 100 after so many of 1000 steps
        steps = np.arange(100, 1001, 100)
        curves = ([100.0 * (steps >= s) for s in reached] for reached in (sac, ppo))
        return {m: scores(np.full((5, 3), x), np.array(c), steps) for m, c, x in zip(SAC, curves, finals)}

    fast, slow = [200, 200, 200, 300, 300], [800, 800, 900, 900, 900]
    answer, text = claims.claim_6(both(fast, slow))
    assert answer == "supported" and "VarShare-SAC: median 200 [" in text
    assert claims.claim_6(both(slow, fast))[0] == "not supported: PPO needs fewer"
    assert claims.claim_6(both(slow, [200, 900, 900, 900, 9999]))[0] == "not decided"
    answer, text = claims.claim_6(both([9999] * 5, slow))
    assert answer.startswith("not supported") and "reached in 0 of 5" in text
    assert "to an evaluation of 60," in claims.claim_6(both(fast, slow, (60.0, 90.0)))[1]  # which both reach
    assert "to an evaluation of 70," in claims.claim_6(both(fast, slow, (90.0, 70.0)))[1]
    end = {m: scores(s.final, s.curve.iloc[:, -1:], (1000,)) for m, s in both(fast, slow).items()}
    assert claims.claim_6(end)[0] == "not decided"
    assert claims.claim_6(make_scores(varshare=1)) is claims.claim_6(make_scores(varshare_sac=1)) is None


def test_a_suite_that_compares_sac_and_ppo():
    out = collected("sac", dict.fromkeys(SAC, 100.0), env_id="cartpole-goals10", seeds=3)
    write_suite(out)
    assert (out / "cost.png").exists()
    text = write_claims(Path("results"))
    assert "## C6 on sac" in text and "C1" not in text and "C2" not in text
    steps, seconds = figures.plot_cost(runs_of(out), "title", None).axes
    for ax, sac, ppo in (
        (steps, [200, 400, 600, 800, 1000], [200, 400, 600, 800, 1000]),
        (seconds, [4, 16, 36, 64, 100], [20, 40, 60, 80, 100]),  # as logged, and evenly
    ):
        lines = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
        np.testing.assert_allclose(lines["VarShare-SAC"], sac)
        np.testing.assert_allclose(lines["VarShare"], ppo)


def test_no_verdict_where_task_blind_does_as_well(capsys):
    """However far the methods are apart among themselves."""
    for name, blind in (("even", 100), ("uneven", 60)):
        means = {"task-blind": blind, "varshare": 100, "l2soft": 99, "pcgrad": 50}
        collected(name, means, spread=1.0)
    report.main((Path("results"),))
    text = Path("results/claims.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:6]]
    claim_1, claim_2 = (
        "C1 VarShare and L2Soft beat the other baselines",
        "C2 VarShare and L2Soft are the same",
    )
    assert rows == [
        [claim_1, "even", "**this suite cannot tell**"],
        [claim_1, "uneven", "**supported**"],
        [claim_2, "even", "**this suite cannot tell**"],
        [claim_2, "uneven", "**supported**"],
    ]
    assert "- even: **cannot tell methods apart**: task-blind is not beaten" in text
    assert "- uneven: **can tell methods apart**" in text
    assert "## C1 on even: this suite cannot tell" in text and "## C1 on uneven: supported" in text


@pytest.mark.parametrize(
    ("identical", "answer"),
    [
        (0.01, "supported"),
        (0.5, "not supported: smaller on identical tasks for 1 of 1 methods, but not small"),
        (1.5, "not supported"),
    ],
)
def test_verdicts_on_claim_8(identical, answer):
    methods = {"task-blind": 100, "varshare": 100}
    different = collected("cartpole", methods, seeds=3)
    options = {"env_id": "cartpole-identical10", "mu_norm": identical, "settings": "cartpole"}
    same = collected("same", methods, seeds=3, **options)
    shorter = collected("shorter", methods, seeds=3, steps=500)  # with settings of its own
    text = write_claims(Path("results"))
    assert (
        f"## C8 on same and cartpole: {answer}\n" in text and f"| same and cartpole | **{answer}** |" in text
    )
    assert f"quotient {identical:.2f} [{identical:.2f}, {identical:.2f}]" in text and "shorter: " in text
    assert text.count("## C8") == 1 and "## C1" not in text
    assert "- same: **cannot tell methods apart**" in text
    assert Path("results/residuals.png").exists()
    (ax,) = figures.plot_residuals({"same": runs_of(same), "different": runs_of(different)}).axes
    curves = {line.get_label(): line.get_ydata()[-1] for line in ax.get_lines()}
    assert curves == pytest.approx({"same": identical, "different": 1.0})
    assert figures.plot_residuals({"same": runs_of(same)}) is None
    for folder in (same, different, shorter):  # too few runs
        runs_of(folder).query("seed == 1").to_csv(folder / "runs.csv", index=False)
    assert "## C8" not in write_claims(Path("results"))
