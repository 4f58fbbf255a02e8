"""Tests of what is made of the runs of suites: CSVs, tables and figures, on made-up numbers."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import probes
import pytest
import torch
from PIL import Image

import report
from bench import figures
from bench.collect import DIRECTION, read
from bench.figures import MAX_CURVES, STYLE, write_suite
from bench.methods import METHODS, title_of
from bench.statistics import BLIND, against, difference, mean_interval, search_noise
from bench.suites import SETTINGS, Suite
from bench.tables import Result, Scores, at_common_steps, make_table

SAC = ("varshare-sac", "varshare")
SPACES = [m.name for m in METHODS.values() if m.space and m.script.endswith("_ppo.py")]
PORTFOLIO = [m for m in SPACES if METHODS[m].family in figures.PORTFOLIO]
PPO = [m for m in SPACES if m not in PORTFOLIO]  # all that are compared
RESIDUAL = [m for m in PPO if METHODS[m].family in ("varshare", "l2soft")]
TASKS = ["near", "far", "edge"]
GOALS = (0.0, 2.0, 1.0)  # where tasks have any
RATIOS = {"actor.0": 0.9, "critic.0": 0.9999}  # sharing ratio of the layers
MOVED = 3.0  # |theta - theta_0| at the end
# without what they have in common: (1, -1/3), (-1, -1/3), (0, 2/3)
MU = torch.tensor([[1.0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Runs and results are below an empty folder; figures are checked, and drawn at low resolution."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STYLE, "savefig.dpi", 20)
    probes.check_all_figures(monkeypatch)


def write_run(job, method, env_id, steps, seed, final, mu_norm, success):
    """A finished run whose returns rise linearly to the final ones; final is (task,).

    success: whether it is logged, the better the return the less of it.
    """
    folder = Path("runs", job.name)
    folder.mkdir(parents=True)
    (folder / "command").write_text(job.command + "\n")
    args = {"env_id": env_id, "total_timesteps": steps, "exp_name": method, "seed": seed}
    params = [{"goal": goal} for goal in GOALS] if env_id.startswith("cartpole-goals") else [{}] * 3
    config = {"script": METHODS[method].script, "args": args, "task_names": TASKS, "task_params": params}
    config |= {"git_commit": "abc", "hardware": "abacus"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = ["global_step,metric,task,value"]

    def log(step, metric, values):
        lines.extend(f"{step},{metric},{task},{x}" for task, x in zip(TASKS, values))
        lines.append(f"{step},{metric},mean,{np.mean(values)}")

    for share in np.arange(1, 11) / 10:
        step = round(share * steps)
        log(step, "charts/episodic_return", final * share)
        lines.append(f"{step},charts/wall_time,mean,{100 * share**2}")  # slow at first
        lines.append(f"{step},charts/SPS,mean,10")
        lines.append(f"{step},varshare/theta_norm,mean,2.0")  # which is not kept
        if METHODS[method].family in ("varshare", "l2soft"):
            lines.append(f"{step},varshare/theta_moved,mean,{MOVED * share}")
            log(step, "varshare/mu_norm", np.full(3, mu_norm * share))
            for layer, ratio in RATIOS.items():
                log(step, f"varshare/sharing_ratio/{layer}", np.full(3, ratio))
        if round(10 * share) % 2 == 0 and share < 1:
            log(step, "eval/episodic_return", final * share)
            if success:
                log(step, "eval/success_rate", share * (1 - final / 200))
        if success:
            log(step, "charts/success_rate", 0.5 * share * (1 - final / 200))
            log(step, "losses/entropy", 2 - share + np.arange(3))
    log(steps, "eval/episodic_return", final)
    if success:
        log(steps, "eval/success_rate", 1 - final / 200)
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
    (folder / "evaluation.csv").touch()


def write_runs(
    name,
    means,
    env_id="cartpole10",
    seeds=6,
    steps=1000,
    spread=5.0,
    mu_norm=1.0,
    success=False,
    settings="",
    searches=1,
):
    """A suite whose methods have these mean returns, the tasks 10 apart, and what a search chose for them.

    With several searches the settings of each are better by 20 than those of the one before.
    """
    rng = np.random.default_rng(0)
    options = {"settings": settings, "score": "success" if success else "return", "searches": searches}
    suite = Suite(name, env_id, steps=steps, seeds=seeds, methods=tuple(means), **options)
    chosen = pd.DataFrame({"suite": name, "method": list(means), "settings": "--learning-rate 0.01"})
    chosen = pd.concat([chosen.assign(search=i + 1) for i in range(searches)])
    SETTINGS.parent.mkdir(parents=True, exist_ok=True)
    chosen.to_csv(SETTINGS, mode="a", header=not SETTINGS.exists(), index=False)
    finals = {  # a method's seeds together, so that methods do not depend on one another
        (m, s): mean + 20 * ((s - 1) % searches) + spread * rng.normal() + np.array([0, -10, 10.0])
        for m, mean in means.items()
        for s in range(1, seeds + 1)
    }
    pairs = [(m, s) for s in range(1, seeds + 1) for m in means]
    for job, (method, seed) in zip(suite.jobs(), pairs):
        write_run(job, method, env_id, steps, seed, finals[method, seed], mu_norm, success)
    return suite


def collected(name, means, **options):
    """The same collected; returns its folder."""
    suite = write_runs(name, means, **options)
    suite.collect()
    return suite.folder


def runs_of(folder):
    return read(folder)[0]


def cells_of(text):
    """The first table of a text: row by its first cell -> column -> cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(columns, row)) for row in rows}


