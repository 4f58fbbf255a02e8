"""The mathematics of VarShare-PPO; of every script what it learns on probes, seeds, files and failures."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, Normal, kl_divergence

import envs
from envs.evaluation import evaluate, spread_seeds
from envs.rewards import scale_rewards
from envs.runs import load_agent

varshare = probes.load_script("varshare_ppo.py")

TASKS, OBS, HIDDEN = 3, 5, (7, 6)
DISCRETE, BOX = gym.spaces.Discrete(4), gym.spaces.Box(-1.0, 1.0, (2,))
BOTH = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["Discrete", "Box"])


pytestmark = pytest.mark.usefixtures("elsewhere")


def settings(**changes):
    return varshare.Args(hidden_sizes=HIDDEN, num_steps=9, envs_per_task=2, sigma_prior=0.3, **changes)


def make_agent(space=DISCRETE, dtype=torch.float64, **changes):
    """An agent whose weights are all different from 0 and from each other."""
    observations = gym.spaces.Box(-1.0, 1.0, (OBS,))
    spaces = SimpleNamespace(
        num_tasks=TASKS, single_observation_space=observations, single_action_space=space
    )
    rng = torch.Generator().manual_seed(1)
    agent = varshare.Agent(spaces, settings(**changes), rng).to(dtype)
    with torch.no_grad():
        agent.theta += 0.3 * torch.randn(agent.theta.shape, generator=rng)
        agent.mu.normal_(0, 0.3, generator=rng)
        agent.logvar.uniform_(-6, -2, generator=rng)
    return agent


def make_batch(agent, samples, seed=0):
    """Random samples, whose actions were drawn from an older policy."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=agent.mu.dtype)

    with torch.no_grad():
        obs = randn(TASKS, samples, OBS)
        old = agent.unpack(agent.weights(2 * randn(*agent.mu.shape)))
        actions = agent.act(old, obs, agent.action_noise((TASKS, samples), rng).to(obs.dtype))
        logprobs, _ = agent.log_prob_entropy(old, obs, actions)
        values = agent.value(old, obs)
        returns = values + randn(TASKS, samples)
        return varshare.Batch(obs, actions, logprobs, randn(TASKS, samples), returns, values)


def forward_task_by_task(agent, weights, obs):
    """Actor's outputs (task, sample, out), values (task, sample), logstd (task, action), by a plain loop."""
    actor, critic, logstd = [], [], []
    for row, x in zip(weights, obs, strict=True):
        for outputs, out in ((actor, agent.act_dim), (critic, 1)):
            h = x
            for n_in, n_out in itertools.pairwise((OBS, *HIDDEN, out)):
                w, b, row = row[: n_out * n_in], row[n_out * n_in :][:n_out], row[n_out * (n_in + 1) :]
                h = F.linear(h if n_in == OBS else h.relu(), w.view(n_out, n_in), b)
            outputs.append(h)
        logstd.append(row)
    return torch.stack(actor), torch.stack(critic).squeeze(2), torch.stack(logstd)


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
    spaces = SimpleNamespace(
        num_tasks=TASKS, single_observation_space=gym.spaces.Box(-1, 1, (OBS,)), single_action_space=space
    )
    agents = [
        varshare.Agent(spaces, settings(sigma_init=0.02), torch.Generator().manual_seed(seed))
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
    batch = make_batch(agent, samples)
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
    batch, noise = make_batch(agent, 6), torch.randn(agent.mu.shape, generator=torch.Generator()).double()
    args = settings(beta=beta)
    loss, _ = varshare.varshare_loss(agent, noise, batch, args)
    loss.backward()
    rng = np.random.default_rng(0)
    for name, parameter in agent.named_parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in rng.choice(len(flat), 60, replace=False).tolist():
            value, losses = flat[i].item(), []
            for step in (-1e-6, 1e-6):
                flat[i] = value + step
                losses.append(varshare.varshare_loss(agent, noise, batch, args)[0].item())
            flat[i] = value
            assert grad[i].item() == pytest.approx((losses[1] - losses[0]) / 2e-6, abs=1e-7, rel=1e-5), name


@pytest.mark.parametrize("freeze_theta", [False, True])
def test_gradient_equals_autograds_through_weights_and_kl(freeze_theta):
    args = settings(beta=0.7, freeze_theta=freeze_theta)
    agent = make_agent(freeze_theta=freeze_theta)
    batch, noise = make_batch(agent, 40), torch.randn(agent.mu.shape).double()
    parameters = [p for p in agent.parameters() if p.requires_grad]
    assert len(parameters) == 3 - freeze_theta
    losses, stats = varshare.ppo_loss(agent, agent.unpack(agent.weights(noise)), batch, args)
    kl = kl_divergence(Normal(agent.mu, (0.5 * agent.logvar).exp()), Normal(0.0, args.sigma_prior))
    expected = losses.sum() + 0.7 / (9 * 2) * kl.sum()
    loss, its_stats = varshare.varshare_loss(agent, noise, batch, args)
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
        batch = make_batch(agent, samples)
        losses = [varshare.varshare_loss(agent, noise, batch, settings(beta=b))[0] for b in (0.0, 0.5)]
        torch.testing.assert_close(losses[1] - losses[0], 0.5 * kl / (9 * 2))


def test_theta_gets_the_sum_of_the_tasks_gradients_and_a_residual_only_its_own():
    agent = make_agent()
    noise, args = torch.randn(agent.mu.shape).double(), settings(beta=0.0)
    batch, other = make_batch(agent, 20), make_batch(agent, 20, seed=1)
    parameters = (agent.theta, agent.mu, agent.logvar)

    def gradients(b):
        return torch.autograd.grad(varshare.varshare_loss(agent, noise, b, args)[0], parameters)

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
    batch = make_batch(agent, 40)
    losses, stats = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, args)
    expected_losses, expected_stats = ppo_loss_sample_by_sample(agent, agent.weights(), batch, args)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    np.testing.assert_allclose(stats, expected_stats, rtol=1e-9)
    assert 0.1 < stats[varshare.STATS.index("clipfrac")] < 0.95  # both sides of the clip were tested
    other = varshare.ppo_loss(agent, agent.unpack(agent.weights()), batch, settings())[0]
    assert not torch.allclose(losses, other)


