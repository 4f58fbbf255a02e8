"""The mathematics of PPO, in VarShare and in all scripts that share it."""

import itertools
import shutil
from functools import partial

import numpy as np
import probes
import pytest
import scipy.stats
import torch
import torch._dynamo.utils
from probes import BOTH, TASKS
from torch.distributions import (
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

from envs import policies
from envs.evaluation import greedy

varshare = probes.load_script("varshare_ppo.py")
make_agent, settings = partial(probes.make_agent, varshare), partial(probes.settings, varshare)
UNCLIPPED = 1e9  # as --max-grad-norm

pytestmark = pytest.mark.usefixtures("elsewhere")


# Policies


def torchs(name, x):
    """A policy of envs/policies.py with random parameters, and the same by torch.distributions."""
    if name == "Categorical":
        return policies.Categorical(x), Categorical(logits=x)
    mean, logstd = x.chunk(2, -1)
    if name == "Gaussian":
        return policies.Gaussian(mean, logstd[..., :1, :]), Independent(
            Normal(mean, logstd[..., :1, :].exp().expand_as(mean)), 1
        )
    base = Normal(mean, (-5 + 0.5 * 7 * (logstd.tanh() + 1)).exp())
    expected = Independent(TransformedDistribution(base, [TanhTransform()]), 1)
    return policies.SquashedGaussian(x), expected


@pytest.mark.parametrize("name", ["Categorical", "Gaussian", "SquashedGaussian"])
def test_policies_are_torchs_and_actions_are_drawn_from_them(name):
    rng, draws = torch.Generator().manual_seed(0), 20_000
    x = torch.randn(3, 5, 4, generator=rng).double()
    policy, expected = torchs(name, x)
    noise = policies.action_noise(name == "Categorical", (3, 5, 4 if name == "Categorical" else 2), rng)
    actions = policy.sample(noise.double())
    if name == "SquashedGaussian":
        same, logprob = policy.sample_log_prob(noise.double())
        assert torch.equal(same, actions)
        torch.testing.assert_close(policy.mean, x[..., :2].tanh())
    else:
        logprob, entropy = policy.log_prob_entropy(actions)
        torch.testing.assert_close(entropy, expected.entropy())
        torch.testing.assert_close(policy.mean, getattr(expected, "probs", expected.mean))
    torch.testing.assert_close(logprob, expected.log_prob(actions))

    policy, expected = torchs(name, x[:1, :1].expand(1, draws, 4))
    noise = policies.action_noise(name == "Categorical", (1, draws, noise.shape[-1]), rng).double()
    actions = policy.sample(noise)[0]
    if name == "Categorical":
        counts = np.bincount(actions, minlength=4)
        assert scipy.stats.chisquare(counts, expected.probs[0, 0] * draws).pvalue > 0.001
        return
    if name == "SquashedGaussian":
        actions = torch.atanh(actions)
        expected = Independent(expected.base_dist.base_dist, 1)
    z = (actions - expected.mean[0]) / expected.base_dist.stddev[0]
    assert all(scipy.stats.kstest(z[:, i], "norm").pvalue > 0.001 for i in range(2))
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.03


@pytest.mark.parametrize("steps", [1, 2, 63, 64])
@pytest.mark.parametrize("color", [0.5, 1.0, 2.0])
def test_coloured_noise_is_normal_at_every_step_and_its_power_falls_with_the_frequency(steps, color):
    draws = 20_000
    noise = policies.action_noise(False, (steps, draws // 4, 4), torch.Generator().manual_seed(1), color)
    assert noise.shape == (steps, draws // 4, 4)
    noise = noise.flatten(1).double()
    assert all(scipy.stats.kstest(x, "norm").pvalue > 1e-4 for x in noise[:: max(1, steps // 5)])
    power = torch.fft.rfft(noise, dim=0).abs().square().mean(1)
    frequency = torch.tensor([1.0, *range(1, len(power))])  # 0 has the power of 1
    torch.testing.assert_close(power / power[0], (frequency**-color).to(power), rtol=0.06, atol=0)
    if steps > 1:  # parts of it are the same everywhere: no step is the first
        torch.testing.assert_close(noise.square().mean(1), torch.ones(steps).to(noise), rtol=0.05, atol=0)
    white = policies.action_noise(False, (steps, 3), torch.Generator().manual_seed(2), 0.0)
    assert torch.equal(white, torch.empty(steps, 3).normal_(generator=torch.Generator().manual_seed(2)))


def test_greedy_actions():
    policy = torch.tensor([[[0.5, -3.0]], [[4.0, -1.0]]])
    assert greedy(policy, probes.BOX).tolist() == [[[0.5, -1.0]], [[1.0, -1.0]]]
    assert greedy(torch.tensor([[[0.1, 0.6, 0.2, 0.1]]]), probes.DISCRETE).tolist() == [[1]]


# The objective. Of scripts with gradient surgery see test_baselines.py


@BOTH
@pytest.mark.parametrize("name", [*probes.SCRIPTS, "fixed_sigma_ppo"])
def test_networks_equal_a_loop_over_tasks(name, space):
    """Also normalised critics, and any number of samples."""
    script = probes.load_script(name)
    agent = make_agent_of(script, space)
    for samples in (1, 40):
        obs = torch.randn(TASKS, samples, probes.OBS).double()
        draws = [x for x in probes.draws(agent) if x.shape == agent.weights().shape]
        for noise in ([], draws) if draws else ([],):
            weights, inputs = probes.networks(agent, obs, *noise)
            out, values, logstd = probes.forward_task_by_task(agent, weights, inputs)
            W = agent.unpack(agent.weights(*noise))
            torch.testing.assert_close(agent.actor(W, obs), out)
            torch.testing.assert_close(agent.critic(W, obs), values)
            torch.testing.assert_close(W.get("logstd", logstd), logstd)
            torch.testing.assert_close(agent.policy(W, obs), out.softmax(2) if agent.discrete else out)


def make_agent_of(script, space):
    return probes.make_agent(
        script, space, norm_critic=True, **{"sigma": 0.2} if "fixed" in script.__file__ else {}
    )


def objective(agent, b, noise, args):
    """The formula of the scripts' docstrings, independently: its value, each task's loss, and what to log."""
    weights, inputs = probes.networks(agent, b.obs, noise)
    losses, stats = probes.losses_task_by_task(agent, weights, b._replace(obs=inputs), args)
    total = losses.sum()
    if hasattr(args, "beta"):
        kl = kl_divergence(Normal(agent.mu, agent.sigma), Normal(0.0, args.sigma_prior))
        total = total + args.beta / (9 * 2) * kl.sum()  # of the samples in a rollout, not in a minibatch
    if hasattr(args, "l2_coef"):
        total = total + args.l2_coef * agent.mu.square().sum()
    return total, losses, stats, weights


def clip(grads, max_norm, apart):
    """As torch does: all together, or each row (Independent's tasks) by itself."""
    rows = [[x] for x in grads["theta"]] if apart else [list(grads.values())]
    for xs in rows:
        parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in xs]
        for parameter, x in zip(parameters, xs):
            parameter.grad = x
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return grads


@BOTH
@pytest.mark.parametrize("freeze_theta", [False, True])
@pytest.mark.parametrize("name", [*(x for x in probes.SCRIPTS if "grad_" not in x), "fixed_sigma_ppo"])
def test_gradients_are_those_of_the_objective(monkeypatch, name, freeze_theta, space):
    script = probes.load_script(name)
    if freeze_theta and not hasattr(script.Args, "freeze_theta"):
        return
    agent = make_agent_of(script, space)
    agent.theta.requires_grad_(not freeze_theta)
    args = probes.settings(script, clip_coef=0.15, vf_coef=0.7, ent_coef=0.03, max_grad_norm=UNCLIPPED)
    for flag in {"beta", "l2_coef"} & vars(args).keys():
        setattr(args, flag, 0.7)
    b, draws, rows = probes.random_batch(script, agent, 20), probes.draws(agent), []
    total, losses, expected_stats, weights = objective(agent, b, *(draws or [0.0]), args)
    trained = {name: x for name, x in agent.named_parameters() if x.requires_grad}
    if hasattr(script, "learn_sigma"):  # gets row by row the gradient of each task's loss by its weights
        expected_rows = torch.autograd.grad(losses.sum(), weights, retain_graph=True)[0]
        monkeypatch.setattr(script, "learn_sigma", lambda agent, G, args: rows.append(G.clone()))
    expected = dict(zip(trained, torch.autograd.grad(total, trained.values(), retain_graph=True)))
    grads, stats = probes.gradients(script, agent, b, *draws, args)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(stats, expected_stats, check_dtype=False)
    assert 0.1 < stats["losses/clipfrac"].mean() < 0.95  # both sides of the clip were tested
    assert not any(x.requires_grad for x in stats.values())
    for G in rows:
        torch.testing.assert_close(G, expected_rows)
    args.max_grad_norm = 0.05
    clipped, _ = probes.gradients(script, agent, b, *draws, args)
    torch.testing.assert_close(clipped, clip(expected, 0.05, apart="independent" in name))


# Rollouts


def test_gae_by_hand():
    """Six steps: the second ends by termination, the fourth by truncation, the last one runs on."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    values = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    next_values = torch.tensor([20.0, 1000.0, 40.0, 100.0, 60.0, 70.0])
    terminated = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    done = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    # deltas: 1+10-10, 2-20, 3+20-30, 4+50-40, 5+30-50, 6+35-60; each adds 0.25 of the next of its episode
    expected = [1 + 0.25 * -18, -18, -7 + 0.25 * 14, 14, -15 + 0.25 * -19, -19]
    args = settings(gamma=0.5, gae_lambda=0.5)
    assert varshare.gae(rewards, values, next_values, terminated, done, args).tolist() == expected


def made_up_rollouts(monkeypatch, env_id, **changes):
    """Rollouts of random numbers whose episodes often end, and what the updates of a run get of them.

    Returns pairs of rollout and batch, with weights by name that were the same all the time.
    """
    rollout, rng, seen = varshare.rollout, torch.Generator().manual_seed(0), []

    def made_up(agent, W, envs, next_obs, *rest):
        data = rollout(agent, W, envs, next_obs, *rest)
        obs, final_obs, rewards = (
            3 * torch.randn(x.shape, generator=rng) + 4 for x in (data.obs, data.final_obs, data.rewards)
        )
        ends = (torch.rand((2, *rewards.shape), generator=rng) < 0.25).float()
        ends[:, 3] = 0  # steps without an end, and without a truncation
        ends[1, 4] = 0
        for both in itertools.product((0, 1), repeat=2):
            assert ((ends[0] == both[0]) & (ends[1] == both[1])).any()
        seen.append(
            data._replace(
                obs=obs, rewards=rewards, terminated=ends[0], truncated=ends[1], final_obs=final_obs
            )
        )
        return seen[-1]

    batches, weights = [], []

    def nothing(agent, optimizer, batch, *rest):
        batches.append(batch)
        weights.append(agent.unpack(agent.weights().detach()))
        return {}

    monkeypatch.setattr(varshare, "rollout", made_up)
    monkeypatch.setattr(varshare, "update", nothing)
    probes.learn(varshare, env_id, rollouts=3, **changes)
    return zip(seen, batches), weights[0]


@pytest.mark.parametrize(("env_id", "norm"), [("RewardOfForce", False), ("Opposites", True)])
def test_what_an_update_gets_equals_a_computation_sample_by_sample(monkeypatch, env_id, norm):
    """Values, bootstrapping, GAE, and all normalisations, over three rollouts, in plain NumPy."""
    changes = dict.fromkeys(("norm_obs", "norm_value", "norm_reward"), norm) | {
        "gamma": 0.9,
        "gae_lambda": 0.8,
    }
    pairs, W = made_up_rollouts(monkeypatch, env_id, **changes)
    W = {name: x.double().numpy() for name, x in W.items()}
    tasks = len(W["actor.0.bias"])
    obs_mean, obs_std, value_mean, value_std = 0.0, 1.0, np.zeros(tasks), np.ones(tasks)
    limit, all_obs, all_returns, discounted = (
        10 if norm else 100,
        [],
        [[] for _ in range(tasks)],
        [[] for _ in range(tasks)],
    )
    running = np.zeros((tasks, 16))

    def value(m, obs):
        x = np.clip((obs - obs_mean) / obs_std, -limit, limit)
        x = np.maximum(x @ W["critic.0.weight"][m].T + W["critic.0.bias"][m], 0)
        return (x @ W["critic.1.weight"][m].T + W["critic.1.bias"][m])[..., 0] * value_std[m] + value_mean[m]

    for data, batch in pairs:
        obs, out, actions, rewards, terminated, truncated, final_obs = (x.double().numpy() for x in data)
        for t, m, i in np.ndindex(rewards.shape):
            running[m, i] = 0.9 * running[m, i] + rewards[t, m, i]
            discounted[m].append(running[m, i])
            running[m, i] *= not (terminated[t, m, i] or truncated[t, m, i])
        rollout = []
        for m in range(tasks):
            scale = np.std(discounted[m]) if norm else 1.0
            values, final_values = value(m, obs[:, m]), value(m, final_obs[:, m])
            advantages = np.zeros_like(values)
            for t, i in itertools.product(reversed(range(16)), range(16)):
                follows, later = values[t + 1, i], advantages[t + 1, i]
                if truncated[t, m, i]:
                    follows, later = final_values[t, i], 0.0
                if terminated[t, m, i]:
                    follows, later = 0.0, 0.0
                delta = rewards[t, m, i] / scale + 0.9 * follows - values[t, i]
                advantages[t, i] = delta + 0.9 * 0.8 * later
            rollout.append((advantages[:-1].ravel(), (advantages + values)[:-1].ravel()))
        for m, (advantages, returns) in enumerate(rollout):
            all_returns[m].append(returns)
            if norm:
                weights = np.repeat(0.9 ** np.arange(len(all_returns[m]))[::-1], len(returns))
                seen = np.concatenate(all_returns[m])
                value_mean[m] = np.average(seen, weights=weights)
                value_std[m] = np.sqrt(np.average((seen - value_mean[m]) ** 2, weights=weights) + 1e-8)
            expected = (advantages - advantages.mean()) / advantages.std(ddof=1)
            np.testing.assert_allclose(batch.advantages[m], expected, atol=2e-4)
            np.testing.assert_allclose(batch.returns[m], (returns - value_mean[m]) / value_std[m], atol=2e-4)
            x = np.clip(
                (obs[:-1, m] - obs_mean) / obs_std, -limit, limit
            )  # by what acted, before this was seen
            np.testing.assert_allclose(batch.obs[m], x.reshape(-1, 1), atol=1e-4)
            acted, logits = actions[:, m].reshape(256, -1), torch.from_numpy(out[:, m].reshape(256, -1))
            assert np.array_equal(batch.actions[m].reshape(256, -1), acted)
            if env_id == "Opposites":
                logprobs = Categorical(logits=logits).log_prob(torch.from_numpy(acted[:, 0]))
            else:
                std = torch.from_numpy(W["logstd"][m]).exp()
                logprobs = Normal(logits, std).log_prob(torch.from_numpy(acted)).sum(1)
            np.testing.assert_allclose(batch.logprobs[m], logprobs, atol=1e-5)
        all_obs.append(obs[:-1].ravel())
        if norm:
            obs_mean, obs_std = np.mean(all_obs), np.std(all_obs)


def test_every_epoch_goes_once_through_all_samples_with_fresh_noise():
    agent, args = make_agent(), settings(num_minibatches=3, update_epochs=4)
    batch = probes.random_batch(varshare, agent, 9 * 2)
    seen, start = [], {name: x.detach().clone() for name, x in agent.named_parameters()}

    def recorded(agent, mb, noise, args):
        assert all(x.grad is None or not x.grad.any() for x in agent.parameters())
        seen.append((mb, noise))
        for x in agent.parameters():
            x.grad = torch.full_like(x, len(seen))
        return {"losses/clipfrac": torch.full((TASKS,), len(seen))}

    optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
    stats = varshare.update(agent, optimizer, batch, recorded, args, torch.Generator().manual_seed(0))
    assert stats["losses/clipfrac"].tolist() == [6.5] * TASKS  # the mean of 1 to 12
    assert stats["losses/clipfrac_first_minibatch"].tolist() == [1] * TASKS
    for name, x in agent.named_parameters():
        torch.testing.assert_close(x, start[name] - 0.01 * sum(range(1, 13)))
    orders = []
    for epoch in range(4):
        mbs = [mb for mb, _ in seen[3 * epoch : 3 * epoch + 3]]
        assert all(len(x) == TASKS and x.shape[1] == 6 for mb in mbs for x in mb)
        returns = torch.cat([mb.returns for mb in mbs], 1)
        inds = (returns[0].unsqueeze(1) == batch.returns[0]).int().argmax(1)
        for x, parts in zip(batch, zip(*mbs, strict=True), strict=True):  # the same samples of all tasks
            assert torch.equal(torch.cat(parts, 1), x[:, inds])
        assert sorted(inds.tolist()) == list(range(18))
        orders.append(tuple(inds.tolist()))
    assert len(set(orders)) == 4
    assert len({noise.sum().item() for _, noise in seen}) == 12


@pytest.mark.parametrize("norm", [False, True])  # whose statistics move between rollouts
@pytest.mark.parametrize(("weights", "sigma"), [("mean", 1e-6), ("sample", 0.3)])
def test_the_first_minibatch_sees_the_policy_that_acted(monkeypatch, weights, sigma, norm):
    if weights == "sample":  # the same draw in rollout and update
        monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.ones_like(agent.mu))
    changes = {"num_minibatches": 1, "update_epochs": 1, "sigma_init": sigma, "rollout_weights": weights}
    changes |= {"norm_obs": norm, "norm_value": norm, "beta": 1e-12 if weights == "mean" else 0.001}
    _, folder = probes.learn(varshare, "RewardOfBoth", rollouts=3, **changes)
    values = {}
    for _, metric, _, value in probes.read_heartbeat(folder):
        values.setdefault(metric, []).append(float(value))
    assert values["losses/clipfrac"][0] == values["losses/clipfrac_first_minibatch"][0] == 0
    assert max(map(abs, values["losses/old_approx_kl"] + values["losses/approx_kl"])) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_gradients_equal_the_eager_ones_and_a_compiled_run_finishes(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)  # as envs.runs.set_up_torch does
    torch._dynamo.reset()
    compiled = torch.compile(varshare.minibatch_backward, fullgraph=True)
    args, left = settings(beta=0.7, max_grad_norm=0.3), []
    for backward in (varshare.minibatch_backward, compiled):
        agent = make_agent()
        monkeypatch.setattr(varshare, "minibatch_backward", backward)
        for seed in range(2):
            batch, draws = probes.random_batch(varshare, agent, 20, seed), probes.draws(agent, seed)
            left.append((*probes.gradients(varshare, agent, batch, *draws, args), agent.sigma.clone()))
    torch.testing.assert_close(left[:2], left[2:])
    monkeypatch.undo()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # what C++ comes of it was tested above: here the same graph without, which saves 10 s
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _, folder = probes.learn(varshare, "RewardOfBoth", rollouts=3, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # a minibatch, whole and once
    assert all(x.isfinite().all() for x in probes.load(folder)["agent"].values())