def table_of(folder):
    return cells_of(make_table(Result(folder)))


def test_a_suite_and_the_same_again_from_its_csvs(capsys):
    means = {"task-blind": 100, "cagrad": 160, "varshare": 140, "l2soft": 120, "independent": 110}
    out = collected("suite", means, seeds=4)
    text = write_suite(out)
    assert text == (out / "table.md").read_text()
    assert text.splitlines()[0] == "# cartpole10, 1,000 steps"
    assert text.splitlines()[2].startswith("**This suite can tell methods apart**: the best method, CAGrad,")
    assert "20 runs, one core each (abacus; commit `abc`)" in text and "Missing" not in text
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["curves.png", "sharing_l2soft.png", "sharing_varshare.png", "tasks.png"]
    for name in pictures:
        with Image.open(out / name) as image:
            image.load()

    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in (*out.glob("*.png"), out / "table.md", *Path("runs").glob("*/evaluation.csv")):
        path.unlink()
    report.main((out,))
    assert capsys.readouterr().out == text + "\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents


def test_what_the_table_says():
    means = {method: 100.0 + 20 * i for i, method in enumerate(PPO)}
    out = collected("suite", means)
    runs, table = runs_of(out), table_of(out)
    others = [method for method in PPO if method != BLIND]
    assert list(table) == [title_of(m) for m in (BLIND, *reversed(others))]  # the control, then best first
    final = runs[(runs.metric == "eval/episodic_return") & (runs.step == 1000)]
    by_task = final[final.task != "mean"].groupby(["method", "seed"]).value
    returns = {method: by_task.mean()[method] for method in PPO}
    row, mean = table["CAGrad"], mean_interval(returns["cagrad"])
    assert abs(mean.center - means["cagrad"]) < 6 and row["runs"] == "6" and row["mean"] == mean.text()
    assert row["worst task"] == mean_interval(by_task.min()["cagrad"]).text()
    for method, c in against(returns, BLIND).items():
        cells = table[title_of(method)]
        columns = ("minus task-blind", f"p of {BLIND} (Holm)", "against task-blind")
        assert [cells[name] for name in columns] == c.cells()
        assert c.verdict == ("better" if means[method] > means[BLIND] else "worse")
    control = table["Task-blind"]
    assert {control[name] for name in columns} == {""}
    assert row["area under evaluations"].split(" ")[0] == f"{mean.center * 0.6:.1f}"  # 0.2, 0.4, ... 1
    assert row["steps to 400 (median)"] == "- [-, -]" and row["runs that get there"] == "0 of 6"
    assert [*row.values()][-4:] == ["0", "5", "100.0", "10"]  # one set of weights, none per task
    assert [*table["VarShare"].values()][-4:-2] == ["5", "20"]  # theta and mu, but not sigma
    assert [*table["Independent"].values()][-4:-2] == ["5", "15"]