def test_loss_is_a_mean_within_a_task_and_a_sum_over_tasks():
    agent, args = make_agent().requires_grad_(False), settings(beta=0.0)
    batch, noise = make_batch(agent, 10), torch.randn(TASKS, 1).double()
    twice = varshare.Batch(*(torch.cat((x, x), 1) for x in batch))
    loss, _ = varshare.varshare_loss(agent, noise, batch, args)
    torch.testing.assert_close(varshare.varshare_loss(agent, noise, twice, args)[0], loss)
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


# Rewards and evaluation


def test_rewards_are_scaled_by_the_std_of_their_tasks_discounted_return():
    rng, gamma, shape = np.random.default_rng(0), 0.9, (16, TASKS, 4)
    stats, running = torch.zeros(TASKS, 3, dtype=torch.float64), torch.zeros(TASKS, 4)
    seen, returns = [[] for _ in range(TASKS)], np.zeros(shape[1:])
    for _ in range(4):  # rollouts, over which an episode can run on
        rewards = (rng.normal(size=shape) * [[[1.0], [1000.0], [0.01]]] + [[[0.0], [500.0], [1.0]]]).astype(
            "f4"
        )
        done = (rng.random(shape) < 0.1).astype("f4")
        scaled, running = scale_rewards(
            stats, torch.from_numpy(rewards), torch.from_numpy(done), running, gamma
        )
        for t in range(16):
            for m, i in np.ndindex(shape[1:]):
                returns[m, i] = gamma * returns[m, i] + rewards[t, m, i]
                seen[m].append(returns[m, i])
                returns[m, i] *= 1 - done[t, m, i]
        for m in range(TASKS):
            np.testing.assert_allclose(scaled[:, m], rewards[:, m] / np.std(seen[m]), rtol=1e-4)
        np.testing.assert_allclose(running, returns, rtol=1e-5)


def test_a_tasks_rewards_do_not_touch_another_tasks():
    rewards, done = torch.randn(8, 2, 3), torch.zeros(8, 2, 3)
    results = []
    for factor in (1.0, 100.0):
        changed, stats = rewards.clone(), torch.zeros(2, 3, dtype=torch.float64)
        changed[:, 1] *= factor
        results.append(scale_rewards(stats, changed, done, torch.zeros(2, 3), 0.9))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.movedim(-2, 0)[0], other.movedim(-2, 0)[0])
    torch.testing.assert_close(results[0][0], results[1][0])  # and the scale of a task's rewards drops out


