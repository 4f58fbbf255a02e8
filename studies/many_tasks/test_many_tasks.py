"""The gain from sharing grows with the number of tasks, or does not; made-up suites."""

import numpy as np
import pandas as pd
import probes
import pytest

from bench.tables import Result
from studies.many_tasks import __main__ as many

COLUMNS = ["env", "method", "setting", "seed", "metric", "task", "step", "value"]


def write_suites(gain, path):
    """Suites of five runs in which VarShare and Hard sharing are better than Independent by gain(tasks)."""
    rng = np.random.default_rng(0)
    for number in many.NUMBERS:
        rows, configs = [], []
        for method in ("task-blind", "independent", "hard-sharing", "l2soft", "varshare"):
            for seed in range(1001, 1006):
                x = 100 if method == "task-blind" else 200 + 3 * rng.normal()
                x += gain(number) if method not in ("task-blind", "independent") else 0
                key = (f"cartpole-goals{number}", method, "", seed)
                rows += [(*key, "eval/episodic_return", task, 1000, x) for task in ("a", "b", "mean")]
                rows.append((*key, "parameters/all", "mean", 1000, 10 * number))
                configs.append((*key, 1000, "", "", "abc", "abacus"))
        folder = path / f"results/suites/many-tasks{number}"
        folder.mkdir(parents=True)
        pd.DataFrame(rows, columns=COLUMNS).to_csv(folder / "runs.csv", index=False)
        columns = [*COLUMNS[:4], "steps", "searched_on", "command", "commit", "hardware"]
        pd.DataFrame(configs, columns=columns).to_csv(folder / "configs.csv", index=False)


@pytest.mark.parametrize(
    ("gain", "answer"),
    [
        (lambda n: 10 * np.log2(n), "supported"),
        (lambda n: 30, "not supported"),
        (lambda n: -n, "not supported"),
    ],
)
def test_claim_10_is_about_the_slope(gain, answer, tmp_path):
    write_suites(gain, tmp_path)
    suites = many.read_suites()
    says, text = many.claim_10(suites)
    assert says == answer and text.count("with every doubling") == 2
    table = many.report(tmp_path / "out")
    assert f"C10: {answer}" in table and "| VarShare |" in table
    assert (tmp_path / "out/many_tasks.png").exists()


def test_the_slope_is_per_doubling():
    gains = {n: pd.Series([5 * np.log2(n), 5 * np.log2(n) + 7, 6 * np.log2(n)]) for n in (10, 20, 40)}
    interval, _ = many.slope(gains)
    assert interval.center == pytest.approx(16 / 3)


def test_the_first_figure_has_every_task_of_the_map(tmp_path):
    write_suites(lambda n: 10 * np.log2(n), tmp_path)
    goals = np.linspace(-1.5, 1.5, 80)
    places = pd.DataFrame({"goal": goals, "component 1": goals, "component 2": goals**2})
    places = places.assign(share_1=0.6, share_2=0.2)
    (tmp_path / "out").mkdir()
    places.to_csv(tmp_path / "out/map.csv", index=False)
    many.report(tmp_path / "out")
    assert (tmp_path / "out/first.png").exists()
    figure = many.plot_first(many.read_suites(), places)
    probes.check_figure(figure)
    (dots,) = figure.axes[0].collections
    np.testing.assert_allclose(dots.get_offsets(), places[["component 1", "component 2"]])
    np.testing.assert_allclose(dots.get_array(), goals)


def test_a_runs_tasks_are_mapped():
    script = probes.load_script("varshare_ppo.py")
    args = script.make_args("cartpole-goals20", total_timesteps=640, num_steps=16, run_name="r")
    places = many.map_tasks(
        script.train(script.Args(**vars(args) | {"envs_per_task": 1, "eval_episodes": 1}))
    )
    assert len(places) == 20 and places.goal.iloc[[0, -1]].tolist() == [-1.5, 1.5]
    assert 0 < places.share_1.iloc[0] <= 1


def test_the_figure_can_be_read(tmp_path):
    write_suites(lambda n: 10 * np.log2(n), tmp_path)
    figure = many.plot(many.read_suites())
    probes.check_figure(figure)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    x = Result(tmp_path / "results/suites/many-tasks80")
    assert lines["VarShare"].get_ydata()[3] == pytest.approx(x.by_method["varshare"].means.mean())
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == [10] * 5