def test_a_suite_that_is_scored_by_success():
    """Whose order is the reverse of that of the returns."""
    means = {"task-blind": 150, "varshare": 40, "l2soft": 100, "independent": 120}
    out = collected("suite", means, env_id="mt10", success=True)
    runs, table, x = runs_of(out), table_of(out), Result(out)
    assert x.able and x.why.startswith("the best method, VarShare,")
    assert list(table) == ["Task-blind", "VarShare", "L2Soft", "Independent"]
    final = runs[(runs.method == "varshare") & (runs.step == 1000) & (runs.task != "mean")]
    by_seed = {m: x.groupby("seed").value for m, x in final.groupby("metric")}
    success, worst = 100 * by_seed["eval/success_rate"].mean(), 100 * by_seed["eval/success_rate"].min()
    row = table["VarShare"]
    assert row["success, %"] == mean_interval(success).text() and abs(success.mean() - 80) < 2
    assert row["worst task"] == mean_interval(worst).text()
    assert row["return"] == mean_interval(by_seed["eval/episodic_return"].mean()).text()
    assert row["success in training, %"] == mean_interval(success / 2).text()  # of the last tenth only
    assert row["against task-blind"] == "better" and "success" not in row
    assert "runs that get there" in row and "steps to 80 (median)" in row
    run = runs[(runs.method == "varshare") & (runs.seed == 2) & (runs.task == "far")]
    run = run.set_index("step").sort_index()
    assert run[run.metric == "eval/success_rate"].index.tolist() == [200, 400, 600, 800, 1000]
    assert run[run.metric == "charts/success_rate"].index.tolist() == [500, 1000]  # every fifth of ten
    assert run[run.metric == "losses/entropy"].value.to_dict() == {500: 2.5, 1000: 2}
    drawn = {line.get_label(): line for ax in figures.plot_curves(x).axes for line in ax.lines}
    assert drawn["VarShare"].get_ydata() == pytest.approx(success.mean() * np.arange(1, 6) / 5, rel=1e-4)


def test_runs_that_are_in_the_results_already_count_as_done(monkeypatch, capsys):
    """A comparison that is spread over two machines ends with the CSVs of one."""
    means = {"task-blind": 100, "varshare": 300, "independent": 250}
    suite = write_runs("suite", means, seeds=4)
    suite.collect()
    names = ("runs.csv", "configs.csv", "sharing.csv")
    once = [pd.read_csv(suite.folder / name) for name in names]
    early = [job for job in suite.jobs() if job.name.endswith(("1", "2", "3"))]

    def move(jobs, source, target):
        Path(target).mkdir(exist_ok=True)
        for job in jobs:
            Path(source, job.name).rename(Path(target, job.name))

    move(set(suite.jobs()) - set(early), "runs", "later")
    suite.collect()
    assert len(pd.read_csv(suite.folder / "configs.csv").dropna(subset="commit")) == 9
    assert suite.left() == suite.jobs() and suite.finished("varshare") == 3
    move(early, "runs", "elsewhere")  # the second machine has none of them
    assert suite.finished("varshare") == 0
    monkeypatch.setenv("REST", "1")
    assert suite.finished("varshare") == 3
    assert set(suite.left()) == set(suite.jobs()) - set(early)
    suite.collect()  # nothing has finished here
    move(suite.left(), "later", "runs")
    suite.collect()
    assert suite.finished("varshare") == 4
    for name, expected in zip(names, once):
        key = [column for column in expected if column != "value"]
        found = pd.read_csv(suite.folder / name).sort_values(key, ignore_index=True)
        pd.testing.assert_frame_equal(found, expected.sort_values(key, ignore_index=True), rtol=1e-4)
    suite.flags = "--gamma 0.9"  # other commands
    assert suite.left() == suite.jobs() and suite.finished("varshare") == 0
    monkeypatch.setenv("REST", "yes")
    with pytest.raises(SystemExit):
        suite.left()
    assert "REST is 1 or nothing, not 'yes'" in capsys.readouterr().err


