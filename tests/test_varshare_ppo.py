"""The mathematics of VarShare-PPO."""

import math
import shutil
from functools import partial

import numpy as np
import probes
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch._dynamo.utils
from probes import BOTH, DISCRETE, OBS, TASKS, forward_task_by_task, make_batch
from torch.distributions import Categorical, Normal, kl_divergence

import envs

varshare = probes.load_script("varshare_ppo.py")

make_agent, settings = partial(probes.make_agent, varshare), partial(probes.settings, varshare)


pytestmark = pytest.mark.usefixtures("elsewhere")


# The variational part


@BOTH
def test_kl_equals_that_of_torch(space):
    agent = make_agent(space)
    prior = Normal(torch.zeros(()).double(), 0.7)
    expected = kl_divergence(Normal(agent.mu, (0.5 * agent.logvar).exp()), prior).sum(1)
    torch.testing.assert_close(varshare.gaussian_kl(agent.mu, agent.logvar, 0.7), expected)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere():
    mu, logvar = torch.zeros(2, 5).double(), torch.full((2, 5), 2 * math.log(0.03)).double()
    assert varshare.gaussian_kl(mu, logvar, 0.03).abs().max() < 1e-12
    assert varshare.gaussian_kl(mu + 1e-3, logvar, 0.03).min() > 0
    assert varshare.gaussian_kl(mu, logvar + 0.1, 0.03).min() > 0
    assert varshare.gaussian_kl(mu, logvar - 0.1, 0.03).min() > 0


