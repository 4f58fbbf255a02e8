"""The mathematics of VarShare-PPO."""

import itertools
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
from envs.rewards import scale_rewards
from probes import BOTH, DISCRETE, OBS, TASKS, forward_task_by_task
from torch.distributions import Categorical, Normal, kl_divergence

import envs
from envs.evaluation import greedy
from envs.runs import Run

varshare = probes.load_script("varshare_ppo.py")

make_agent, settings = partial(probes.make_agent, varshare), partial(probes.settings, varshare)
random_batch, task_gradients = (partial(f, varshare) for f in (probes.random_batch, probes.task_gradients))
UNCLIPPED = 1e9  # as --max-grad-norm


pytestmark = pytest.mark.usefixtures("elsewhere")


# The variational part


@BOTH
def test_kl_equals_that_of_torch(space):
    agent = make_agent(space)
    prior = Normal(torch.zeros(()).double(), 0.7)
    expected = kl_divergence(Normal(agent.mu, agent.sigma), prior).sum(1)
    torch.testing.assert_close(varshare.gaussian_kl(agent.mu, agent.sigma, 0.7), expected)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere():
    mu, sigma = torch.zeros(2, 5).double(), torch.full((2, 5), 0.03).double()
    assert varshare.gaussian_kl(mu, sigma, 0.03).abs().max() < 1e-12
    assert varshare.gaussian_kl(mu + 1e-3, sigma, 0.03).min() > 0
    assert varshare.gaussian_kl(mu, 1.1 * sigma, 0.03).min() > 0
    assert varshare.gaussian_kl(mu, 0.9 * sigma, 0.03).min() > 0


