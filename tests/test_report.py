"""Tests of the plots of single runs: what they hold, of runs that are finished, unfinished, or log little."""

import csv
import json
from pathlib import Path

import numpy as np
import probes
import pytest
from matplotlib import rc_context
from PIL import Image

import report
from bench.collect import read_run
from bench.figures import MAX_CURVES, STYLE
from envs.folders import point_latest_to

ROOT = Path(__file__).resolve().parents[1]
STEPS = (100, 200, 300, 400)
LAYERS = [f"{net}.{i}" for net in ("actor", "critic") for i in range(2)]
ALL_TASKS = ("losses/policy_loss", "losses/value_loss", "losses/clipfrac")  # logged without single tasks


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Pictures are drawn in a fraction of the time."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 20)


def value(metric, step, task):
    """A number for everything logged, another one for most."""
    if "success" in metric:
        return step / 1000 * (1 - task / 40)
    return (sum(map(ord, metric)) % 7 + 1) / (1 + step / 100) + task


def write_run(folder, num_tasks, finished=True, varshare=True, layers=LAYERS, **args):
    """The folder of a run, in the format of envs.runs; the first task has no episode at the first step."""
    folder.mkdir()
    names = [f"task-{i}" for i in range(num_tasks)]
    args = {"env_id": "some-env", "seed": 7, "total_timesteps": 1000} | args
    config = {"script": "a.py", "args": args, "task_names": names, "task_params": [{}] * num_tasks}
    (folder / "config.json").write_text(json.dumps(config))
    per_task = ["charts/episodic_return", "losses/explained_variance"]
    if varshare:
        per_task += ["charts/success_rate", *(f"varshare/{x}" for x in ("mu_norm", "kl_loss"))]
        per_task += [f"varshare/{x}/{layer}" for x in ("sharing_ratio", "dead") for layer in layers]
    quantiles = [f"varshare/sigma_q{q}/{layer}" for q in (1, 50, 99) for layer in layers]
    overall = ("varshare/theta_norm", *quantiles) * varshare + ALL_TASKS
    with open(folder / "heartbeat.csv", "w", newline="") as file:
        log = csv.writer(file)
        log.writerow(("global_step", "metric", "task", "value"))

        def write(step, metric):
            values = [value(metric, step, i) for i in range(num_tasks)]
            if "sharing_ratio" in metric:
                values = [1 / (1 + x) for x in values]
            for i, (name, x) in enumerate(zip(names, values)):
                if i or metric != "charts/episodic_return" or step > STEPS[0]:
                    log.writerow((step, metric, name, x))
            log.writerow((step, metric, "mean", np.mean(values)))

        for step in STEPS:
            for metric in per_task:
                write(step, metric)
            for metric in overall:
                log.writerow((step, metric, "mean", value(metric, step, 0)))
        evaluations = ("eval/episodic_return", "eval/success_rate")[: 1 + varshare]
        for step in (STEPS[1], STEPS[-1])[: 1 + finished]:
            for metric in evaluations:
                write(step, metric)
        if finished:
            (folder / "evaluation.csv").touch()
    return folder


def lines(ax):
    """x and y of the curves of some axes."""
    return [np.asarray(line.get_xydata()) for line in ax.get_lines()]


def test_writes_what_the_run_has_logged(tmp_path, capsys):
    """Two runs in one call: with everything, and of a method without residuals."""
    folders = (write_run(tmp_path / "full", 3), write_run(tmp_path / "bare", 3, varshare=False, seed=8))
    point_latest_to(folders[1])
    report.main((folders[0], tmp_path / "latest"))
    names = ("returns", "success", "norms", "sigma", "sharing_ratio", "losses")
    full = [folders[0] / f"plots/{name}.png" for name in names]
    bare = [folders[1] / f"plots/{name}.png" for name in ("returns", "losses")]
    together = [folders[0] / "plots/compared.png"]
    printed = capsys.readouterr().out
    assert printed.splitlines()[: len(full + bare + together)] == [str(x) for x in full + bare + together]
    assert printed.endswith((folders[0] / "plots/compared.md").read_text(encoding="utf-8") + "\n")
    assert sorted((folders[1] / "plots").iterdir()) == sorted(bare)
    for path in full + bare + together:
        with Image.open(path) as image:
            image.load()
            assert image.width > 100 and image.height > 50


@pytest.mark.parametrize("num_tasks", [1, 3, 20])
def test_every_plot_has_few_curves_and_all_panels(tmp_path, num_tasks):
    run = read_run(write_run(tmp_path / "run", num_tasks))
    with rc_context(STYLE):
        figures = {name: plot(run) for name, plot in report.PLOTS.items()}
        assert figures.pop("task_map") is None  # no model is saved
        assert figures.pop("sharing_ratio" if num_tasks == 1 else "", None) is None  # nothing is shared
        for figure in figures.values():
            probes.check_figure(figure)
            assert all(len(ax.get_lines()) <= MAX_CURVES for ax in figure.axes)
            assert figure.get_suptitle() == "run\na.py on some-env, seed 7"
    shown = [[ax for ax in figures[name].axes if ax.get_visible()] for name in ("returns", "norms", "losses")]
    assert [len(axes) for axes in shown] == [1 + num_tasks * (num_tasks > 1), 3, 4]
    for task, ax in zip(("mean", *run.tasks), shown[0]):
        training, evaluated = (run.values(f"{x}/episodic_return")[task] for x in ("charts", "eval"))
        *_, curve, marks = lines(ax)  # before them the mean over tasks
        np.testing.assert_allclose(curve[:, 1], training.dropna())  # the first had no episode at first
        np.testing.assert_allclose(marks, np.column_stack((evaluated.index, evaluated)))
        assert ax.get_title().endswith(f": {evaluated.iloc[-1]:.4g}") and ax.get_xlim() == (0, 1000)
    (explained,) = [ax for ax in figures["losses"].axes if "explained_variance" in ax.get_title()]
    assert explained.get_ylim()[1] == 1.05  # the most that there is
    if num_tasks == 1:
        return
    actor, critic, heat_map, _ = figures["sharing_ratio"].axes
    for ax, name in ((actor, "actor.0"), (critic, "critic.0")):
        table = run.values(f"varshare/sharing_ratio/{name}")
        np.testing.assert_allclose(lines(ax)[0], np.column_stack((STEPS, 1 - table["mean"])))
        assert ax.get_yscale() == "log"
    last = [run.values(f"varshare/sharing_ratio/{layer}")[run.tasks].iloc[-1] for layer in LAYERS]
    expected = np.log10(1 - np.array(last)).clip(min=-6)  # of the first task nothing is left in places
    np.testing.assert_allclose(heat_map.get_images()[0].get_array(), expected)
    assert len(heat_map.texts) == (expected.size if num_tasks == 3 else 0)  # of 20 they cannot be read
    assert [label.get_text() for label in heat_map.get_xticklabels()] == run.tasks
    assert [label.get_text() for label in heat_map.get_yticklabels()] == LAYERS