def balance(obs):
    """A controller of numbers that are the same for one observation and for many."""
    if obs.shape[-1] == 4:  # a pole
        return (obs[..., 2] + obs[..., 3] > 0).long()
    return torch.where(obs[..., 3] < -0.3, 2, torch.where(obs[..., 4] > 0, 3, 1))  # a lander


@pytest.mark.parametrize("env_id", ["cartpole10", "lunarlander20"])
def test_evaluation_plays_one_episode_in_each_environment(env_id):
    tasks, episodes = [7, 0, 3], 3
    returns, lengths = evaluate(balance, envs.make(env_id, episodes, tasks), spread_seeds(5, 1, 9))
    assert returns.shape == lengths.shape == (3, episodes)
    seeds = iter(spread_seeds(5, 1, 9))
    for (m, task), i in itertools.product(enumerate(tasks), range(episodes)):
        env = envs.make_single(env_id, task)
        obs, _ = env.reset(seed=next(seeds))
        total, steps, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(balance(torch.from_numpy(obs)).item())
            total, steps, over = total + reward, steps + 1, terminated or truncated
        assert (returns[m, i], lengths[m, i]) == (pytest.approx(total, rel=1e-12), steps)
    assert len(np.unique(lengths)) > 4  # short episodes did not wait for long ones by playing on


def test_seeds_of_environments_are_all_different():
    seeds = [
        s for seed in (*range(20), 10**9) for stream in range(20) for s in spread_seeds(seed, stream, 20)
    ]
    assert len(set(seeds)) == len(seeds)
    assert spread_seeds(3, 1, 20)[:5] == spread_seeds(3, 1, 5)
    assert all(type(s) is int for s in seeds)


# Probes: what a script must learn in an environment with a known answer

PROBE = {
    "beta": 0.001,  # a prior so weak that what is learned is the environment
    "num_steps": 16,
    "envs_per_task": 16,
    "hidden_sizes": (16,),
    "learning_rate": 0.01,
    "eval_episodes": 2,
    "run_name": "probe",
}


def learn(script, env_id, rollouts=40, **changes):
    """Train on a probe; returns values and policy at the observations, and the folder."""
    steps = rollouts * 16 * 16 * gym.spec(env_id).vector_entry_point.num_tasks
    folder = script.train(script.Args(**PROBE | {"env_id": env_id, "total_timesteps": steps} | changes))
    agent, net = probes.load_agent(script, folder)

    def at(*observations):
        obs = torch.tensor(observations).view(1, -1, 1).expand(len(agent.mu), -1, 1)
        return agent.value(net, obs).numpy(), agent.policy(net, obs)[..., -1].numpy()

    return at, folder


def test_probe_value_of_a_constant_reward(script):
    at, folder = learn(script, "ConstantReward")
    np.testing.assert_allclose(at(0.0)[0], [[1], [2], [3]], atol=0.15)
    rows = [row[2:] for row in probes.read_heartbeat(folder) if row[1] == "eval/episodic_return"]
    assert rows == [("task0", "1.0"), ("task1", "2.0"), ("task2", "3.0"), ("mean", "2.0")]
    rows = [row[2:] for row in probes.read_heartbeat(folder) if row[1] == "charts/episodic_return"]
    assert rows == [("task0", "1.0"), ("task1", "2.0"), ("task2", "3.0"), ("mean", "2.0")] * 40


def test_probe_value_depends_on_the_observation(script):
    at, _ = learn(script, "RewardOfObservation")
    np.testing.assert_allclose(at(-1.0, 1.0)[0], [[-1, 1]], atol=0.15)


def test_probe_value_is_discounted(script):
    at, _ = learn(script, "DelayedReward", gamma=0.7)
    np.testing.assert_allclose(at(0.0, 1.0)[0], [[0.7, 1]], atol=0.1)


def test_probe_policy_finds_the_better_action(script):
    at, _ = learn(script, "RewardOfAction")
    values, policy = at(0.0)
    assert policy > 0.9 and values == pytest.approx(1, abs=0.3)


def test_probe_policy_depends_on_the_observation(script):
    at, _ = learn(script, "RewardOfBoth")
    values, policy = at(-1.0, 1.0)
    assert policy[0, 0] < 0.1 and policy[0, 1] > 0.9
    np.testing.assert_allclose(values, [[1, 1]], atol=0.3)