@BOTH
def test_weights_start_as_one_orthogonal_draw_for_all_tasks(space):
    agents = [
        varshare.Agent(probes.spaces(space), settings(sigma_init=0.02), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    agent = agents[0]
    assert torch.equal(agent.theta, agents[1].theta) and not torch.equal(agent.theta, agents[2].theta)
    assert not agent.mu.any()
    torch.testing.assert_close(agent.sigma, torch.full_like(agent.mu, 0.02))
    W = agent.unpack(agent.weights())
    names = [
        f"{net}.{i}.{kind}" for net in ("actor", "critic") for i in range(3) for kind in ("weight", "bias")
    ]
    assert list(W) == names + ["logstd"] * (space is not DISCRETE)
    if space is not DISCRETE:
        assert not W["logstd"].any() and W["logstd"].shape == (TASKS, 2)
    for net, last_gain in (("actor", 0.01), ("critic", 1.0)):
        for i, gain in enumerate((math.sqrt(2), math.sqrt(2), last_gain)):
            w = W[f"{net}.{i}.weight"]
            assert not W[f"{net}.{i}.bias"].any()
            small = w[0] @ w[0].T if w.shape[1] <= w.shape[2] else w[0].T @ w[0]
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("samples", [1, 31, 32, 50])
def test_batched_forward_equals_a_loop_over_tasks(space, samples):
    agent = make_agent(space)
    batch, [noise] = random_batch(agent, samples), probes.draws(agent)
    drawn = agent.theta + agent.mu + agent.sigma * noise
    torch.testing.assert_close(agent.weights(), agent.theta + agent.mu)
    torch.testing.assert_close(agent.weights(noise), drawn)
    out, values, logstd = forward_task_by_task(agent, drawn, batch.obs)
    W = agent.unpack(agent.weights(noise))

    torch.testing.assert_close(varshare.mlp(batch.obs, W, "critic").squeeze(-1), values)
    torch.testing.assert_close(varshare.mlp(batch.obs, W, "actor"), out)
    action_noise = agent.action_noise((TASKS, samples), torch.Generator().manual_seed(0)).double()
    acted, policy = agent.act(W, out, action_noise), agent.policy(W, batch.obs)
    if space is DISCRETE:
        distribution = Categorical(logits=out)
        assert torch.equal(acted, (out + action_noise).argmax(2))
        torch.testing.assert_close(policy, distribution.probs)
        assert torch.equal(greedy(policy, space), out.argmax(2))
        expected = distribution.log_prob(batch.actions), distribution.entropy()
    else:
        distribution = Normal(out, logstd.exp().unsqueeze(1).expand(out.shape))
        torch.testing.assert_close(acted, out + logstd.exp().unsqueeze(1) * action_noise)
        torch.testing.assert_close(policy, out)
        torch.testing.assert_close(greedy(policy, space), out.clamp(-1, 1))
        expected = distribution.log_prob(batch.actions).sum(2), distribution.entropy().sum(2)
    torch.testing.assert_close(agent.log_prob_entropy(W, out, batch.actions), expected)


def test_weights_are_views_of_one_matrix():
    agent = make_agent(probes.BOX)
    weights = agent.weights().detach()
    torch.testing.assert_close(torch.cat([x.flatten(1) for x in agent.unpack(weights).values()], 1), weights)
    for x in agent.unpack(weights).values():
        x.zero_()
    assert not weights.any()


@BOTH
def test_actions_are_drawn_from_the_policy(space):
    agent = make_agent(space, torch.float32).requires_grad_(False)
    W, rng = agent.unpack(agent.weights()), torch.Generator().manual_seed(0)
    obs = torch.randn(TASKS, 1, OBS, generator=rng).expand(-1, 20_000, -1)
    actions = agent.act(W, varshare.mlp(obs, W, "actor"), agent.action_noise(obs.shape[:2], rng))
    for m in range(TASKS):
        if space is DISCRETE:
            expected = agent.policy(W, obs)[m, 0].numpy().astype(float)
            counts = np.bincount(actions[m].numpy(), minlength=4)
            assert scipy.stats.chisquare(counts, expected / expected.sum() * 20_000).pvalue > 0.001
        else:
            mean, std = agent.policy(W, obs)[m, 0], W["logstd"][m].exp()
            z = ((actions[m] - mean) / std).numpy()
            assert all(scipy.stats.kstest(z[:, i], "norm").pvalue > 0.001 for i in range(2))
            assert abs(np.corrcoef(z.T)[0, 1]) < 0.03


def objective(agent, noise, batch, args):
    """sum_m [L_m(theta + mu_m + sigma_m eps_m) + beta / N_m KL_m], for autograd; 9 * 2 samples of a task."""
    losses, _ = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    kl = kl_divergence(Normal(agent.mu, agent.sigma), Normal(0.0, args.sigma_prior))
    return (losses + args.beta / (9 * 2) * kl.sum(1)).sum()


def gradients(agent, noise, batch, args):
    return varshare.minibatch_gradients(agent, batch, noise, args)[0]


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_gradient_equals_finite_differences(space, beta):
    agent = make_agent(space).requires_grad_(False)
    batch, [noise] = random_batch(agent, 6), probes.draws(agent)
    args = settings(beta=beta, max_grad_norm=UNCLIPPED)
    grads = gradients(agent, noise, batch, args)
    rng = np.random.default_rng(0)
    assert list(grads) == [name for name, _ in agent.named_parameters()]
    for name, parameter in agent.named_parameters():
        flat, grad = parameter.view(-1), grads[name].view(-1)
        for i in rng.choice(len(flat), 60, replace=False).tolist():
            value, losses = flat[i].item(), []
            for step in (-1e-6, 1e-6):
                flat[i] = value + step
                losses.append(objective(agent, noise, batch, args).item())
            flat[i] = value
            assert grad[i].item() == pytest.approx((losses[1] - losses[0]) / 2e-6, abs=1e-7, rel=1e-5), name


@BOTH
@pytest.mark.parametrize("freeze_theta", [False, True])
@pytest.mark.parametrize("samples", [6, 40])  # the KL is weighted by a rollout's, whatever a minibatch's
def test_gradient_equals_autograds_through_weights_and_kl(space, freeze_theta, samples):
    args = settings(beta=0.7, freeze_theta=freeze_theta, max_grad_norm=UNCLIPPED)
    agent = make_agent(space)
    batch, [noise] = random_batch(agent, samples), probes.draws(agent)
    parameters = {name: x for name, x in agent.named_parameters() if not (freeze_theta and name == "theta")}
    assert len(parameters) == 2 - freeze_theta
    expected = torch.autograd.grad(objective(agent, noise, batch, args), parameters.values())
    G = task_gradients(agent, agent.weights(noise), batch, args)
    for ours in (
        varshare.parameter_gradients(agent, G, args),
        gradients(agent, noise, batch, args),
    ):
        torch.testing.assert_close(ours, dict(zip(parameters, expected, strict=True)))


def test_a_minibatch_leaves_no_trace_in_the_agent_and_logs_what_the_loss_does():
    agent = make_agent()
    batch, [noise] = random_batch(agent, 20), probes.draws(agent)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    args = settings(max_grad_norm=1e-3)
    _, G, stats = varshare.minibatch_gradients(agent, batch, noise, args)
    torch.testing.assert_close(G, task_gradients(agent, agent.weights(noise), batch, args))  # unclipped
    torch.testing.assert_close(agent.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in agent.parameters())
    _, expected = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, settings())
    torch.testing.assert_close(stats, expected)
    assert not any(x.requires_grad for x in stats.values())


def test_kl_is_weighted_by_beta_over_the_samples_of_a_task_in_a_rollout():
    agent = make_agent()
    [noise] = probes.draws(agent)
    kl = varshare.gaussian_kl(agent.mu, agent.sigma, 0.3).sum()
    (expected,) = torch.autograd.grad(0.5 * kl / (9 * 2), agent.mu)
    for samples in (3, 40):  # whatever the size of a minibatch
        batch = random_batch(agent, samples)
        without, with_kl = (
            gradients(agent, noise, batch, settings(beta=b, max_grad_norm=UNCLIPPED)) for b in (0.0, 0.5)
        )
        torch.testing.assert_close(with_kl["theta"], without["theta"])
        torch.testing.assert_close(with_kl["mu"] - without["mu"], expected)


def test_theta_gets_the_sum_of_the_tasks_gradients_and_a_residual_only_its_own():
    agent = make_agent()
    [noise], args = probes.draws(agent), settings(beta=0.0, max_grad_norm=UNCLIPPED)
    batch, other = random_batch(agent, 20), random_batch(agent, 20, seed=1)
    grads = gradients(agent, noise, batch, args)
    losses, _ = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    per_task = [torch.autograd.grad(x, agent.theta, retain_graph=True)[0] for x in losses]
    torch.testing.assert_close(grads["theta"], sum(per_task))
    torch.testing.assert_close(grads["mu"], torch.stack(per_task))
    for m in range(TASKS):  # other samples in one task
        mixed = varshare.Batch(*(x.clone() for x in batch))
        for x, y in zip(mixed, other, strict=True):
            x[m] = y[m]
        new = gradients(agent, noise, mixed, args)
        for j in range(TASKS):
            assert torch.allclose(new["mu"][j], grads["mu"][j], rtol=1e-9, atol=1e-12) == (j != m)


def test_recentre_changes_no_weights():
    agent = make_agent(dtype=torch.float32)
    [noise] = probes.draws(agent)
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
        return varshare.gaussian_kl(agent.mu - shift, agent.sigma, 0.3).sum().item()

    shift = torch.zeros_like(agent.theta, requires_grad=True)

    def kl_and_gradient(x):
        total = varshare.gaussian_kl(agent.mu.detach() - torch.from_numpy(x), agent.sigma, 0.3).sum()
        return total.item(), ((x - agent.mu.detach().numpy()).sum(0) / 0.3**2)

    best = scipy.optimize.minimize(kl_and_gradient, shift.detach().numpy(), jac=True, tol=1e-12)
    varshare.recentre(agent, 1.0)
    assert agent.mu.mean(0).abs().max() < 1e-12
    assert kl(0) == pytest.approx(best.fun, rel=1e-9)
    for size in (1e-3, 1e-1):
        assert kl(size * torch.randn(shift.shape).double()) > kl(0)


# PPO


def ppo_loss_sample_by_sample(agent, weights, b, args):
    """Loss and statistics of each task, from the formulas of the papers with Python's numbers."""
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
    names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
    means = np.reshape(stats, (TASKS, -1, len(names))).mean(1)
    return losses, {f"losses/{name}": x for name, x in zip(names, means.T, strict=True)}


@BOTH
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_ppo_loss_equals_a_computation_sample_by_sample(space, clip_vloss):
    agent = make_agent(space).requires_grad_(False)
    args = settings(clip_vloss=clip_vloss, clip_coef=0.15, vf_coef=0.7, ent_coef=0.03)
    batch = random_batch(agent, 40)
    losses, stats = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, args)
    expected_losses, expected_stats = ppo_loss_sample_by_sample(agent, agent.weights(), batch, args)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    assert stats.keys() == expected_stats.keys()
    for name, x in stats.items():
        rtol = 1e-6 if name == "losses/clipfrac" else 1e-9  # a share, in single precision
        np.testing.assert_allclose(x, expected_stats[name], rtol=rtol)
    assert 0.1 < stats["losses/clipfrac"].mean() < 0.95  # both sides of the clip were tested
    other = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, settings())[0]
    assert not torch.allclose(losses, other)


