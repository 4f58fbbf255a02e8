"""Tests of what is made of the trials of a search: its table and figures, on made-up trials."""

import numpy as np
import pandas as pd
import probes
import pytest
from optuna.distributions import CategoricalDistribution
from PIL import Image

from bench.methods import METHODS, parse_flags, title_of, write_flags
from studies.conftest import cells_of
from studies.settings import __main__ as settings_of

SUITE = "cartpole-goals10"


def draw(rng, space):
    """A setting from all over its space; a number's is its place there, from 0 to 1."""
    if isinstance(space, CategoricalDistribution):
        return str(rng.choice(space.choices)), 0.0
    place = rng.uniform()
    low, high = (np.log([space.low, space.high])) if space.log else (space.low, space.high)
    value = low + place * (high - low)
    return f"{np.exp(value) if space.log else value:.3g}", place


def make_trials(method, final, complete=40, dropped=0, crashed=0, suite=SUITE):
    """Trials of a method; final is a function of the settings and of their places in the space."""
    rng, rows = np.random.default_rng(0), []
    states = ["complete"] * complete + ["dropped"] * dropped + ["crashed"] * crashed
    for i, state in enumerate(states):
        drawn = {name: draw(rng, space) for name, space in METHODS[method].space.items()}
        settings, places = ({name: x[j] for name, x in drawn.items()} for j in (0, 1))
        row = {"suite": suite, "method": method, "trial": i, "state": state}
        row |= {"settings": write_flags(settings)}
        rows.append(row | {"final": np.nan if state == "crashed" else final(settings, places)})
    return pd.DataFrame(rows)


def by_rate(settings, places):
    """Best in the middle of the step sizes; from 0 to 100."""
    return 100 - 400 * (places["learning-rate"] - 0.5) ** 2


@pytest.mark.parametrize(
    ("method", "name", "final"),
    [
        ("varshare", "learning-rate", by_rate),
        ("contextual", "embedding-size", lambda settings, places: -int(settings["embedding-size"])),
    ],
)
def test_the_setting_that_matters_is_found(method, name, final):
    shares = settings_of.importance(make_trials(method, final), method)
    assert set(shares) == set(METHODS[method].space) and sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == name and shares[name] > 0.6


def test_the_settings_that_matter_have_panels_with_all_trials():
    """Two of every method."""
    trials = [make_trials(m, by_rate, complete=12, dropped=3, crashed=2) for m in ("contextual", "varshare")]
    trials.append(make_trials("cagrad", by_rate, complete=0, crashed=5))  # of which nothing can be said
    figure = settings_of.plot_settings(pd.concat(trials), "suite")
    probes.check_figure(figure)
    axes = iter(figure.axes)
    for method, of_method in zip(("varshare", "contextual", "cagrad"), (trials[1], trials[0], trials[2])):
        floor, shares = settings_of.floor_of(of_method), settings_of.importance(of_method, method)
        most = sorted(METHODS[method].space, key=lambda name: -shares.get(name, 0))[:2]
        for name in most:
            ax, choices = next(axes), getattr(METHODS[method].space[name], "choices", None)
            assert ax.get_title() == title_of(method)
            assert ax.get_xlabel() == (f"{name}, {shares[name]:.0%}" if shares else name)
            drawn = {line.get_marker(): np.column_stack(line.get_data()) for line in ax.get_lines()}
            for state, mark in settings_of.STATES.items():
                expected = of_method[of_method.state == state]
                values = [parse_flags(x)[name] for x in expected.settings]
                x = [choices.index(v) if choices else float(v) for v in values]
                points = np.column_stack((x, expected.final.fillna(floor).clip(lower=floor)))
                np.testing.assert_allclose(drawn[mark].reshape(-1, 2), points)
    assert next(axes, None) is None


def test_the_report_of_a_search(tmp_path):
    """A table and a figure for each suite; a method whose runs have not come to fresh seeds is drawn."""
    other = "cartpole10"
    trials = [make_trials("varshare", by_rate, 10, 3, 1), make_trials("pcgrad", by_rate, 2)]
    trials.append(make_trials("l2soft", by_rate, 9, suite=other))
    pd.concat(trials).to_csv(tmp_path / "trials.csv", index=False)
    assert settings_of.report(tmp_path, tmp_path) == "no search has come to an end"
    rows = [(SUITE, "task-blind", "--learning-rate 0.02", 180.25, 12, 0, 0, 18_000_000)]
    rows += [(SUITE, "varshare", "--learning-rate 0.01 --beta 0.001", 400.0, 10, 3, 1, 17_500_000)]
    rows += [(other, "l2soft", "--l2-coef 0.01", 480.0, 9, 0, 0, 9_000_000)]
    columns = ["suite", "method", "settings", "final", "complete", "dropped", "crashed", "spent"]
    pd.DataFrame(rows, columns=columns).assign(search=1).to_csv(tmp_path / "settings.csv", index=False)
    settings_of.report(tmp_path, tmp_path)
    text = (tmp_path / "table.md").read_text()  # methods in the order of methods.csv
    first, second = cells_of(text, f"## {SUITE}"), cells_of(text, f"## {other}")
    assert list(first) == ["VarShare", "Task-blind"] and list(second) == ["L2Soft"]
    cells = ["VarShare", "1", "`--learning-rate 0.01 --beta 0.001`", "400.0", "", "14", "3", "1", "17.5 M"]
    assert list(first["VarShare"].values()) == cells
    for suite in (SUITE, other):
        with Image.open(tmp_path / f"{suite}.png") as image:
            image.load()


def test_where_only_step_sizes_were_tried_a_table_says_what_each_reached(tmp_path):
    finals = {"varshare": (30.0, 41.26, np.nan), "task-blind": (12.0, 9.0, 3.0)}
    rows = [
        {"suite": "mt10", "method": method, "trial": i, "state": "crashed" if np.isnan(x) else "complete"}
        | {"settings": f"--learning-rate {rate}", "final": x, "steps": 1_000_000}
        for method, values in finals.items()
        for i, (rate, x) in enumerate(zip(("0.0003", "0.001", "0.003"), values))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "trials.csv", index=False)
    pd.DataFrame({"suite": "mt10", "method": list(finals)}).to_csv(tmp_path / "settings.csv", index=False)
    settings_of.report(tmp_path, tmp_path)
    rows = cells_of((tmp_path / "table.md").read_text())
    assert list(rows["VarShare"].values()) == ["VarShare", "30.0", "**41.3**", "crashed", "3.0 M"]
    assert list(rows["Task-blind"].values()) == ["Task-blind", "**12.0**", "9.0", "3.0", "3.0 M"]
    assert not list(tmp_path.glob("*.png"))