def test_probe_gaussian_policy_finds_the_best_force(script):
    at, _ = learn(script, "RewardOfForce")
    np.testing.assert_allclose(at(-1.0, 1.0)[1], [[-1, 1]], atol=0.25)


def test_probe_truncation_is_not_an_end(script):
    at, _ = learn(script, "Truncated", gamma=0.8)
    np.testing.assert_allclose(at(-1.0, 1.0)[0], [[-5, 5]], atol=0.5)  # 1 / (1 - gamma)


def test_probe_termination_is_an_end(script):
    at, _ = learn(script, "Terminated", gamma=0.8)
    values = np.cumsum(0.8 ** np.arange(4))[::-1]
    np.testing.assert_allclose(at(1.0, 2.0, 3.0, 4.0)[0][0], values, atol=0.4)
    np.testing.assert_allclose(at(-1.0, -2.0, -3.0, -4.0)[0][0], -values, atol=0.4)


def test_probe_two_tasks_with_opposite_actions_and_rewards_of_different_scale(script):
    at, _ = learn(script, "Opposites")
    _, policy = at(0.0)
    assert policy[0] < 0.1 and policy[1] > 0.9


@pytest.mark.parametrize(("weights", "sigma"), [("mean", 1e-6), ("sample", 0.3)])
def test_the_first_minibatch_sees_the_policy_that_acted(monkeypatch, weights, sigma):
    if weights == "sample":  # the same draw in rollout and update
        monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.ones_like(agent.mu))
    changes = {"num_minibatches": 1, "update_epochs": 1, "sigma_init": sigma, "rollout_weights": weights}
    _, folder = learn(varshare, "RewardOfBoth", rollouts=3, **changes)
    values = {row[1]: [] for row in probes.read_heartbeat(folder)}
    for _, metric, _, value in probes.read_heartbeat(folder):
        values[metric].append(float(value))
    assert values["losses/clipfrac"][0] == values["losses/clipfrac_first_minibatch"][0] == 0
    assert max(map(abs, values["losses/old_approx_kl"] + values["losses/approx_kl"])) < 1e-4


# Whole runs


def run(script, name="run", **changes):
    return script.train(script.Args(**probes.SMALL | {"run_name": name} | changes))


@pytest.mark.parametrize("norm_adv", [True, False])
def test_advantages_are_normalised_in_every_task(script, monkeypatch, norm_adv):
    batches, ppo_loss = [], script.ppo_loss

    def record(agent, net, batch, args):
        batches.append(batch)
        return ppo_loss(agent, net, batch, args)

    monkeypatch.setattr(script, "ppo_loss", record)
    learn(script, "Opposites", rollouts=1, update_epochs=1, num_minibatches=1, norm_adv=norm_adv)
    assert [len(x) for x in batches[0]] == [2] * 6
    mean, std = batches[0].advantages.mean(1), batches[0].advantages.std(1)
    if norm_adv:
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(std, torch.ones(2), atol=1e-3, rtol=0)
    else:
        assert std[0] < 0.1 < std[1]  # as the rewards
        torch.testing.assert_close(batches[0].advantages + batches[0].values, batches[0].returns)


@pytest.mark.parametrize("changes", [{}, {"rollout_weights": "sample"}], ids=["", "sample"])
def test_same_seed_same_run_and_another_seed_another(script, changes):
    if not all(hasattr(script.Args, name) for name in changes):
        pytest.skip("the script has no such setting")
    one = run(script, "one", **changes)
    torch.manual_seed(123)  # nothing may depend on the global generators, nor on what ran before
    np.random.seed(123)  # noqa: NPY002
    two = run(script, "two", checkpoint_interval=1e9, **changes)
    probes.assert_same_runs(two, one)
    other = run(script, "other", seed=2, total_timesteps=2560, **changes)
    short = run(script, "short", total_timesteps=2560, **changes)
    for name in ("charts/episodic_return", "losses/value_loss"):
        rows = [[row for row in probes.read_heartbeat(f) if row[1] == name] for f in (other, short)]
        assert rows[0] != rows[1]


METRICS = {
    "charts/": {"episodic_return", "episodic_length", "SPS", "wall_time", "learning_rate"},
    "eval/": {"episodic_return", "episodic_length"},
    "losses/": {
        "policy_loss",
        "value_loss",
        "entropy",
        "old_approx_kl",
        "approx_kl",
        "clipfrac",
        "clipfrac_first_minibatch",
        "explained_variance",
    },
}