def test_sigma_of_a_deep_networks_layers(tmp_path):
    """As many as there are colours, from the first to the last."""
    layers = [f"{net}.{i}" for net in ("actor", "critic") for i in range(10)]
    run = read_run(write_run(tmp_path / "run", 3, layers=layers))
    figure = report.plot_sigma(run)
    actor, critic, dead, _ = figure.axes
    drawn = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(drawn) == MAX_CURVES == len(critic.get_lines())
    assert (drawn[0], drawn[-1]) == ("layer 0", "layer 9")
    expected = [value("varshare/sigma_q50/actor.0", step, 0) for step in STEPS]
    np.testing.assert_allclose(lines(actor)[0], np.column_stack((STEPS, expected)))
    low, high = (value(f"varshare/sigma_q{q}/actor.0", STEPS[0], 0) for q in (1, 99))
    band = actor.collections[0].get_paths()[0].vertices
    at_first = band[band[:, 0] == STEPS[0], 1]
    assert (at_first.min(), at_first.max()) == pytest.approx(sorted((low, high)))
    np.testing.assert_allclose(lines(dead)[0][:, 1], run.values("varshare/dead/actor.0")["mean"])


def test_sigma_of_the_prior_is_a_line(tmp_path):
    """As set; not with low rank, where sigma is that of factors, and not without a prior."""
    for name, args in (("set", {"sigma_prior": 0.3}), ("low", {"sigma_prior": 0.3, "rank": 2}), ("no", {})):
        figure = report.plot_sigma(read_run(write_run(tmp_path / name, 2, **args)))
        for ax in figure.axes[:2]:
            found = [line.get_ydata() for line in ax.get_lines() if line.get_label() == "prior"]
            assert np.array_equal(found, [[0.3, 0.3]] if name == "set" else [])


@pytest.mark.parametrize(("env_id", "starts_at_0"), [("cartpole10", True), ("lunarlander20", False)])
def test_returns_begin_at_0_where_none_is_below(tmp_path, env_id, starts_at_0):
    run = read_run(write_run(tmp_path / "run", 2, env_id=env_id))
    lows = {ax.get_ylim()[0] == 0 for ax in report.plot_returns(run).axes}
    assert lows == {starts_at_0}
    assert {ax.get_ylim()[0] for ax in report.plot_success(run).axes} == {0}


@pytest.mark.parametrize("end", [b"\n4", b"\n400,varshare/mu_norm,task-1,"])
def test_an_unfinished_run_is_drawn_as_far_as_its_log_is_whole(tmp_path, end):
    """Its log ends anywhere: the last step may lack numbers, and the last line may lack its end."""
    folder = write_run(tmp_path / "run", 3, finished=False)
    text = (folder / "heartbeat.csv").read_bytes()
    (folder / "heartbeat.csv").write_bytes(text[: text.rindex(end)] + end)
    run = read_run(folder)
    for plot in (report.plot_success, report.plot_losses, report.plot_sigma):
        assert plot(run).get_suptitle().endswith("(not finished: 300 of 1,000 steps)")
    assert run.values("losses/clipfrac").index.tolist() == [100, 200, 300]
    assert np.isfinite(run.values("charts/episodic_return").iloc[1:].to_numpy()).all()


def refused(capsys, *folders):
    """The one line on stderr with which the report refuses."""
    with pytest.raises(SystemExit) as error:
        report.main(folders)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == "" and err.count("\n") == 1 and "error: " in err
    return err


def test_refusals(tmp_path, capsys):
    good, bad = write_run(tmp_path / "good", 1), write_run(tmp_path / "bad", 1)
    assert "it has no heartbeat.csv" in refused(capsys, tmp_path)
    assert "it has no heartbeat.csv" in refused(capsys, good, tmp_path / "nowhere")
    assert not (good / "plots").exists()  # nothing is written before everything is read
    for text, expected in (
        ("", "is not the log of a run"),
        ("a,b\n1,2\n", "is not the log of a run"),
        ("global_step,metric,task,value\n", "has not logged enough yet"),
        ("global_step,metric,task,value\n1,losses/entropy,mean,2\n1,losses", "has not logged enough yet"),
    ):
        (bad / "heartbeat.csv").write_text(text)
        assert expected in refused(capsys, bad)
    (good / "config.json").unlink()
    assert "it has no config.json" in refused(capsys, good)
    assert "one or more folders" in refused(capsys)
