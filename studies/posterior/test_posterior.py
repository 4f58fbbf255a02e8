"""Models played with other weights and in other physics, and what the tables say."""

from copy import deepcopy

import numpy as np
import pandas as pd
import probes
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from matplotlib import rc_context

import envs
from bench.collect import EVALUATION
from bench.figures import STYLE
from enjoy import load_agent
from studies.posterior import figures, play, runs, tables

varshare = probes.load_script("varshare_ppo.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained agent and the return of its own evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        folder = probes.run(varshare)
        agent = load_agent(probes.load(folder), varshare, envs.make("cartpole10", 1))
        return agent, probes.evaluation(folder)["mean"]


@pytest.fixture
def model(trained, monkeypatch):
    """The same, to be changed, and to be played in fewer ways."""
    for name, value in {"EPISODES": 2, "NOISE": (0.05, 0.4), "PRUNED": (0.5, 1.0)}.items():
        monkeypatch.setattr(play, name, value)
    agent, expected = trained
    return deepcopy(agent), expected


def test_what_is_played_is_what_it_says(model):
    agent, expected = model
    seed = varshare.Args.seed
    values = {(what, level): x for what, level, x in play.played(agent, "cartpole10", seed, True)}
    assert values["mean", 0] == pytest.approx(expected)
    for what in ("sampled", "ensemble", "layer rms", "shuffled"):
        assert values[what, 0] > 0
    assert values["noise", 0.4] < values["noise", 0.05]  # far from the weights that were trained
    shared = (agent.theta + agent.mu.mean(0)).expand_as(agent.mu)  # of the critic all may go
    alone = play.play(agent, [shared], envs.make("cartpole10", 2), seed).mean()
    assert values["pruned by |mu|", 1.0] == values["pruned by |mu| / sigma", 1.0] == pytest.approx(alone)
    agent.sigma.fill_(1e-9)  # draws are then the mean
    values = {(what, level): x for what, level, x in play.played(agent, "cartpole10", seed, False)}
    assert all(x == pytest.approx(expected) for x in values.values()) and len(values) == 5


def test_a_draw_of_every_episode_acts_in_its_own(model):
    agent, _ = model
    weights = agent.weights().repeat_interleave(3, 0)
    weights += 0.2 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    together = play.play(agent, [weights], envs.make("cartpole10", 3), 5)
    seeds = np.reshape(play.spread_seeds(5, 1, 30), (10, 3))
    for task in (0, 7):
        returns = []
        for i in range(3):
            single, W = envs.make_single("cartpole10", task), agent.unpack(weights[3 * task + i].unsqueeze(0))
            obs, total, over = single.reset(seed=int(seeds[task, i]))[0], 0, False
            while not over:
                policy = agent.policy(W, torch.from_numpy(obs).view(1, 1, -1))
                obs, reward, terminated, truncated, _ = single.step(policy.argmax().item())
                total, over = total + reward, terminated or truncated
            returns.append(total)
        assert together[task] == pytest.approx(np.mean(returns))


def test_changed_physics_are_gymnasiums():
    env = envs.make("cartpole-goals-physics10", 1)
    play.change_physics(env, gravity=0.7, length=1.3)
    env.reset(seed=list(range(10)))
    references = [CartPoleEnv() for _ in env.task_params]
    for i, (reference, params) in enumerate(zip(references, env.task_params)):
        reference.gravity, reference.length = params["gravity"] * 0.7, params["length"] * 1.3
        reference.masscart, reference.masspole = params["masscart"], params["masspole"]
        reference.total_mass = reference.masscart + reference.masspole
        reference.polemass_length = reference.masspole * reference.length
        reference.reset(seed=i)
    for action in (0, 1, 0):
        observations = env.step(np.full(10, action))[0]
        np.testing.assert_allclose(observations, [x.step(action)[0] for x in references], rtol=1e-6)


def test_controls_of_sigma_keep_to_the_live_weights_of_a_task_and_layer(model):
    agent, _ = model
    agent.h_sum.copy_(torch.rand(agent.mu.shape, generator=torch.Generator().manual_seed(0)) < 0.6)
    agent.sigma.uniform_(generator=torch.Generator().manual_seed(1))
    lives, sigmas = agent.unpack(play.live_weights(agent)), agent.unpack(agent.sigma)
    rms = agent.unpack(play.of_each(agent, agent.sigma, lambda x: x.square().mean().sqrt()))
    for name, live in lives.items():
        assert torch.equal(rms[name][~live], sigmas[name][~live])
        of_task = sigmas[name][9][live[9]].square().mean().sqrt()
        torch.testing.assert_close(rms[name][9][live[9]], of_task.expand(int(live[9].sum())))


def test_pruning_drops_the_lowest_scores_of_every_task():
    theta, mu = torch.ones(4), torch.tensor([[1.0, -2, 3, -4], [4, 3, -2, 1]])
    expected = torch.tensor([[1.0, 1, 4, -3], [5, 4, 1, 1]])
    assert torch.equal(play.prune(theta, mu, mu.abs(), 0.5), expected)
    assert torch.equal(play.prune(theta, mu, mu.abs(), 0.0), theta + mu)
    assert torch.equal(play.prune(theta, mu, mu.abs(), 1.0), torch.ones(2, 4))
    score = mu.abs().clone()
    score[:, 0] = torch.inf  # stays, and the share is of the other three
    expected = torch.tensor([[2.0, 1, 1, -3], [5, 4, 1, 1]])
    assert torch.equal(play.prune(theta, mu, score, 2 / 3), expected)


def test_prunable_is_the_largest_share_up_to_which_all_keep_95_percent():
    rows = [(1, "mean", 0, 100), (1, "x", 0.5, 96), (1, "x", 0.9, 94), (1, "x", 0.95, 97)]
    rows += [(2, "mean", 0, 200), (2, "x", 0.5, 189), (2, "x", 0.9, 200), (2, "x", 0.95, 200)]
    table = pd.DataFrame(rows, columns=["seed", "what", "level", "value"])
    assert tables.prunable(table, "x").to_dict() == {1: 0.5, 2: 0.0}


def make_up():
    """Rows of the three CSVs, a learned sigma 20 better than L2Soft and a fixed one 20 worse.

    The last evaluation is a little before the end of the run, where the last training returns are counted.
    """
    rng, rows, played, sigma = np.random.default_rng(0), [], [], []
    gains = {"l2soft@mean": 0, "varshare-fixed@mean": -20, "varshare@mean": 20, "varshare-shuffled@mean": -30}
    gains |= {f"{x}@warm": -10 for x in ("varshare", "varshare-fixed", "varshare-shuffled")}
    gains |= {"varshare@sample": 0, "varshare-samples@mean": 0}
    sparse = {"task-blind@mean": -90, "l2soft@mean": 0, "l2soft@entropy": 30, "varshare@mean": 0}
    sparse |= {"varshare@sample": 0, "varshare@sample-warm": 60}
    cases = [("goals", *item) for item in gains.items()] + [(runs.SPARSE, *item) for item in sparse.items()]
    for (env, name, gain), seed in ((case, seed) for case in cases for seed in range(10)):
        method, _, setting = name.partition("@")
        key = {"env": env, "steps": 1000, "method": method, "setting": setting, "seed": seed}
        mean = 100 + 5 * seed + gain + rng.normal()
        metrics = {EVALUATION: mean, runs.TRAINING: mean - 10}
        for step, (metric, value) in ((s, item) for s in (500, 1000) for item in metrics.items()):
            step = 960 if step == 1000 and metric == EVALUATION else step
            rows.append(key | {"metric": metric, "task": "mean", "step": step, "value": value})
        for task, value in (("goal+0.2", 500), ("goal+1", mean - 60), ("goal-1", mean + 60)):
            rows.append(key | {"metric": EVALUATION, "task": task, "step": 960, "value": value})
        if env == "goals":
            cases_played = [("mean", 0, mean), ("sampled", 0, mean - 1), ("ensemble", 0, mean)]
            cases_played += [("layer rms", 0, mean - 40), ("shuffled", 0, mean - 50)]
            cases_played += [("live weights with sigma below 0.9 of the prior's", 0, 0.25)]
            if name in runs.USED:
                loss = 1 if name == runs.LEARNED else 2  # to noise; to physics all lose a tenth
                cases_played += [("noise", x, mean * (1 - loss * x)) for x in play.NOISE]
                cases_played += [(*item, 0.9 * mean) for x in play.PHYSICS for item in x.items()]
                for last, what in ((0.9, "|mu|"), (0.98, "|mu| / sigma")):
                    curve = [(x, mean * (0.99 if x <= last else 0.5)) for x in play.PRUNED]
                    cases_played += [(f"pruned by {what}", *item) for item in curve]
            played += [(*x, name, env, seed) for x in cases_played]
    for step, q in ((s, q) for s in (500, 1000) for q in (1, 50, 99)):
        key = {"env": "goals", "method": "varshare", "setting": "mean", "step": step}
        sigma.append(key | {"metric": f"{runs.SIGMAS}{q}/actor.0", "value": q})
    columns = ["what", "level", "value", "run", "env", "seed"]
    return pd.DataFrame(rows), pd.DataFrame(played, columns=columns), pd.DataFrame(sigma)


def test_tables_say_what_the_runs_do():
    rows, played, sigma = make_up()
    text = tables.all_tables(rows, played, sigma)

    def verdict(part, *cells):
        lines = text.split(f": {part}")[1].split("## ")[0].splitlines()
        found = [x.strip(" |") for x in lines if all(f"| {cell} |" in f" {x}" for cell in cells)]
        assert len(found) == 1, (part, cells, found)
        return found[0].split("|")[-1].strip()

    assert verdict("the ladder", "varshare@mean minus l2soft@mean") == "better"
    assert verdict("the ladder", "varshare-fixed@mean minus l2soft@mean") == "worse"
    assert verdict("the ladder", "varshare@mean minus varshare-shuffled@mean") == "better"
    assert verdict("the ladder", "varshare@warm minus varshare-fixed@warm") == "the same"
    assert verdict("C3", "varshare@mean, sampled minus varshare@mean, mean") == "the same"
    assert verdict("what sigma knows", "varshare@mean", "sampled minus layer rms") == "better"
    assert verdict("robustness", "noise 0.1", "varshare@mean minus l2soft@mean") == "better"
    assert "| gravity 0.7 | 0.90 [0.90, 0.90] |" in text
    assert verdict("pruning", "varshare@mean by |mu| / sigma minus varshare@mean by |mu|") == "better"
    assert "| varshare@mean by |mu| / sigma | 2 [2, 2] |" in text
    assert "| varshare@mean | 10 | 142.5 [131.9, 153.1] |" in text  # 100 + 5 * 4.5 + 20, and noise
    (found,) = [line for line in text.splitlines() if line.startswith("| l2soft@entropy | 10 |")]
    assert found.endswith("| 2.0 [2.0, 2.0] |")  # of two far goals
    assert verdict("cartpole-goals10-sparse", "varshare@sample-warm minus l2soft@entropy") == "better"
    assert "This suite can tell: the best method, varshare@sample-warm" in text
    with rc_context(STYLE):
        use, ladder = figures.plot_use(rows, played), figures.plot_ladder(rows)
        for figure in (use, ladder, figures.plot_sigma(rows, sigma)):
            probes.check_figure(figure)
            assert "means of 10 runs" in figure.get_suptitle()
    curves = [line for line in use.axes[-1].get_lines() if len(line.get_xdata())]  # without the legend's
    assert len(curves) == 6
    for line in curves:
        np.testing.assert_allclose(line.get_xdata(), 100 * (1 - np.array(play.PRUNED[:-1])))
    # of a grid of which only some runs have finished
    some = ["l2soft@mean", "varshare@mean"]
    rows, played = rows[(rows.method + "@" + rows.setting).isin(some)], played[played.run.isin(some)]
    text = tables.all_tables(rows, played, sigma)
    assert verdict("the ladder", "varshare@mean minus l2soft@mean") == "better"
    training, evaluation = figures.plot_ladder(rows[rows.env == "goals"]).axes
    assert len(training.get_lines()) == len(evaluation.get_lines()) == 2