def test_loss_is_a_mean_within_a_task_and_a_sum_over_tasks():
    agent, args = make_agent(), settings(beta=0.0, max_grad_norm=UNCLIPPED)
    batch, [noise] = random_batch(agent, 10), probes.draws(agent)
    twice = varshare.Batch(*(torch.cat((x, x), 1) for x in batch))
    grads = gradients(agent, noise, batch, args)
    torch.testing.assert_close(gradients(agent, noise, twice, args), grads)
    per_task, _ = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    loss = per_task[0] + per_task[1] + per_task[2]
    expected = torch.autograd.grad(loss, [getattr(agent, name) for name in grads])
    torch.testing.assert_close(tuple(grads.values()), expected)


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
    args = settings(gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(varshare.gae(*tensors, args), expected, rtol=1e-12, atol=1e-14)


def random_rollout(agent, steps=9, num_envs=2, seed=0):
    """A rollout of random numbers, whose episodes often end, one way, the other, and both."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    size = (steps, TASKS, num_envs)
    obs, final_obs = randn(steps + 1, TASKS, num_envs, OBS), randn(*size, OBS)
    out, noise = randn(*size, agent.act_dim), agent.action_noise(size, rng).double()
    W = agent.unpack(agent.weights().detach())
    actions = torch.stack([agent.act(W, *x) for x in zip(out, noise, strict=True)])
    terminated, truncated = (torch.rand((2, *size), generator=rng) < 0.25).double()
    truncated[4], terminated[5], truncated[5] = 0, 1, 0  # steps without a truncation, without or with ends
    terminated[6], truncated[6] = 0, 0
    for ends in itertools.product((0, 1), repeat=2):
        assert ((terminated == ends[0]) & (truncated == ends[1])).any()
    assert truncated[-1].any() and not (truncated[-1] + terminated[-1]).all()
    return varshare.Rollout(obs, out, actions, randn(*size), terminated, truncated, final_obs)


def batch_sample_by_sample(agent, W, seen, rewards, args):
    """What `make_batch` makes of a rollout, advantages not normalised, by plain loops."""
    steps, _, num_envs = rewards.shape

    def value(m, obs):  # of one observation
        x = obs
        for i in range(3):
            x = W[f"critic.{i}.weight"][m] @ x + W[f"critic.{i}.bias"][m]
            x = x.relu() if i < 2 else x
        return x.item()

    batch = [[[] for _ in range(TASKS)] for _ in varshare.Batch._fields]
    for m, t, i in itertools.product(range(TASKS), range(steps), range(num_envs)):
        advantage, weight = 0.0, 1.0
        for later in range(t, steps):
            if seen.terminated[later, m, i]:
                follows = 0.0
            elif seen.truncated[later, m, i]:
                follows = value(m, seen.final_obs[later, m, i])
            else:
                follows = value(m, seen.obs[later + 1, m, i])
            delta = rewards[later, m, i].item() + args.gamma * follows - value(m, seen.obs[later, m, i])
            advantage += weight * delta
            weight *= args.gamma * args.gae_lambda
            if seen.terminated[later, m, i] or seen.truncated[later, m, i]:
                break
        out, action, old = seen.out[t, m, i], seen.actions[t, m, i], value(m, seen.obs[t, m, i])
        if agent.discrete:
            logprob = Categorical(logits=out).log_prob(action)
        else:
            logprob = Normal(out, W["logstd"][m].exp()).log_prob(action).sum()
        sample = (seen.obs[t, m, i], action, logprob, advantage, advantage + old, old)
        for rows, x in zip(batch, sample, strict=True):
            rows[m].append(np.asarray(x))
    return varshare.Batch(*(torch.from_numpy(np.stack(rows)) for rows in batch))


@BOTH
@pytest.mark.parametrize("norm_reward", [False, True])
def test_a_batch_equals_a_computation_sample_by_sample(space, norm_reward):
    agent = make_agent(space).requires_grad_(False)
    args = settings(gamma=0.9, gae_lambda=0.8, norm_adv=False, norm_reward=norm_reward)
    agent.return_stats += torch.tensor([10.0, 3.0, 40.0])  # of earlier rollouts
    seen, W = random_rollout(agent), agent.unpack(agent.weights())
    running = torch.full((TASKS, 2), 0.5).double()  # of episodes that run on
    stats, expected_running, rewards = agent.return_stats.clone(), running.clone(), seen.rewards
    if norm_reward:
        done = ((seen.terminated + seen.truncated) > 0).double()
        rewards = scale_rewards(stats, rewards, done, expected_running, args.gamma)
        assert not torch.allclose(rewards, seen.rewards)
    before = [x.clone() for x in seen]
    batch = varshare.make_batch(W, seen, agent, running, args)
    expected = batch_sample_by_sample(agent, W, seen, rewards, args)
    for name, x in batch._asdict().items():
        torch.testing.assert_close(x, getattr(expected, name), msg=lambda m: f"{name}: {m}")  # noqa: B023
    torch.testing.assert_close(agent.return_stats, stats)
    torch.testing.assert_close(running, expected_running)
    assert all(map(torch.equal, seen, before))  # the rollout itself stays
    normalised = varshare.make_batch(W, seen, agent, running, settings(gamma=0.9, gae_lambda=0.8))
    if not norm_reward:  # of each task by itself
        adv = batch.advantages
        adv = (adv - adv.mean(1, keepdim=True)) / adv.std(1, keepdim=True)
        torch.testing.assert_close(normalised.advantages, adv)
        torch.testing.assert_close(normalised.returns, batch.returns)


def test_every_epoch_goes_once_through_all_samples_and_the_optimizer_gets_the_gradients():
    agent, args = make_agent(), settings(num_minibatches=3, update_epochs=4)
    batch = random_batch(agent, 9 * 2)
    seen, start = [], {name: x.detach().clone() for name, x in agent.named_parameters()}

    def recorded(agent, mb, noise, args):
        seen.append((mb, noise))
        grads = {name: torch.full_like(x, len(seen)) for name, x in agent.named_parameters()}
        return grads, grads["mu"], {"number": torch.full((TASKS,), len(seen))}

    optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
    rng = torch.Generator().manual_seed(0)
    stats = varshare.update(agent, optimizer, batch, recorded, args, rng)
    assert stats["number"].tolist() == [[i] * TASKS for i in range(1, 13)]
    for name, x in agent.named_parameters():
        torch.testing.assert_close(x, start[name] - 0.01 * sum(range(1, 13)))
    orders = []
    for epoch in range(4):
        mbs = [mb for mb, _ in seen[3 * epoch : 3 * epoch + 3]]
        assert all(len(x) == TASKS and x.shape[1] == 6 for mb in mbs for x in mb)
        values = torch.cat([mb.values for mb in mbs], 1)
        inds = (values[0].unsqueeze(1) == batch.values[0]).int().argmax(1)
        for x, parts in zip(batch, zip(*mbs, strict=True), strict=True):  # the same samples of all tasks
            assert torch.equal(torch.cat(parts, 1), x[:, inds])
        assert sorted(inds.tolist()) == list(range(18))
        orders.append(tuple(inds.tolist()))
    assert len(set(orders)) == 4
    assert len({noise.sum().item() for _, noise in seen}) == 12  # fresh noise in every minibatch


# Whole runs


@pytest.mark.parametrize("norm", [False, True])  # whose statistics move between rollouts
@pytest.mark.parametrize(("weights", "sigma"), [("mean", 1e-6), ("sample", 0.3)])
def test_the_first_minibatch_sees_the_policy_that_acted(monkeypatch, weights, sigma, norm):
    if weights == "sample":  # the same draw in rollout and update
        monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.ones_like(agent.mu))
    changes = {"num_minibatches": 1, "update_epochs": 1, "sigma_init": sigma, "rollout_weights": weights}
    changes |= {"norm_obs": norm, "norm_value": norm, "beta": 1e-12 if weights == "mean" else 0.001}
    _, folder = probes.learn(varshare, "RewardOfBoth", rollouts=3, **changes)
    values = {row[1]: [] for row in probes.read_heartbeat(folder)}
    for _, metric, _, value in probes.read_heartbeat(folder):
        values[metric].append(float(value))
    assert values["losses/clipfrac"][0] == values["losses/clipfrac_first_minibatch"][0] == 0
    assert max(map(abs, values["losses/old_approx_kl"] + values["losses/approx_kl"])) < 1e-4


def test_metrics_of_varshare():
    folder = probes.run(varshare)  # without re-centring: theta and mu_m have a common part to move
    rows = probes.read_heartbeat(folder)
    last = {row[1:3]: float(row[3]) for row in rows if row[0] == "25600"}
    agent, _ = probes.load_agent(varshare, folder)
    kl = varshare.gaussian_kl(agent.mu, agent.sigma, varshare.Args.sigma_prior)
    of_layers = ("sharing_ratio", "dead", "sigma_q1", "sigma_q50", "sigma_q99")
    layers = [f"{x}/{net}.{i}" for x in of_layers for net in ("actor", "critic") for i in range(3)]
    metrics = {row[1].removeprefix("varshare/") for row in rows if row[1].startswith("varshare/")}
    norms = {"mu_norm", "theta_norm", "theta_moved"}
    assert metrics == {"kl", "kl_loss", "kl_weight", "lambda", "sigma", "sigma_over_theta", *norms, *layers}
    first = slice(0, 64 * 5)  # weights and biases of the actor's first layer
    live = agent.live[:, first]
    theta, mu = agent.theta + agent.mu.mean(0), agent.mu - agent.mu.mean(0)
    assert (agent.mu.mean(0).norm() > 0.1 * mu.norm(dim=1)).all()
    theta2, mu2 = theta[first].square().sum(), mu[:, first].square().sum(1)
    for m, task in enumerate(envs.cartpole.NAMES):
        expected = {
            "kl": kl[m],
            "kl_loss": varshare.Args.beta * kl[m] / (32 * 8),
            "sigma": agent.sigma[m][agent.live[m]].median(),
            "sigma_over_theta": agent.sigma[m][agent.live[m]].median() / agent.theta.abs().median(),
            "dead/actor.0": 1 - live[m].float().mean(),
            "mu_norm": mu[m].norm(),
            "sharing_ratio/actor.0": theta2 / (theta2 + mu2[m]),
        }
        for name, value in expected.items():
            assert last[f"varshare/{name}", task] == pytest.approx(value.item(), rel=1e-4)
    assert last["varshare/kl", "mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert last["varshare/theta_norm", "mean"] == pytest.approx(theta.norm().item(), rel=1e-4)
    assert {row[2] for row in rows if row[1] == "varshare/theta_norm"} == {"mean"}
    fresh = varshare.Agent(envs.make("cartpole10", 1), varshare.Args(), torch.Generator().manual_seed(1))
    moved = (theta - fresh.theta).norm().item()
    assert last["varshare/theta_moved", "mean"] == pytest.approx(moved, rel=1e-4) and moved > 0
    for q in (1, 50, 99):
        expected = np.quantile(agent.sigma[:, first][live], q / 100)
        assert last[f"varshare/sigma_q{q}/actor.0", "mean"] == pytest.approx(expected, rel=1e-4)
    assert last["varshare/kl_weight", "mean"] == pytest.approx(varshare.Args.beta / (32 * 8))
    penalty = varshare.Args.beta / (2 * 32 * 8 * varshare.Args.sigma_prior**2)
    assert last["varshare/lambda", "mean"] == pytest.approx(penalty)
    assert last["varshare/sharing_ratio/actor.0", "mean"] == pytest.approx(
        (theta2 / (theta2 + mu2.mean())).item(), rel=1e-4
    )


def test_sharing_ratio_of_a_gaussian_policys_deviation_is_a_layers_of_its_own():
    size = {"num_steps": 16, "envs_per_task": 1, "num_minibatches": 2, "total_timesteps": 64}
    folder = probes.run(varshare, env_id="Pendulum-v1", eval_episodes=1, **size)
    [(_, value)] = {
        row[2:]
        for row in probes.read_heartbeat(folder)[-200:]
        if row[0] == "64" and row[1] == "varshare/sharing_ratio/logstd" and row[2] != "mean"
    }
    agent, W = probes.load_agent(varshare, folder)
    theta2 = W["logstd"].square()  # of one task all is shared: theta + mean_m mu_m is its own weight
    assert W["logstd"].item() == pytest.approx((agent.theta[-1] + agent.mu[0, -1]).item())
    assert float(value) == 1 and theta2 > 0


def test_reptile_moves_the_mean_of_the_residuals_into_theta():
    changes = {"total_timesteps": 5120}
    folders = [probes.run(varshare, str(alpha), reptile_alpha=alpha, **changes) for alpha in (0.0, 1.0)]
    means = [probes.load(folder)["agent"]["mu"].mean(0).abs().max() for folder in folders]
    assert means[0] > 1e-3 and means[1] < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_gradients_equal_the_eager_ones_and_a_compiled_run_finishes(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)  # as envs.runs.set_up_torch does
    torch._dynamo.reset()
    agent, args = make_agent(hidden_sizes=(6,)), settings(beta=0.7, max_grad_norm=0.3)
    compiled = torch.compile(varshare.minibatch_gradients, fullgraph=True)
    for seed in range(2):
        batch, draws = random_batch(agent, 20, seed), probes.draws(agent, seed)
        torch.testing.assert_close(
            compiled(agent, batch, *draws, args), varshare.minibatch_gradients(agent, batch, *draws, args)
        )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # what C++ comes of it was tested above: here the same graph without, which saves 10 s
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _, folder = probes.learn(varshare, "RewardOfBoth", rollouts=3, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # a minibatch, whole and once
    assert all(x.isfinite().all() for x in probes.load(folder)["agent"].values())


def test_what_is_measured_of_sharing_does_not_depend_on_the_gauge():
    """theta + c with mu_m - c is the same network; where theta is frozen it is not free to move."""
    agent = make_agent()
    measured = []
    for freeze_theta in (False, True):
        for _ in range(2):
            run, logged = Run.__new__(Run), {}
            run.args = varshare.Args(freeze_theta=freeze_theta)
            run.theta_start = torch.zeros_like(agent.theta)
            run.log = lambda name, x, per_task=(), to=logged: to.update({name: [x, *per_task]})
            run.log_sharing(agent.unpack(agent.theta.detach()[None]), agent.unpack(agent.mu.detach()))
            measured.append(logged)
            with torch.no_grad():
                c = torch.randn(agent.theta.shape, dtype=agent.theta.dtype)
                agent.theta += c
                agent.mu -= c
    free, same, frozen, moved = measured
    assert len(free) == 3 + 6 and len(free["varshare/mu_norm"]) == 1 + TASKS
    for name, x in free.items():
        assert same[name] == pytest.approx(x)
        assert moved[name] != pytest.approx(frozen[name], rel=1e-3)
    assert frozen["varshare/theta_norm"][0] != pytest.approx(free["varshare/theta_norm"][0], rel=1e-3)