@BOTH
def test_weights_start_as_one_orthogonal_draw_for_all_tasks(space):
    agents = [
        varshare.Agent(probes.spaces(space), settings(sigma_init=0.02), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    agent = agents[0]
    assert torch.equal(agent.theta, agents[1].theta) and not torch.equal(agent.theta, agents[2].theta)
    assert not agent.mu.any()
    torch.testing.assert_close(agent.logvar.exp().sqrt(), torch.full_like(agent.mu, 0.02))
    net = agent.unpack(agent.weights())
    assert not net.logstd.any() and net.logstd.shape == (TASKS, 1, 0 if space is DISCRETE else 2)
    for layers, last_gain in ((net.actor, 0.01), (net.critic, 1.0)):
        for (w, b), gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
            assert not b.any()
            small = w[0] @ w[0].T if w.shape[1] <= w.shape[2] else w[0].T @ w[0]
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("samples", [1, 31, 32, 50])
def test_batched_forward_equals_a_loop_over_tasks(space, samples):
    agent = make_agent(space)
    batch = make_batch(varshare, agent, samples)
    noise = torch.randn(agent.mu.shape).double()
    drawn = agent.theta + agent.mu + (0.5 * agent.logvar).exp() * noise
    torch.testing.assert_close(agent.weights(), agent.theta + agent.mu)
    torch.testing.assert_close(agent.weights(noise), drawn)
    out, values, logstd = forward_task_by_task(agent, drawn, batch.obs)
    net = agent.unpack(agent.weights(noise))

    torch.testing.assert_close(agent.value(net, batch.obs), values)
    action_noise = agent.action_noise((TASKS, samples), torch.Generator().manual_seed(0)).double()
    acted, policy = agent.act(net, batch.obs, action_noise), agent.policy(net, batch.obs)
    if space is DISCRETE:
        distribution = Categorical(logits=out)
        assert torch.equal(acted, (out + action_noise).argmax(2))
        torch.testing.assert_close(policy, distribution.probs)
        assert torch.equal(agent.greedy(policy), out.argmax(2))
        expected = distribution.log_prob(batch.actions), distribution.entropy()
    else:
        distribution = Normal(out, logstd.exp().unsqueeze(1).expand(out.shape))
        torch.testing.assert_close(acted, out + logstd.exp().unsqueeze(1) * action_noise)
        torch.testing.assert_close(agent.greedy(policy), out)
        expected = distribution.log_prob(batch.actions).sum(2), distribution.entropy().sum(2)
    torch.testing.assert_close(agent.log_prob_entropy(net, batch.obs, batch.actions), expected)


@BOTH
def test_actions_are_drawn_from_the_policy(space):
    agent = make_agent(space, torch.float32).requires_grad_(False)
    net, rng = agent.unpack(agent.weights()), torch.Generator().manual_seed(0)
    obs = torch.randn(TASKS, 1, OBS, generator=rng).expand(-1, 20_000, -1)
    actions = agent.act(net, obs, agent.action_noise(obs.shape[:2], rng))
    for m in range(TASKS):
        if space is DISCRETE:
            expected = agent.policy(net, obs)[m, 0].numpy().astype(float)
            counts = np.bincount(actions[m].numpy(), minlength=4)
            assert scipy.stats.chisquare(counts, expected / expected.sum() * 20_000).pvalue > 0.001
        else:
            mean, std = agent.policy(net, obs)[m, 0], net.logstd[m, 0].exp()
            z = ((actions[m] - mean) / std).numpy()
            assert all(scipy.stats.kstest(z[:, i], "norm").pvalue > 0.001 for i in range(2))
            assert abs(np.corrcoef(z.T)[0, 1]) < 0.03


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_gradient_equals_finite_differences(space, beta):
    agent = make_agent(space)
    batch, noise = (
        make_batch(varshare, agent, 6),
        torch.randn(agent.mu.shape, generator=torch.Generator()).double(),
    )
    args = settings(beta=beta)
    loss, _ = varshare.objective(agent, noise, batch, args)
    loss.backward()
    rng = np.random.default_rng(0)
    for name, parameter in agent.named_parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in rng.choice(len(flat), 60, replace=False).tolist():
            value, losses = flat[i].item(), []
            for step in (-1e-6, 1e-6):
                flat[i] = value + step
                losses.append(varshare.objective(agent, noise, batch, args)[0].item())
            flat[i] = value
            assert grad[i].item() == pytest.approx((losses[1] - losses[0]) / 2e-6, abs=1e-7, rel=1e-5), name


@pytest.mark.parametrize("freeze_theta", [False, True])
def test_gradient_equals_autograds_through_weights_and_kl(freeze_theta):
    args = settings(beta=0.7, freeze_theta=freeze_theta)
    agent = make_agent(freeze_theta=freeze_theta)
    batch, noise = make_batch(varshare, agent, 40), torch.randn(agent.mu.shape).double()
    parameters = [p for p in agent.parameters() if p.requires_grad]
    assert len(parameters) == 3 - freeze_theta
    losses, stats = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    kl = kl_divergence(Normal(agent.mu, (0.5 * agent.logvar).exp()), Normal(0.0, args.sigma_prior))
    expected = losses.sum() + 0.7 / (9 * 2) * kl.sum()
    loss, its_stats = varshare.objective(agent, noise, batch, args)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(its_stats, stats)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_kl_is_weighted_by_beta_over_the_samples_of_a_task_in_a_rollout():
    agent = make_agent()
    noise = torch.randn(agent.mu.shape).double()
    kl = varshare.gaussian_kl(agent.mu, agent.logvar, 0.3).sum()
    for samples in (3, 40):  # whatever the size of a minibatch
        batch = make_batch(varshare, agent, samples)
        losses = [varshare.objective(agent, noise, batch, settings(beta=b))[0] for b in (0.0, 0.5)]
        torch.testing.assert_close(losses[1] - losses[0], 0.5 * kl / (9 * 2))


def test_theta_gets_the_sum_of_the_tasks_gradients_and_a_residual_only_its_own():
    agent = make_agent()
    noise, args = torch.randn(agent.mu.shape).double(), settings(beta=0.0)
    batch, other = make_batch(varshare, agent, 20), make_batch(varshare, agent, 20, seed=1)
    parameters = (agent.theta, agent.mu, agent.logvar)

    def gradients(b):
        return torch.autograd.grad(varshare.objective(agent, noise, b, args)[0], parameters)

    theta, mu, logvar = gradients(batch)
    losses, _ = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    per_task = [torch.autograd.grad(x, agent.theta, retain_graph=True)[0] for x in losses]
    torch.testing.assert_close(theta, sum(per_task))
    torch.testing.assert_close(mu, torch.stack(per_task))
    torch.testing.assert_close(logvar, mu * noise * 0.5 * (0.5 * agent.logvar).exp())
    for m in range(TASKS):  # other samples in one task
        mixed = varshare.Batch(*(x.clone() for x in batch))
        for x, y in zip(mixed, other, strict=True):
            x[m] = y[m]
        _, new_mu, new_logvar = gradients(mixed)
        for j in range(TASKS):
            assert torch.equal(new_mu[j], mu[j]) == torch.equal(new_logvar[j], logvar[j]) == (j != m)


def test_recentre_changes_no_weights():
    agent = make_agent(dtype=torch.float32)
    noise = torch.randn(agent.mu.shape)
    before, theta, mu = (x.detach().clone() for x in (agent.weights(noise), agent.theta, agent.mu))
    mean = agent.weights().detach().clone()
    varshare.recentre(agent, 0.1)
    torch.testing.assert_close(agent.weights(noise), before, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(agent.weights(), mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(agent.theta, theta + 0.1 * mu.mean(0))  # 10 % of the way, in every task
    torch.testing.assert_close(agent.mu, mu - 0.1 * mu.mean(0))


def test_full_recentring_has_the_smallest_kl_of_all_common_shifts():
    agent = make_agent()

    def kl(shift):
        return varshare.gaussian_kl(agent.mu - shift, agent.logvar, 0.3).sum().item()

    shift = torch.zeros_like(agent.theta, requires_grad=True)

    def kl_and_gradient(x):
        total = varshare.gaussian_kl(
            agent.mu.detach() - torch.from_numpy(x), agent.logvar.detach(), 0.3
        ).sum()
        return total.item(), ((x - agent.mu.detach().numpy()).sum(0) / 0.3**2)

    best = scipy.optimize.minimize(kl_and_gradient, shift.detach().numpy(), jac=True, tol=1e-12)
    varshare.recentre(agent, 1.0)
    assert agent.mu.mean(0).abs().max() < 1e-12
    assert kl(0) == pytest.approx(best.fun, rel=1e-9)
    for size in (1e-3, 1e-1):
        assert kl(size * torch.randn(shift.shape).double()) > kl(0)


# PPO


def ppo_loss_sample_by_sample(agent, weights, b, args):
    """Loss of each task, and the statistics, from the formulas of the papers with Python's numbers."""
    out, values, logstd = forward_task_by_task(agent, weights, b.obs)
    losses, stats, eps = [], [], args.clip_coef
    for m in range(TASKS):
        losses.append(0.0)
        for i in range(b.obs.shape[1]):
            if agent.discrete:
                distribution = Categorical(logits=out[m, i])
            else:
                distribution = torch.distributions.Independent(Normal(out[m, i], logstd[m].exp()), 1)
            value, ret, old_value = values[m, i].item(), b.returns[m, i].item(), b.values[m, i].item()
            entropy = distribution.entropy().item()
            log_ratio = distribution.log_prob(b.actions[m, i]).item() - b.logprobs[m, i].item()
            ratio, advantage = math.exp(log_ratio), b.advantages[m, i].item()
            clipped = min(max(ratio, 1 - eps), 1 + eps)
            policy_loss = -min(ratio * advantage, clipped * advantage)
            value_loss = (value - ret) ** 2
            if args.clip_vloss:
                near = old_value + min(max(value - old_value, -eps), eps)
                value_loss = max(value_loss, (near - ret) ** 2)
            value_loss *= 0.5
            losses[m] += policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
            approx_kl = ratio - 1 - log_ratio
            stats.append((policy_loss, value_loss, entropy, -log_ratio, approx_kl, abs(ratio - 1) > eps))
        losses[m] /= b.obs.shape[1]
    return losses, np.mean(stats, 0)


@BOTH
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_ppo_loss_equals_a_computation_sample_by_sample(space, clip_vloss):
    agent = make_agent(space).requires_grad_(False)
    args = settings(clip_vloss=clip_vloss, clip_coef=0.15, vf_coef=0.7, ent_coef=0.03)
    batch = make_batch(varshare, agent, 40)
    losses, stats = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, args)
    expected_losses, expected_stats = ppo_loss_sample_by_sample(agent, agent.weights(), batch, args)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    np.testing.assert_allclose(stats, expected_stats, rtol=1e-9)
    assert 0.1 < stats[varshare.STATS.index("clipfrac")] < 0.95  # both sides of the clip were tested
    other = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, settings())[0]
    assert not torch.allclose(losses, other)


def test_loss_is_a_mean_within_a_task_and_a_sum_over_tasks():
    agent, args = make_agent().requires_grad_(False), settings(beta=0.0)
    batch, noise = make_batch(varshare, agent, 10), torch.randn(TASKS, 1).double()
    twice = varshare.Batch(*(torch.cat((x, x), 1) for x in batch))
    loss, _ = varshare.objective(agent, noise, batch, args)
    torch.testing.assert_close(varshare.objective(agent, noise, twice, args)[0], loss)
    per_task, _ = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    torch.testing.assert_close(loss, per_task[0] + per_task[1] + per_task[2])


def test_gae_by_hand():
    """Six steps: the second ends by termination, the fourth by truncation, the last one runs on."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    values = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    next_values = torch.tensor([20.0, 1000.0, 40.0, 100.0, 60.0, 70.0])
    terminated = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    done = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    # deltas: 1+10-10, 2-20, 3+20-30, 4+50-40, 5+30-50, 6+35-60; each adds 0.25 of the next of its episode
    expected = [1 + 0.25 * -18, -18, -7 + 0.25 * 14, 14, -15 + 0.25 * -19, -19]
    assert varshare.gae(rewards, values, next_values, terminated, done, 0.5, 0.5).tolist() == expected


def test_gae_equals_its_definition():
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, 30, 3, 4))
    terminated = (rng.random((30, 3, 4)) < 0.1).astype(float)
    done = np.maximum(terminated, rng.random((30, 3, 4)) < 0.1)
    assert terminated.sum() > 10 and (done - terminated).sum() > 10
    expected = np.zeros_like(rewards)
    for t, m, i in np.ndindex(rewards.shape):
        weight = 1.0
        for later in range(t, 30):
            follows = 0.0 if terminated[later, m, i] else next_values[later, m, i]
            expected[t, m, i] += weight * (rewards[later, m, i] + 0.9 * follows - values[later, m, i])
            weight *= 0.9 * 0.8
            if done[later, m, i]:
                break
    tensors = (torch.from_numpy(x) for x in (rewards, values, next_values, terminated, done))
    np.testing.assert_allclose(varshare.gae(*tensors, 0.9, 0.8), expected, rtol=1e-12)


# Whole runs


@pytest.mark.parametrize(("weights", "sigma"), [("mean", 1e-6), ("sample", 0.3)])
def test_the_first_minibatch_sees_the_policy_that_acted(monkeypatch, weights, sigma):
    if weights == "sample":  # the same draw in rollout and update
        monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.ones_like(agent.mu))
    changes = {"num_minibatches": 1, "update_epochs": 1, "sigma_init": sigma, "rollout_weights": weights}
    _, folder = probes.learn(varshare, "RewardOfBoth", rollouts=3, **changes)
    values = {row[1]: [] for row in probes.read_heartbeat(folder)}
    for _, metric, _, value in probes.read_heartbeat(folder):
        values[metric].append(float(value))
    assert values["losses/clipfrac"][0] == values["losses/clipfrac_first_minibatch"][0] == 0
    assert max(map(abs, values["losses/old_approx_kl"] + values["losses/approx_kl"])) < 1e-4


def test_metrics_of_varshare():
    folder = probes.run(varshare, reptile_alpha=0.5)
    rows = probes.read_heartbeat(folder)
    last = {row[1:3]: float(row[3]) for row in rows if row[0] == "25600"}
    agent, _ = probes.load_agent(varshare, folder)
    kl = varshare.gaussian_kl(agent.mu, agent.logvar, varshare.Args.sigma_prior)
    layers = [f"sharing_ratio/{net}_{i}" for net in ("actor", "critic") for i in range(3)]
    assert {row[1].removeprefix("varshare/") for row in rows if row[1].startswith("varshare/")} == {
        *("kl", "kl_loss", "sigma", "sigma_over_theta", "mu_norm", "theta_norm", *layers)
    }
    first = slice(0, 64 * 5)  # weights and biases of the actor's first layer
    theta2, mu2 = agent.theta[first].square().sum(), agent.mu[:, first].square().sum(1)
    for m, task in enumerate(envs.cartpole.NAMES):
        expected = {
            "kl": kl[m],
            "kl_loss": varshare.Args.beta * kl[m] / (32 * 8),
            "sigma": (0.5 * agent.logvar[m]).exp().median(),
            "sigma_over_theta": (0.5 * agent.logvar[m]).exp().median() / agent.theta.abs().median(),
            "mu_norm": agent.mu[m].norm(),
            "theta_norm": agent.theta.norm(),
            "sharing_ratio/actor_0": theta2 / (theta2 + mu2[m]),
        }
        for name, value in expected.items():
            assert last[f"varshare/{name}", task] == pytest.approx(value.item(), rel=1e-4)
    assert last["varshare/kl", "mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert last["varshare/sharing_ratio/actor_0", "mean"] == pytest.approx(
        (theta2 / (theta2 + mu2.mean())).item(), rel=1e-4
    )


def test_reptile_moves_the_mean_of_the_residuals_into_theta():
    folders = [probes.run(varshare, str(alpha), reptile_alpha=alpha) for alpha in (0.0, 1.0)]
    means = [probes.load(folder)["agent"]["mu"].mean(0).abs().max() for folder in folders]
    assert means[0] > 1e-3 and means[1] < 1e-6


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_run_equals_the_eager_one():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    size = {"env_id": "RewardOfBoth", "total_timesteps": 3 * 16 * 16, "num_steps": 16, "envs_per_task": 16}
    size |= {"hidden_sizes": (16,), "sigma_init": 0.05, "eval_episodes": 2}
    folders = [
        varshare.train(varshare.Args(**size | {"compile": c, "run_name": f"compile-{c}"}))
        for c in (False, True)
    ]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the loss, whole and once
    rows = [probes.read_heartbeat(folder) for folder in folders]
    for eager, compiled in zip(*rows, strict=True):
        assert eager[:3] == compiled[:3]
        if eager[1] not in ("charts/SPS", "charts/wall_time"):
            assert float(compiled[3]) == pytest.approx(float(eager[3]), rel=1e-3, abs=1e-4), eager
    eager, compiled = (probes.load(folder)["agent"] for folder in folders)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-4)