def test_files_of_a_run(script):
    folder = run(script, tasks=(4, 2), total_timesteps=5120)
    rows = probes.read_heartbeat(folder)
    names = [envs.cartpole.NAMES[4], envs.cartpole.NAMES[2]]
    metrics = {row[1] for row in rows}
    for prefix, expected in METRICS.items():
        assert {m.removeprefix(prefix) for m in metrics if m.startswith(prefix)} == expected
    assert {row[2] for row in rows} == {*names, "mean"}
    batch = 2 * 8 * 32
    assert sorted({int(row[0]) for row in rows}) == list(range(batch, 5120 + 1, batch))
    rates = [float(row[3]) for row in rows if row[1] == "charts/learning_rate"]
    np.testing.assert_allclose(rates, script.Args.learning_rate * (1 - np.arange(10) / 10))
    for name in (n for n in metrics if n.startswith(("charts/episodic", "eval/"))):
        of_last = {row[2]: float(row[3]) for row in rows if row[1] == name and row[0] == "5120"}
        if of_last.keys() == {*names, "mean"}:  # else no episode of a task ended since the log before
            assert of_last["mean"] == pytest.approx((of_last[names[0]] + of_last[names[1]]) / 2)

    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    per_task = {m for m in metrics if m.startswith(("charts/episodic", "eval/"))}
    assert set(events.Tags()["scalars"]) == metrics | {f"{m}/{name}" for m in per_task for name in names}
    for metric in metrics:
        logged = [(int(row[0]), float(row[3])) for row in rows if row[1] == metric and row[2] == "mean"]
        scalars = [(e.step, e.value) for e in events.Scalars(metric)]
        np.testing.assert_allclose(scalars, logged, rtol=1e-6)

    config = json.loads((folder / "config.json").read_text())
    assert config["args"] | {"hidden_sizes": (64, 64)} == vars(
        script.Args(**probes.SMALL | {"run_name": "run", "tasks": [4, 2], "total_timesteps": 5120})
    )
    assert (probes.ROOT / config["script"]).samefile(script.__file__)
    assert config["task_names"] == names
    assert config["task_params"] == [envs.cartpole.TASKS[4], envs.cartpole.TASKS[2]]
    assert torch.__version__.startswith(config["versions"]["torch"].split("+")[0])
    model = probes.load(folder)
    assert model["kind"] == "model" and model["task_names"] == names
    assert sorted(p.name for p in folder.iterdir() if "tfevents" not in p.name) == [
        "checkpoint.pt",
        "config.json",
        "heartbeat.csv",
        "model.pt",
    ]


def test_metrics_of_varshare():
    folder = run(varshare, reptile_alpha=0.5)
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


def test_final_evaluation_is_of_the_saved_model(script):
    folder = run(script)
    agent, net = probes.load_agent(script, folder)
    returns, _ = evaluate(
        lambda x: agent.greedy(agent.policy(net, x)), envs.make("cartpole10", 2), spread_seeds(1, 1, 20)
    )
    rows = [row[2:] for row in probes.read_heartbeat(folder) if row[1] == "eval/episodic_return"]
    tasks = zip(envs.cartpole.NAMES, returns.mean(1).tolist(), strict=True)
    assert rows == [*((name, str(x)) for name, x in tasks), ("mean", str(returns.mean()))]


def test_reptile_moves_the_mean_of_the_residuals_into_theta():
    folders = [run(varshare, str(alpha), reptile_alpha=alpha) for alpha in (0.0, 1.0)]
    means = [probes.load(folder)["agent"]["mu"].mean(0).abs().max() for folder in folders]
    assert means[0] > 1e-3 and means[1] < 1e-6


@pytest.mark.parametrize("env_id", ["lunarlander20", "lunarlander20-continuous", "Pendulum-v1"])
def test_other_environments_run(script, env_id, capsys):
    tasks = 1 if env_id == "Pendulum-v1" else 20
    size = {"num_steps": 16, "envs_per_task": 1, "num_minibatches": 2, "total_timesteps": 64 * tasks}
    folder = run(script, env_id=env_id, **size | {"norm_reward": True, "eval_episodes": 1})
    assert (folder / "model.pt").exists()
    assert capsys.readouterr().out.count("  return ") == 4 + tasks + 1


# Adaptation