def test_several_searches_are_part_of_the_intervals():
    """Their means differ by 20, runs by 5: six runs of each of three searches say less than 18 of one."""
    means = {"task-blind": 100, "varshare": 300, "independent": 250}
    out = collected("suite", means, seeds=18, searches=3)
    x, table = Result(out), table_of(out)
    assert runs_of(out).setting.unique().tolist() == ["1", "2", "3"] and x.able
    scores = x.by_method["varshare"]
    assert scores.final.index.nlevels == 2 and len(scores.final) == 18
    by_search = scores.means.groupby(level=0).mean()
    assert by_search.tolist() == pytest.approx([300, 320, 340], abs=5)
    row = table["VarShare"]
    assert row["by search"] == ", ".join(f"{value:.0f}" for value in by_search)
    noise = search_noise(x.values("means"))
    assert row["mean"] == mean_interval(scores.means, noise).text() != mean_interval(scores.means).text()
    interval = mean_interval(scores.means, noise)
    assert interval.high - interval.low > 4 * (mean_interval(scores.means).high - scores.means.mean())
    gap = difference(scores.means, x.by_method["task-blind"].means, noise)
    assert row["minus task-blind"] == gap.interval.text()
    assert "over searches and runs" in write_suite(out)


@pytest.mark.parametrize("finished", [1, 3, 4, 5])
def test_a_suite_with_searches_is_reported_on_the_way(finished):
    """So many runs of one method and six of the others: what cannot be said is a dash."""
    means = {"task-blind": 100, "varshare": 300, "independent": 250}
    suite = write_runs("suite", means, seeds=6, searches=3)
    for job in suite.jobs():
        if "varshare" in job.name and int(job.name.rsplit("__", 1)[1]) > finished:
            Path("runs", job.name, "evaluation.csv").unlink()
    suite.collect()
    write_suite(suite.folder)
    row = table_of(suite.folder)["VarShare"]
    assert row["runs"] == str(finished)
    assert ("[-, -]" in row["mean"]) == (finished <= 3)


def test_fewer_seeds_of_a_suite_with_searches_replace_all_that_was_known():
    means = {"task-blind": 100, "varshare": 300, "independent": 250}
    collected("suite", means, seeds=6, searches=3)
    again = Suite("suite", "cartpole10", steps=1000, seeds=1, methods=("varshare",), searches=3)
    again.collect()
    runs = runs_of(again.folder)
    assert set(runs[runs.method == "varshare"].seed) == {1}
    assert set(runs[runs.method == "independent"].seed) == {1, 2, 3, 4, 5, 6}


def test_evaluations_at_different_steps_are_brought_to_the_same():
    """As where one search chose more environments a task than another."""
    rows = {1: {100: 10.0, 200: 20.0, 300: 30.0}, 2: {150: 15.0, 290: 29.0}}
    curve = at_common_steps(pd.DataFrame(rows).T.sort_index(axis=1))
    assert curve.columns.tolist() == [200, 300]  # at 100 the second run has not been evaluated
    assert curve.loc[1].tolist() == [20, 30] and curve.loc[2].tolist() == [20, 29]
    assert at_common_steps(curve) is curve


