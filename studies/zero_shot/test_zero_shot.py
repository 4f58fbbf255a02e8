"""Goals held out of training, and what plays them."""

from pathlib import Path

import numpy as np
import pandas as pd
import probes
import pytest

import enjoy
from bench.collect import read_run
from envs import make
from studies.zero_shot import __main__ as zero

SMALL = {"num_steps": 16, "hidden_sizes": (8,), "eval_episodes": 1, "envs_per_task": 1}


def test_no_protocol_holds_out_an_end_and_the_gap_is_wide():
    goals = [params["goal"] for params in make(zero.ENV, 1).task_params]
    for held_out in zero.HELD_OUT.values():
        assert not {0, 19} & set(held_out)
    gap = list(zero.HELD_OUT["gap"])
    assert goals[gap[-1] + 1] - goals[gap[0] - 1] == pytest.approx(1.1, abs=0.02)
    spread = set(zero.HELD_OUT["spread"])
    assert not any(task + 1 in spread for task in spread)
    tasks = [job.flags.split("--tasks ")[1].split(" --")[0].split() for job in zero.jobs()]
    assert {len(x) for x in tasks} == {14, 15} and len(tasks) == 5 * 2 * len(zero.METHODS)


@pytest.mark.parametrize("method", ["varshare_ppo.py", "baselines/hard_sharing_ppo.py"])
def test_held_out_goals_are_played_by_the_regressed_and_by_the_nearest(method):
    trained = tuple(task for task in zero.TASKS if task not in zero.HELD_OUT["gap"])
    script = probes.load_script(method)
    args = script.make_args(zero.ENV, tasks=trained, total_timesteps=2 * 16 * 14, run_name="r", **SMALL)
    rows = zero.play_held_out(read_run(script.train(args)))
    names = [make(zero.ENV, 1).task_names[task] for task in zero.HELD_OUT["gap"]]
    for metric in (zero.REGRESSED, zero.NEAREST):
        found = rows[rows.metric == metric].set_index("task").value
        assert list(found.index) == [*names, "mean"] and found["mean"] == pytest.approx(found[:-1].mean())
    # by hand: the goal at +0.079 m is nearest to that at -0.079, row 9 of those that were trained
    model = enjoy.Model("runs/r")
    envs = make(zero.ENV, zero.EPISODES, list(zero.HELD_OUT["gap"]))
    W = model.agent.unpack(model.agent.weights()[[9, 9, 9, 10, 10, 10]])
    seeds = zero.spread_seeds(1, 2, envs.num_envs)
    returns = zero.play_episodes(lambda obs: model.agent.policy(W, obs), envs, seeds).returns.mean(1)
    found = rows[(rows.metric == zero.NEAREST) & (rows.task != "mean")].value
    np.testing.assert_allclose(found, returns)


def made_up_rows(finals, near):
    """Rows of both protocols; finals: method -> return of regressed weights, near: of the nearest task's."""
    rows = []
    for seed in zero.SEEDS:
        for protocol in zero.HELD_OUT:
            for method, final in finals.items():
                for metric, x in (
                    (zero.REGRESSED, final),
                    (zero.NEAREST, near),
                    ("eval/episodic_return", 440),
                ):
                    for task in ("goal+0.100", "goal+0.200", "mean"):
                        rows.append(
                            (method, protocol, seed, metric, task, 1000, x + seed % 3 + len(method) % 5)
                        )
    return pd.DataFrame(rows, columns=["method", "setting", "seed", "metric", "task", "step", "value"])


def test_claim_12_is_against_the_nearest_task_and_against_heads():
    jitter = np.random.default_rng(0).normal(size=1000)
    for finals, near, answer in (
        ({"varshare": 430, "hard-sharing": 300}, 380, "supported"),
        ({"varshare": 430, "hard-sharing": 500}, 380, "supported in 1 of 2 comparisons"),
        ({"varshare": 330, "hard-sharing": 400}, 380, "not supported"),
    ):
        runs = made_up_rows(finals, near)
        runs["value"] += jitter[: len(runs)]
        assert zero.claim_12(runs)[0] == answer
    assert zero.claim_12(made_up_rows({"varshare": 1}, 1))[0] == "not decided"


def test_the_report_and_its_figure():
    runs = made_up_rows({"varshare": 430, "hard-sharing": 300}, 380)
    zero.folder_of("zero_shot").mkdir(parents=True)
    text = zero.report(runs)
    assert "## spread: 5 of 20 goals held out" in text and "C12: supported" in text
    assert Path("results/studies/zero_shot/zero_shot.png").exists()
    probes.check_figure(zero.plot(runs))