def test_training_on_some_tasks_only():
    folder = run(varshare, tasks=(5, 1), total_timesteps=2560)
    model = probes.load(folder)
    assert model["task_names"] == [envs.cartpole.NAMES[5], envs.cartpole.NAMES[1]]
    assert model["agent"]["mu"].shape[0] == 2


def test_loading_keeps_theta_and_the_known_tasks():
    folder = run(varshare, tasks=(0, 1, 2), norm_reward=True, total_timesteps=5120)
    saved = probes.load(folder)["agent"]
    tasks = (2, 5, 0)
    args = varshare.Args(tasks=tasks, sigma_init=0.02)
    agent = varshare.Agent(envs.make("cartpole10", 1, tasks), args, torch.Generator().manual_seed(7))
    load_agent(agent, folder, [envs.cartpole.NAMES[task] for task in tasks])
    assert torch.equal(agent.theta, saved["theta"])
    for name in ("mu", "logvar", "return_stats"):
        assert torch.equal(getattr(agent, name)[[0, 2]], saved[name][[2, 0]])
    assert not agent.mu[1].any() and not agent.return_stats[1].any()
    torch.testing.assert_close(agent.logvar[1], torch.full_like(agent.logvar[1], 2 * math.log(0.02)))

    # a run starts there: with steps too small to move, it ends there too
    for path in (folder, folder / "model.pt"):
        changes = {"learning_rate": 1e-30, "total_timesteps": 2560}
        ended = probes.load(run(varshare, f"still-{path.name}", load=str(path), tasks=tasks, **changes))[
            "agent"
        ]
        torch.testing.assert_close(ended["theta"], saved["theta"], rtol=0, atol=1e-20)
        torch.testing.assert_close(ended["mu"][[0, 2]], saved["mu"][[2, 0]], rtol=0, atol=1e-20)
        assert ended["mu"][1].abs().max() < 1e-20


def test_a_frozen_theta_stays_and_the_residuals_move():
    folder = run(varshare, tasks=(0, 1, 2), total_timesteps=2560)
    changes = {"freeze_theta": True, "total_timesteps": 2560}
    adapted = run(varshare, "adapted", tasks=(3,), load=str(folder), **changes)
    saved, agent = probes.load(folder)["agent"], probes.load(adapted)["agent"]
    assert torch.equal(agent["theta"], saved["theta"])
    assert agent["mu"].shape[0] == 1 and (agent["mu"].abs() > 1e-3).any()
    assert not torch.equal(
        agent["logvar"], torch.full_like(agent["logvar"], 2 * math.log(varshare.Args.sigma_init))
    )


# Failures


def test_nan_stops_the_run_and_the_last_checkpoint_stays_good(script, tmp_path):
    with pytest.raises(SystemExit) as stop:  # 16 steps a rollout: the sixth is the first with a NaN
        learn(script, "TurnsToNaN", checkpoint_interval=0.0)
    assert isinstance(stop.value.code, str)  # which Python prints, and exits with code 1
    assert "NaN" in stop.value.code and f"step {6 * 16 * 16}" in stop.value.code
    checkpoint = probes.load(tmp_path / "runs/probe", "checkpoint")
    assert checkpoint["iteration"] == 5
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())
    assert not (tmp_path / "runs/probe/model.pt").exists()


# Speed-ups


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_run_equals_the_eager_one():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    size = {"env_id": "RewardOfBoth", "total_timesteps": 3 * 16 * 16, "sigma_init": 0.05}
    folders = [
        varshare.train(varshare.Args(**PROBE | size | {"compile": c, "run_name": f"compile-{c}"}))
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_learns_the_same(script):
    at, _ = learn(script, "RewardOfBoth", cuda=True)
    _, policy = at(-1.0, 1.0)
    assert policy[0, 0] < 0.1 and policy[0, 1] > 0.9


# Learning


def final_return(script, **changes):
    size = {"num_steps": 128, "eval_episodes": 10, "checkpoint_interval": 1e9}
    rows = probes.read_heartbeat(run(script, **size | changes))
    return next(float(row[3]) for row in rows if row[1:3] == ("eval/episodic_return", "mean"))


def test_learns_cartpole10(script):
    assert final_return(script, total_timesteps=409_600) > 380


def test_learns_identical_tasks(script):
    assert final_return(script, env_id="cartpole-identical10", total_timesteps=256_000) > 400