def test_steps_to_the_threshold():
    """80 % of the 500 that cartpole10 allows; at 450 it is the evaluation at 1000 steps, of 200, ... 1000."""
    out = collected("suite", {"task-blind": 100, "varshare": 450}, spread=1.0)
    row = table_of(out)["VarShare"]
    assert row["steps to 400 (median)"] == "1,000 [1,000, 1,000]" and row["runs that get there"] == "6 of 6"
    s = Scores(
        pd.DataFrame(np.zeros((2, 1))), pd.DataFrame([[10.0, 50, 50], [10, 20, 30]], columns=[1, 2, 4])
    )
    assert s.steps_to(50).tolist() == [2, np.inf] and s.area.tolist() == pytest.approx([130 / 3, 65 / 3])
    runs_of(out).query("step == 1000").to_csv(out / "runs.csv", index=False)  # not evaluated on the way
    assert not any("steps to" in column or "area" in column for column in table_of(out)["VarShare"])


def test_what_is_collected():
    out = collected("suite", {"varshare": 100, "independent": 90}, seeds=2)
    runs, configs = read(out)
    assert not runs.metric.str.endswith("/theta_norm").any()
    assert set(runs[runs.metric == "charts/wall_time"].step) == {1000}  # on the way only of SAC
    map_of = pd.read_csv(out / "sharing.csv").set_index("task")
    cosines = map_of[map_of.metric == "cosine"].value
    expected = {"near|far": -0.8, "near|edge": -1 / 10**0.5, "far|edge": -1 / 10**0.5}
    assert cosines.to_dict() == pytest.approx(expected, abs=1e-4)
    mu = (MU - MU.mean(0)).norm(dim=1).mean() / 5**0.5
    ratio = runs[runs.metric == "residual/ratio"].value  # whatever the residuals have in common
    assert ratio.to_numpy() == pytest.approx(float(mu), abs=1e-4)
    assert (configs.commit == "abc").all()
    assert [*zip(configs.method, configs.seed)][:2] == [("varshare", 1), ("independent", 1)]
    assert configs.command[0].startswith("varshare_ppo.py --exp-name varshare --env-id cartpole10")
    assert configs.command[0].endswith("--seed 1 --learning-rate 0.01 --eval-interval 100")


def test_whether_residuals_lie_as_goals_do_is_collected_where_there_are_goals():
    """Here they do: near and far are the most apart in both."""
    runs = runs_of(collected("suite", {"varshare": 100, "pcgrad": 90}, env_id="cartpole-goals10", seeds=2))
    found = runs[runs.metric == DIRECTION]
    assert list(found.method) == ["varshare"] * 2 and found.value.to_list() == pytest.approx([1.0, 1.0])
    other = runs_of(collected("other", {"varshare": 100}, seeds=1))
    assert DIRECTION not in set(other.metric)


