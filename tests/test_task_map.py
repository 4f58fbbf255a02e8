"""Tests of the map of a run's tasks: it finds planted structure, and is drawn of methods that have one."""

import json
import shutil

import numpy as np
import probes
import pytest
import torch
from scipy.stats import spearmanr

import report
from bench.collect import (
    cosines,
    direction_correlation,
    hidden_parameter,
    principal_components,
    read_run,
    residuals,
    task_vectors,
)
from envs.cartpole import GOALS

RNG = np.random.default_rng(1)
NOISE = RNG.normal(size=(len(GOALS), 500))
ON_A_LINE = np.outer(GOALS, RNG.normal(size=500)) + 0.02 * NOISE
ON_A_CURVE = np.exp(-np.square(np.subtract.outer(GOALS, np.linspace(-3, 3, 500)))) + 0.001 * NOISE


def test_planted_structure_is_found():
    places, shares = principal_components(ON_A_LINE)
    assert abs(np.corrcoef(places[:, 0], GOALS)[0, 1]) > 0.99
    assert shares[0] > 0.95 and (places[0] <= 0).all()
    for planted in (ON_A_LINE, ON_A_CURVE):  # not 1, because they are centred
        assert direction_correlation(planted, GOALS) > 0.8
    assert direction_correlation(ON_A_CURVE, RNG.permutation(GOALS)) < 0.5
    draws = [direction_correlation(RNG.normal(size=NOISE.shape), GOALS) for _ in range(50)]
    assert abs(np.mean(draws)) < 0.1


def test_arithmetic_is_that_of_slow_formulas():
    x = ON_A_CURVE - ON_A_CURVE.mean(0)
    places, shares = principal_components(ON_A_CURVE)
    U, s, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(np.abs(places), np.abs(U * s)[:, :2], atol=1e-8)
    np.testing.assert_allclose(shares, s[:2] ** 2 / np.sum(s**2))
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    angles = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i, j in pairs]
    np.testing.assert_allclose([cosines(ON_A_CURVE)[pair] for pair in pairs], angles)
    near = [-abs(GOALS[i] - GOALS[j]) for i, j in pairs]
    expected = spearmanr(angles, near).statistic
    assert direction_correlation(ON_A_CURVE, GOALS) == pytest.approx(expected)


def test_a_vector_common_to_all_residuals_changes_nothing():
    """It is the same network if theta gives it."""
    shift = RNG.normal(size=500)
    for one, other in zip(principal_components(ON_A_LINE), principal_components(ON_A_LINE + shift)):
        np.testing.assert_allclose(one, other, atol=1e-8)
    expected = direction_correlation(ON_A_CURVE, GOALS)
    assert direction_correlation(ON_A_CURVE + shift, GOALS) == pytest.approx(expected)
    np.testing.assert_allclose(cosines(ON_A_LINE), cosines(ON_A_LINE + shift))
    mu, c = torch.from_numpy(ON_A_LINE), torch.from_numpy(shift)
    names = list(map(str, GOALS))
    both = [residuals({"theta": theta, "mu": x}, names) for theta, x in ((c, mu), (c - c, mu + c))]
    values = [[float(value) for *_, value in rows] for rows in both]
    assert values[0] == pytest.approx(values[1])


