"""The mathematics of VarShare-SAC, its replay buffer, and what it learns."""

import itertools
import math
from functools import partial

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
import torch.nn.functional as F
from probes import BOTH, DISCRETE, HIDDEN, OBS, TASKS
from test_varshare_ppo import torchs
from torch.distributions import (
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

from envs import runs
from envs.replay import ReplayBuffer
from envs.settings import InputError

sac = probes.load_script("varshare_sac.py")
make_agent, settings = partial(probes.make_agent, sac), partial(probes.settings, sac)
run = partial(probes.run, sac)

pytestmark = pytest.mark.usefixtures("elsewhere")


# The objective


def columns(agent, name):
    """Where the weights of that name stand in a row."""
    ends = dict(zip(agent.shapes, np.cumsum([math.prod(shape) for shape in agent.shapes.values()])))
    return slice(ends[name] - math.prod(agent.shapes[name]), ends[name])


def forward(agent, row, net, x):
    """Output of one network of one task, from its row of weights, by plain linear layers."""
    for by_hand in (probes.BY_HAND[name] for name in probes.BY_HAND if hasattr(agent, name)):
        W = {name: row[columns(agent, name)].view(shape) for name, shape in agent.shapes.items()}
        return by_hand(agent, W, net, x)
    if "embedding" in agent.shapes:
        x = torch.cat((x, row[columns(agent, "embedding")].expand(len(x), -1)), 1)
    for i in range(len(HIDDEN) + 1):
        weight, bias = (f"{net}.{i}.{kind}" for kind in ("weight", "bias"))
        weight = row[columns(agent, weight)].view(agent.shapes[weight])
        x = F.linear(x.relu() if i else x, weight, row[columns(agent, bias)])
    return x


def losses_task_by_task(agent, slow, weights, b, args):
    """Bellman errors, actor's and temperature's loss of each task, (task,) each, from the papers' formulas.

    Of weights (task, weight), and those of the target. Critics say (Q - mean) / std of each task: losses are
    in Q's own units, except for the Bellman error. Each loss has the gradient that the paper gives it.
    """
    results, pick = [], torch.min if args.critics == "min" else lambda x, y: (x + y) / 2
    for m in range(TASKS):
        row, fixed, log_alpha = weights[m], weights[m].detach(), agent.log_alpha[m, 0]
        alpha, mean, std = log_alpha.detach().exp(), agent.value_norm.mean[m], agent.value_norm.std[m]

        def both(row, *inputs, mean=mean, std=std):
            x = torch.cat(inputs, 1)
            return [mean + std * forward(agent, row, f"critic{k}", x) for k in (1, 2)]

        def squashed(row, obs, noise):  # an action, and its log-probability
            mean, logstd = forward(agent, row, "actor", obs).chunk(2, -1)
            base = Normal(mean, (-5 + 0.5 * 7 * (logstd.tanh() + 1)).exp())
            squash = [TanhTransform()]
            action = (base.mean + base.stddev * noise).tanh()
            return action, Independent(TransformedDistribution(base, squash), 1).log_prob(action)

        if agent.discrete:
            after = Categorical(logits=forward(agent, row, "actor", b.next_obs[m]))
            now = Categorical(logits=forward(agent, row, "actor", b.obs[m]))
            value = (after.probs * (pick(*both(slow[m], b.next_obs[m])) - alpha * after.logits)).sum(1)
            taken = [q[torch.arange(len(q)), b.actions[m]] for q in both(row, b.obs[m])]
            actor = (now.probs * (alpha * now.logits - pick(*both(fixed, b.obs[m])))).sum(1).mean()
            entropy = now.entropy()
        else:
            action, logp = squashed(row, b.next_obs[m], b.noise[0][m])
            value = pick(*both(slow[m], b.next_obs[m], action)).squeeze(1) - alpha * logp
            taken = [q.squeeze(1) for q in both(row, b.obs[m], b.actions[m])]
            action, logp = squashed(row, b.obs[m], b.noise[1][m])
            actor = (alpha * logp - pick(*both(fixed, b.obs[m], action)).squeeze(1)).mean()
            entropy = -logp
        y = args.reward_scale * b.rewards[m] + args.gamma * (1 - b.terminated[m]) * value
        bellman = sum(0.5 * ((x - y.detach()) / std).square().mean() for x in taken)
        temperature = log_alpha.exp() * (entropy.mean().detach() - agent.target_entropy)
        results.append((bellman, actor, temperature))
    return [torch.stack(x) for x in zip(*results)]


@BOTH
@pytest.mark.parametrize(("critics", "norm_value"), [("min", False), ("mean", True)])
def test_gradients_are_those_of_the_objective(monkeypatch, space, critics, norm_value):
    """Critics follow the Bellman errors alone, the actor its loss alone, temperatures theirs."""
    rng, b = torch.Generator().manual_seed(0), None
    agent = make_agent(space, norm_value=norm_value)
    args = settings(reward_scale=0.7, gamma=0.9, critics=critics, norm_value=norm_value, beta=0.7)
    with torch.no_grad():
        for x in (agent.theta, agent.mu, agent.sigma):
            x *= 0.3  # atanh, in the log-probability of a saturated action, is rough
        target = probes.target_of(agent)
        agent.value_norm.see(torch.tensor([[3.0], [-4.0], [0.5]]) + torch.randn(TASKS, 50, generator=rng))
    b, draws, rows = probes.random_transitions(sac, agent, 40), probes.draws(agent), []
    weights = agent.theta + agent.mu + agent.sigma * draws[0]
    losses = losses_task_by_task(agent, target.weights(), weights, b, args)
    G = torch.autograd.grad(sum(x.sum() for x in losses), weights, retain_graph=True)[0]
    kl = kl_divergence(Normal(agent.mu, agent.sigma), Normal(0.0, args.sigma_prior)).sum()
    expected = {"theta": G.sum(0), "mu": G + torch.autograd.grad(0.7 / 50 * kl, agent.mu)[0]}
    expected["log_alpha"] = torch.autograd.grad(losses[2].sum(), agent.log_alpha)[0]

    monkeypatch.setattr(sac, "learn_sigma", lambda agent, G, *rest: rows.append(G.clone()))
    stored = torch.tensor(50.0).double()
    inputs = target, b, *draws, stored, args
    grads, (stats, _) = probes.gradients(sac, agent, *inputs)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(rows, [G])
    for name, x in zip(("qf_loss", "actor_loss", "alpha_loss"), losses):
        torch.testing.assert_close(stats[f"losses/{name}"], x.detach())
    assert not any(x.requires_grad for x in stats.values())
    agent.theta.requires_grad_(False)
    frozen, _ = probes.gradients(sac, agent, *inputs)
    torch.testing.assert_close(frozen, {name: x for name, x in expected.items() if name != "theta"})


def test_discrete_losses_by_hand():
    """One task, one state, two actions, Q and policy set by the biases of the last layers."""
    agent = make_agent(gym.spaces.Discrete(2))
    with torch.no_grad():
        for x in (agent.theta, agent.mu):
            x.zero_()
        target = probes.target_of(agent, 0.0)
        agent.theta[columns(agent, "actor.2.bias")] = torch.tensor([math.log(3), 0.0]).double()  # 3/4, 1/4
        agent.theta[columns(agent, "critic1.2.bias")] = torch.tensor([1.0, 2.0]).double()
        agent.theta[columns(agent, "critic2.2.bias")] = torch.tensor([3.0, 0.0]).double()
        target.theta[columns(agent, "critic1.2.bias")] = torch.tensor([4.0, 8.0]).double()
        target.theta[columns(agent, "critic2.2.bias")] = torch.tensor([6.0, 4.0]).double()
        agent.log_alpha.fill_(math.log(0.5))
    batch = probes.random_transitions(sac, agent, 2)
    b = sac.Batch(*(x[:, :1] for x in batch[:-1]), noise=batch.noise[:, :, :1])
    b = b._replace(actions=torch.zeros(TASKS, 1).long(), rewards=torch.full((TASKS, 1), 1.0).double())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    y = 1 + 0.9 * (0.75 * 4 + 0.25 * 4 + 0.5 * entropy)
    expected = {
        "losses/qf1_values": 1,
        "losses/qf2_values": 3,
        "losses/qf_loss": 0.5 * ((1 - y) ** 2 + (3 - y) ** 2),
        "losses/actor_loss": -0.5 * entropy - (0.75 * 1 + 0.25 * 0),
        "losses/entropy": entropy,
        "losses/alpha_loss": 0.5 * (entropy - agent.target_entropy),
    }
    noise, args = torch.zeros_like(agent.mu), settings(gamma=0.9, reward_scale=1.0)
    stats, target_q = sac.minibatch_backward(agent, target, b, noise, torch.tensor(9.0), args)
    assert stats.keys() == expected.keys() and target_q.flatten().tolist() == pytest.approx([y] * TASKS)
    for name, value in expected.items():
        assert stats[name].tolist() == pytest.approx([value] * TASKS), name


@BOTH
def test_the_policy_of_each_task_is_its_networks_and_random_actions_are_uniform(space):
    agent = make_agent(space).requires_grad_(False)
    W, obs = agent.unpack(agent.weights()), torch.randn(TASKS, 7, OBS).double()
    out = torch.stack([forward(agent, row, "actor", x) for row, x in zip(agent.weights(), obs)])
    noise = torch.randn(TASKS, 7, agent.act_dim).double()
    if space is DISCRETE:
        policy, expected = agent.actor(W, obs), Categorical(logits=out)
        torch.testing.assert_close(agent.policy(W, obs), expected.probs)
        assert torch.equal(policy.sample(noise), (out + noise).argmax(2))
        assert torch.equal(agent.random_actions(noise), noise.argmax(2))
        return
    expected, _ = torchs("SquashedGaussian", out)
    torch.testing.assert_close(agent.actor(W, obs).sample(noise), expected.sample(noise))
    torch.testing.assert_close(agent.policy(W, obs), expected.mean)
    torch.testing.assert_close(agent.random_actions(noise), 2 * Normal(0, 1).cdf(noise) - 1)


# Buffer, targets, updates


class Counting(probes.Probe):
    """The reward is the number of the step, and a half more in the second environment."""

    steps = -1  # it is tried out with one

    def reward(self, actions):
        self.steps += 1
        return self.steps + 0.5 * np.arange(self.num_envs)


gym.register("Counting", vector_entry_point=Counting)


@pytest.fixture
def saves(monkeypatch):
    """Replaces the writing of files: what runs would have saved, as it was then; the last is the model."""
    saved = []

    def save(path, kind, content):
        steps = [int(x["step"]) for x in content.get("optimizer", {"state": {}})["state"].values()]
        parts = {
            part: {name: x.clone() for name, x in content[part].items()}
            for part in ("agent", "target")
            if part in content
        }
        saved.append(parts | {"buffer": content.get("buffer"), "updates": max(steps, default=0)})

    monkeypatch.setattr(runs, "save", save)
    return saved


def test_the_buffer_keeps_the_newest_transitions_and_updates_draw_from_all_of_them(saves, monkeypatch):
    sampled, backward = [], sac.minibatch_backward

    def record(agent, target, b, noise, num_stored, args):
        sampled.append((b.rewards.unique().tolist(), num_stored.item()))
        return backward(agent, target, b, noise, num_stored, args)

    monkeypatch.setattr(sac, "minibatch_backward", record)
    size = {"env_id": "Counting", "total_timesteps": 50, "envs_per_task": 2, "buffer_size": 14}
    run(**size, batch_size=14, learning_starts=4, updates_per_step=10.0, checkpoint_interval=0.0)
    for step, save in enumerate(saves[:24], 1):
        buffer, newest = save["buffer"], range(max(1, step - 6), step + 1)
        assert buffer["steps"] == step and buffer["data"].shape == (1, min(step, 7), 2, 5)
        expected = [next(t for t in newest if (t - 1) % 7 == i) for i in range(min(step, 7))]
        assert buffer["data"][0, :, :, 3].tolist() == [[t, t + 0.5] for t in expected]  # the rewards
        assert buffer["data"][..., 4].all()  # every step was the last of its episode
        if step > 1:
            rewards, stored = zip(*sampled[10 * (step - 2) : 10 * (step - 1)])
            assert {x for seen in rewards for x in seen} == {t + half for t in newest for half in (0, 0.5)}
            assert set(stored) == {2 * len(newest)}
    assert saves[24]["buffer"]["data"].shape[1] == 0 and len(saves) == 26  # a finished run has no use for it


@BOTH
def test_the_buffer_keeps_what_belongs_together(space):
    """All parts of a transition, and of a task, in their own type, and the same after a checkpoint."""
    buffer, copy = (ReplayBuffer(probes.spaces(space), 5, torch.device("cpu")) for _ in range(2))
    for step in range(7):
        number = 100.0 * torch.arange(TASKS).view(-1, 1) + 2 * step + torch.arange(2)  # (task, env)
        obs = number.unsqueeze(2) + torch.arange(OBS)
        actions = number.long() % 4 if space is DISCRETE else number.unsqueeze(2).expand(-1, -1, 2)
        buffer.add(obs, obs + 1, actions, number, number % 2 == 0)
    copy.load_state_dict(buffer.state_dict())
    for b in (buffer, copy):
        batch = b.sample(200, torch.Generator().manual_seed(0))
        number = batch["rewards"]
        for m in range(TASKS):
            assert set(number[m].tolist()) == {100 * m + x for x in range(4, 14)}
        torch.testing.assert_close(batch["obs"], number.unsqueeze(2) + torch.arange(OBS))
        torch.testing.assert_close(batch["next_obs"], batch["obs"] + 1)
        assert torch.equal(batch["terminated"], (number % 2 == 0).float())
        actions = number.long() % 4 if space is DISCRETE else number.unsqueeze(2).expand(-1, -1, 2)
        assert torch.equal(batch["actions"], actions)


def test_targets_average_the_parameters_once_in_every_update(saves):
    changes = {"updates_per_step": 0.5, "tau": 0.3, "checkpoint_interval": 0.0}
    run(total_timesteps=400, **changes)  # 40 steps, the first 20 at random
    for step, (old, new) in enumerate(itertools.pairwise(saves[:-1]), 2):
        assert new["updates"] == max(0, step - 19) // 2
        moves = step > 19 and (step - 19) % 2 == 0
        for name in ("theta", "mu"):
            before, after, now = old["target"][name], new["target"][name], new["agent"][name]
            torch.testing.assert_close(after, before.lerp(now, 0.3) if moves else before)


def test_a_buffer_that_cannot_fit_is_refused():
    with pytest.raises(InputError, match="GiB"):
        run(total_timesteps=10**13, buffer_size=10**12)


# Probes, and what it learns


def test_probe_the_policy_depends_on_the_observation():
    at, _ = probes.learn(sac, "RewardOfBoth")
    q, policy = at(-1.0, 1.0)
    assert policy[0, 0] < 0.1 and policy[0, 1] > 0.9
    np.testing.assert_allclose(q[0], [[1, -1], [-1, 1]], atol=0.2)


def test_probe_tasks_with_opposite_actions():
    at, _ = probes.learn(sac, "Opposites", reward_scale=100.0)
    _, policy = at(0.0)
    assert policy[0] < 0.1 and policy[1] > 0.9


def test_probe_truncation_is_not_an_end():
    """Nothing depends on actions: values are those of going on forever, and of an entropy as good as 0."""
    at, _ = probes.learn(sac, "Truncated", gamma=0.8, target_entropy=0.0, alpha_init=1e-4)
    np.testing.assert_allclose(at(-1.0, 1.0)[0].mean(2), [[-5, 5]], atol=0.7)


@pytest.mark.slow
def test_probe_the_best_force():
    at, _ = probes.learn(sac, "RewardOfForce", total_timesteps=6000)
    q, force = at(-1.0, 1.0, actions=(-0.25, 0.25))
    np.testing.assert_allclose(
        4 * force, [[-1, 1]], atol=0.25
    )  # bounds are -4 and 4, the policy's units -1 and 1
    np.testing.assert_allclose(q[0, :, 0], [0, 0], atol=0.3)


@pytest.mark.learns
def test_learns_pendulum():
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 4_000, "target_entropy": 1.0, "batch_size": 64}
    # of seeds 1 to 10 all but the first, a slow one, have -188 to -120 by then
    folder = sac.train(sac.Args(**settings, seed=2, run_name="pendulum"))
    assert probes.evaluation(folder)["mean"] > -400  # a random policy has -1200