def test_partial_results_are_reported_with_what_is_missing(capsys):
    suite = write_runs("suite", {"varshare": 100, "pcgrad": 90}, seeds=2)
    for name in ("varshare__1", "pcgrad__1"):
        Path("runs", f"suite__{name}", "evaluation.csv").unlink()
    Path("runs/suite__pcgrad__2/command").write_text("of other settings\n")
    suite.collect()
    text = write_suite(suite.folder)
    assert "Missing: 3 runs, for example varshare, seed 1." in text and "1 run, one core each" in text
    assert "cannot tell methods apart**: there is nothing to compare" in text
    assert "minus task-blind" not in text
    table = cells_of(text)
    assert list(table) == ["VarShare"] and table["VarShare"]["runs"] == "1"
    assert table["VarShare"]["mean"].endswith(" [-, -]")
    Path("runs/suite__varshare__2/evaluation.csv").unlink()
    other = Suite("suite", "cartpole10", methods=("varshare", "cagrad"))
    for bad, message in ((suite, "no run of suite has finished"), (other, "no settings of cagrad")):
        with pytest.raises(SystemExit) as stop:
            bad.collect()
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_methods_that_were_not_run_again_stay():
    """Unless their runs were longer or shorter."""
    out = collected("suite", {"task-blind": 50, "varshare": 120}, seeds=3)
    before = runs_of(out)
    write_runs("suite", {"varshare-lora": 110, "l2soft": 90}, seeds=2).collect()
    after, configs = read(out)
    kept = after[after.method.isin(["task-blind", "varshare"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    numbers = {"task-blind": 3, "varshare": 3, "varshare-lora": 2, "l2soft": 2}
    assert configs.groupby("method").size().to_dict() == numbers
    assert set(pd.read_csv(out / "sharing.csv").method) == {"varshare", "l2soft"}
    Suite("suite", "cartpole10", steps=1000, seeds=2, methods=("l2soft",)).collect()  # again, alone
    again = runs_of(out).sort_values(list(after), ignore_index=True)
    pd.testing.assert_frame_equal(again, after.sort_values(list(after), ignore_index=True))
    write_runs("suite", {"pcgrad": 90}, seeds=2, steps=2000).collect()
    assert set(runs_of(out).method) == {"pcgrad"}


def lines_of(ax):
    """Curves of some axes by their label; without thin ones of runs, which have none."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_no_axes_have_more_than_eight_curves():
    means = dict.fromkeys(PPO, 100.0) | {"l2soft-recentred": 120.0}
    out = collected("suite", means, seeds=5)
    runs, drawn = runs_of(out), []
    for ax in figures.plot_curves(Result(out)).axes:
        lines = lines_of(ax)
        assert len(ax.get_lines()) == len(lines) <= MAX_CURVES
        assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == len(lines)
        drawn.append(lines)
    residual, *others = (set(lines) - {"what the tasks allow"} for lines in drawn)
    assert residual == {title_of(method) for method in RESIDUAL} and len(others) == 2
    assert set.intersection(*others) == {"L2Soft, re-centred"}  # the best
    assert set.union(*others) - residual == {title_of(m) for m in PPO if m not in RESIDUAL}
    line = drawn[1]["L2Soft, re-centred"]
    rows = runs[(runs.method == "l2soft-recentred") & (runs.metric == "eval/episodic_return")]
    expected = rows[rows.task == "mean"].groupby("step").value.mean()
    assert line.get_xdata().tolist() == [200, 400, 600, 800, 1000]
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_four_runs_are_drawn_and_five_have_an_interval():
    for seeds in (4, 5):
        x = Result(collected(f"suite{seeds}", {"varshare": 100.0}, seeds=seeds))
        figure = figures.plot_curves(x)
        (ax,) = figure.axes
        title = f"{x.title}: means of {seeds} runs, " + ("thin lines are runs", "95 % intervals")[seeds == 5]
        assert figure.get_suptitle() == title
        mean, *thin = [line for line in ax.get_lines() if line.get_label() != "what the tasks allow"]
        assert (len(thin), len(ax.collections)) == ((4, 0) if seeds == 4 else (0, 1))
        if thin:
            expected = np.mean([line.get_ydata() for line in thin], axis=0)
            np.testing.assert_allclose(mean.get_ydata(), expected)


def test_variants_have_a_figure_of_their_own():
    means = {m: 100.0 + 30 * i for i, m in enumerate(PORTFOLIO)} | dict.fromkeys(PPO, 90.0)
    out = collected("suite", means, seeds=2)
    every, best = (list(lines_of(ax)) for ax in figures.plot_variants(Result(out)).axes)
    drawn = [[x for x in labels if x in map(title_of, METHODS)] for labels in (every, best)]
    assert drawn[0] == [title_of(m) for m in ("varshare", *PORTFOLIO)] and len(drawn[0]) < MAX_CURVES
    controls = ("varshare-recentred", "l2soft-recentred", BLIND)
    assert drawn[1] == [title_of(m) for m in ("varshare", *PORTFOLIO[:-4:-1], *controls)]


def test_a_single_variant_stands_among_the_other_methods():
    out = collected("suite", {"task-blind": 90.0, "varshare": 100.0, "varshare-lora": 110.0}, seeds=2)
    assert figures.plot_variants(Result(out)) is None
    drawn = {label for ax in figures.plot_curves(Result(out)).axes for label in lines_of(ax)}
    assert "VarShare-LoRA" in drawn


@pytest.mark.parametrize("success", [False, True])
def test_intervals_end_at_what_is_possible(success):
    """Of means near 0 and near the most that is possible, and the axis of values begins at 0."""
    env_id, most, highest = ("mt10", 100, 195) if success else ("cartpole10", 500, 495)
    means = {"task-blind": 5, "varshare": highest}
    out = collected("suite", means, env_id=env_id, seeds=5, spread=15.0, success=success)
    x = Result(out)
    intervals = [mean_interval(scores.means) for scores in x.by_method.values()]
    assert min(i.low for i in intervals) < 0 and max(i.high for i in intervals) > most
    ends = []
    for ax in figures.plot_curves(x).axes:
        assert ax.get_ylim()[0] == 0
        ends += [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert min(map(min, ends)) == 0 and max(map(max, ends)) == most


def test_returns_that_may_be_negative_have_their_range():
    means = {"task-blind": -300.0, "varshare": -200.0}
    x = Result(collected("suite", means, env_id="lunarlander20", seeds=5))
    assert {ax.get_ylim()[0] < -300 for ax in figures.plot_curves(x).axes} == {True}
    assert {ax.get_xlim()[0] < -300 for ax in figures.plot_tasks(x).axes} == {True}


def test_sharing_of_methods_with_residuals():
    """White is where unrelated residuals lie, and the scales are common to all methods."""
    x = Result(collected("suite", {"varshare": 100, "l2soft": 90, "pcgrad": 80}, seeds=2, mu_norm=4.0))
    drawn, limits = figures.plot_sharing(x), []
    assert list(drawn) == ["varshare", "l2soft"]
    for method, figure in drawn.items():
        assert figure.get_suptitle() == f"{title_of(method)} on {x.title}, mean of 2 runs"
        cosines, shares = figure.axes[:2]  # then the colour bars
        assert [text.get_text() for text in shares.get_xticklabels()] == TASKS
        (image,), (below,) = cosines.get_images(), shares.get_images()
        matrix = np.ma.filled(image.get_array(), np.nan)
        np.testing.assert_allclose(matrix[0, 1:], [-0.8, -1 / 10**0.5], atol=1e-4)
        assert np.isnan(matrix.diagonal()).all() and matrix[2, 0] == matrix[0, 2]
        assert image.norm(-1 / (len(TASKS) - 1)) == pytest.approx(0.5)
        assert min(image.cmap(0.5)[:3]) > 0.95
        assert [text.get_text() for text in shares.get_yticklabels()] == list(RATIOS)
        np.testing.assert_allclose(below.get_array(), [[-1.0] * 3, [-4.0] * 3], atol=1e-3)
        limits.append((image.norm.vmin, image.norm.vmax, below.norm.vmin, below.norm.vmax))
    assert limits[0] == limits[1]


def test_maps_of_methods_that_differ_have_the_same_scales():
    x = Result(collected("suite", {"varshare": 100, "l2soft": 90}, seeds=2))
    rows = pd.read_csv(x.folder / "sharing.csv")
    rows.loc[rows.method == "l2soft", "value"] *= 0.5
    rows.to_csv(x.folder / "sharing.csv", index=False)
    images = [[ax.get_images()[0] for ax in figure.axes[:2]] for figure in figures.plot_sharing(x).values()]
    (one, one_below), (other, other_below) = images
    assert not np.ma.allequal(one.get_array(), other.get_array())
    assert one.get_clim() == other.get_clim() and one_below.get_clim() == other_below.get_clim()