def test_a_goal_comes_before_what_follows_the_first_component():
    params = [{"x": i, "y": y, "kind": "a", "z": 1} for i, y in enumerate((3, 1, 2.5))]
    order = np.array([0.3, 0.1, 0.2])
    found = hidden_parameter(params, order)
    assert found.name == "y" and found.tolist() == [3, 1, 2.5]
    assert hidden_parameter(params, -order).name == "y"
    goals = [row | {"goal": goal} for row, goal in zip(params, (0, 0, 1))]
    assert hidden_parameter(goals, order).name == "goal"
    assert hidden_parameter([row | {"goal": 0} for row in params], order).name == "y"
    for none in ([{}] * 3, [{"z": 1, "kind": kind} for kind in "abc"], [{"x": 1}, {"x": 2}, {}]):
        assert hidden_parameter(none, order) is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("varshare_ppo.py", {"env_id": "cartpole-goals20"}),
        ("variants/varshare_lora_ppo.py", {"env_id": "cartpole-goals10", "tasks": (2, 0, 1)}),
        ("baselines/contextual_ppo.py", {"embedding_size": 1}),
        ("baselines/paco_ppo.py", {}),
        pytest.param("baselines/soft_modularization_ppo.py", {}, marks=pytest.mark.slow),
        pytest.param("baselines/moore_ppo.py", {"num_experts": 3}, marks=pytest.mark.slow),
    ],
)
def test_it_is_drawn_of_a_run(elsewhere, name, changes):
    script = probes.load_script(name)
    folder = probes.run(script, **changes)
    run = read_run(folder)
    figure = report.plot_task_map(run)
    probes.check_figure(figure)
    dots, heat = figure.axes[:2]
    order = np.argsort(dots.collections[0].get_offsets()[:, 0])
    assert order.tolist() == list(range(len(run.tasks)))
    rows = [label.get_text().split("  ") for label in heat.get_yticklabels()]
    assert sorted(row[0] for row in rows) == sorted(run.tasks)
    assert [text.get_text() for text in dots.texts] == [row[1] for row in rows]
    agent, W = probes.load_agent(script, folder)
    if "embedding" in W:
        expected = agent.embedding
    elif "actor.embedding" in W:
        expected = torch.cat((W["actor.embedding"], W["critic.embedding"]), 1)
    elif "actor.w" in W:
        expected = torch.cat((W["actor.w"], W["critic.w"]), 1)
    elif hasattr(agent, "w"):
        expected = agent.weights()
    else:
        own = [W[f"{x[:-7]}.B"] @ W[f"{x[:-7]}.A"] if f"{x[:-7]}.A" in W else W[x] for x in agent.shapes]
        expected = torch.cat([x.flatten(1) for x in own], 1)
    places = [run.tasks.index(row[0]) for row in rows]
    drawn = np.ma.filled(heat.get_images()[0].get_array(), 1)
    np.testing.assert_allclose(drawn, cosines(expected.double().numpy()[places]), atol=1e-3)
    (image,) = heat.get_images()
    assert image.norm(-1 / (len(run.tasks) - 1)) == pytest.approx(0.5)
    if name == "varshare_ppo.py":
        report.main((folder,))
        assert (folder / "plots/task_map.png").exists()


def test_it_is_left_out_where_there_is_none(elsewhere):
    hard = probes.run(probes.load_script("baselines/hard_sharing_ppo.py"), "hard")
    assert task_vectors(read_run(hard)) is None
    lora = probes.run(probes.load_script("variants/varshare_lora_ppo.py"), "lora")
    strange = shutil.copytree(lora, lora.with_name("strange"))
    model = probes.load(lora)
    torch.save(model | {"args": model["args"] | {"env_id": "not-here"}}, strange / "model.pt")
    alone = probes.run(probes.load_script("varshare_ppo.py"), "alone", tasks=(3, 4), total_timesteps=512)
    for folder in (hard, alone, strange):
        assert report.plot_task_map(read_run(folder)) is None


def test_many_tasks_have_no_names_and_equal_ones_no_colours(elsewhere):
    folder = probes.run(probes.load_script("varshare_ppo.py"), env_id="cartpole-goals40")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"task_params": [{}] * 40}))
    figure = report.plot_task_map(read_run(folder))
    probes.check_figure(figure)
    dots, heat, bar = figure.axes  # the cosines' bar alone
    names = (*dots.texts, *heat.get_xticklabels(), *heat.get_yticklabels())
    assert not any(name.get_text() for name in names)
    assert bar.get_ylabel() == "cosine (unrelated: -0.03)"
