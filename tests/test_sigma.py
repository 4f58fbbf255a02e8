"""Sigma: as VarShare learns it, the known one where one is known; as variants change it; and in the log."""

from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from envs.runs import Run

varshare, sac = map(probes.load_script, ("varshare_ppo.py", "varshare_sac.py"))
fixed, shuffled, samples = (
    probes.load_script(f"studies/posterior/varshare_{name}_ppo.py")
    for name in ("fixed_sigma", "shuffled_sigma", "samples")
)
l2soft = probes.load_script("baselines/l2soft_ppo.py")
FEATURES, TASKS, SAMPLES, SIGMA_PRIOR = 15, 3, 1024, 0.1
SCALES = torch.logspace(-2, 1, FEATURES)


pytestmark = pytest.mark.usefixtures("elsewhere")


# The rule


def squared_error(agent, W, mb, args):
    """0.5 (y - x W)^2, a mean over samples: the negative log-likelihood of noise with variance 1."""
    predicted = varshare.linear(mb.obs, W, "critic.0").squeeze(-1)
    return 0.5 * (predicted - mb.returns).square().mean(1), {"loss": predicted.new_zeros(TASKS)}


def regression(monkeypatch, beta, seed):
    """mu and sigma (task, weight) that `update` ends with on y = x w + noise, and the exact posterior's."""
    monkeypatch.setattr(varshare, "ppo_loss", squared_error)
    rng = torch.Generator().manual_seed(seed)
    size = {"hidden_sizes": (), "envs_per_task": 8, "num_steps": SAMPLES // 8, "update_epochs": 12}
    size |= {"beta": beta, "sigma_prior": SIGMA_PRIOR, "sigma_init": 0.003}
    args = varshare.Args(**size, max_grad_norm=1e9, freeze_theta=True)
    observations = gym.spaces.Box(-1.0, 1.0, (FEATURES,))
    spaces = SimpleNamespace(num_tasks=TASKS, single_observation_space=observations)
    spaces.single_action_space = probes.DISCRETE
    agent = varshare.Agent(spaces, args, rng).requires_grad_(False)
    agent.theta.zero_()
    x = torch.randn(TASKS, SAMPLES, FEATURES, generator=rng) * SCALES
    w = SIGMA_PRIOR * torch.randn(TASKS, FEATURES, 1, generator=rng)
    y = (x @ w).squeeze(2) + torch.randn(TASKS, SAMPLES, generator=rng)
    batch = varshare.Batch(x, y, y, y, y, y)
    optimizer = torch.optim.Adam([agent.mu], lr=0.01)
    for step in range(16):  # 16 times 12 epochs of 4 minibatches
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 16)
        varshare.update(agent, optimizer, batch, varshare.minibatch_gradients, args, rng)
    x = torch.cat((x, torch.ones(TASKS, SAMPLES, 1)), 2)  # the bias
    precision = x.mT @ x / beta + torch.eye(FEATURES + 1) / SIGMA_PRIOR**2
    mu = torch.linalg.solve(precision, x.mT @ y.unsqueeze(2) / beta).squeeze(2)
    sigma = precision.diagonal(dim1=1, dim2=2).rsqrt()  # of the best factorised Gaussian
    critic = slice(-(FEATURES + 1), None)
    return agent, (agent.mu[:, critic], agent.sigma[:, critic]), (mu, sigma)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_sigma_and_mu_are_those_of_a_known_posterior(monkeypatch, beta):
    sigma_error, mu_error = torch.zeros(FEATURES + 1), torch.zeros(FEATURES + 1)
    for seed in range(2):
        agent, (mu, sigma), (true_mu, true_sigma) = regression(monkeypatch, beta, seed)
        sigma_error += ((sigma - true_sigma).abs() / true_sigma).mean(0) / 2
        mu_error += ((mu - true_mu).abs() / (true_mu.abs() + true_sigma)).mean(0) / 2
        actor = slice(0, -(FEATURES + 1))  # which has no part in the loss
        torch.testing.assert_close(agent.sigma[:, actor], torch.full_like(agent.sigma[:, actor], SIGMA_PRIOR))
    assert sigma_error.max() < 0.1, sigma_error
    assert mu_error.max() < 0.1, mu_error


@pytest.mark.parametrize(
    ("script", "minibatches", "expected"),
    [(varshare, 3, 1 - (1 - 0.3) * 6 / 18), (varshare, 1, 0.5), (sac, None, 1 + 0.3 * 12 / 18)],
)
def test_sigma_has_the_smallest_expected_loss_and_kl_for_gradients_of_a_known_size(
    script, minibatches, expected
):
    """With h the curvature, d/dsigma [h sigma^2 / 2 + beta / N KL] = 0, whatever sigma was before."""
    args, N = probes.settings(script, beta=0.3), 18
    agent = probes.make_agent(script)
    if script is varshare:
        args.num_minibatches, B, more, correction = minibatches, 18 // minibatches, (), expected
    else:
        args.batch_size = B = 12
        more, correction = (torch.tensor(18.0).double(),), expected
    size = 10 ** torch.linspace(-6, 1, agent.mu.shape[1]).double().expand_as(agent.mu).clone()
    size[:, ::7] = 0
    for sign in (1, -1, -1):
        script.learn_sigma(agent, sign * size, *more, args)
    h = B * size.square() / correction
    sigma = agent.sigma.clone().requires_grad_()
    zero = torch.zeros(()).double()
    kl = kl_divergence(Normal(zero, sigma), Normal(zero, args.sigma_prior))
    (slope,) = torch.autograd.grad((0.5 * h * sigma.square() + 0.3 / N * kl).sum(), sigma)
    assert (slope * sigma).abs().max() < 1e-9 * 0.3 / N
    torch.testing.assert_close(agent.sigma[:, ::7], torch.full_like(sigma[:, ::7], args.sigma_prior))
    if script is sac:  # in PPO it is of all minibatches of an update
        assert torch.equal(agent.live, size > 0)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_sacs_sigma_is_a_known_posteriors(beta):
    """Of many regressions with one weight each; as many samples as there are, drawn with replacement."""
    samples, args = 256, probes.settings(sac, beta=beta, sigma_prior=10.0, batch_size=256, sigma_decay=0.999)
    agent, rng = probes.make_agent(sac), torch.Generator().manual_seed(0)
    scale = torch.rand(agent.mu.shape, generator=rng).double() + 0.5
    x, y = torch.randn(2, *agent.mu.shape, samples, generator=rng).double()
    x *= scale.unsqueeze(2)
    mu, curvature = (x * y).sum(2) / x.square().sum(2), x.square().mean(2)
    true = (samples * curvature / beta + 1 / 10.0**2).rsqrt()
    for _ in range(300):
        inds = torch.randint(samples, x.shape, generator=rng)
        W = mu + true * torch.randn(mu.shape, generator=rng).double()
        G = (x * (x * W.unsqueeze(2) - y)).gather(2, inds).mean(2)
        sac.learn_sigma(agent, G, torch.tensor(float(samples)).double(), args)
    ratio = (agent.sigma / true).square().mean()  # of h over its estimate, which has both signs of errors
    assert ratio == pytest.approx(1, abs=0.06)


def test_squared_gradients_are_a_running_mean_that_starts_with_the_first():
    agent, args, rng = (
        probes.make_agent(varshare),
        probes.settings(varshare),
        torch.Generator().manual_seed(0),
    )
    gradients = [torch.randn(agent.mu.shape, generator=rng).double() for _ in range(5)]
    for G in gradients:
        varshare.learn_sigma(agent, G, args)
    weights = args.sigma_decay ** torch.arange(4, -1, -1)
    expected = sum(w * G.square() for w, G in zip(weights, gradients)) / weights.sum()
    h_sum = agent.h_sum / agent.h_count
    torch.testing.assert_close(h_sum / h_sum[0, 0], expected / expected[0, 0])


@pytest.mark.parametrize("script", [varshare, samples])
def test_an_update_learns_sigma_in_every_minibatch_and_says_which_weights_are_live(monkeypatch, script):
    args = probes.settings(script, num_minibatches=3, update_epochs=2)
    agent = probes.make_agent(script)
    agent.live.fill_(True)
    before = agent.h_count.clone()
    batch = probes.random_batch(script, agent, 18)
    batch.obs[..., 0] = 0  # nothing depends on the weights of this input
    rng = torch.Generator().manual_seed(0)
    script.update(
        agent, torch.optim.SGD(agent.parameters(), lr=0.01), batch, script.minibatch_gradients, args, rng
    )
    weight = (1 - args.sigma_decay**6) / (1 - args.sigma_decay)
    torch.testing.assert_close(agent.h_count - before * args.sigma_decay**6, torch.full_like(before, weight))
    live, sigma = agent.unpack(agent.live), agent.unpack(agent.sigma)
    for net in ("actor", "critic"):
        name = f"{net}.0.weight"
        assert not live[name][..., 0].any() and live[name][..., 1:].any()
        torch.testing.assert_close(
            sigma[name][..., 0], torch.full_like(sigma[name][..., 0], args.sigma_prior)
        )
        assert (sigma[name][live[name]] < args.sigma_prior).all()


# Variants


def test_shuffling_permutes_live_weights_within_a_task_and_layer():
    agent = probes.make_agent(shuffled)
    rng = torch.Generator().manual_seed(0)
    agent.live.copy_(torch.rand(agent.live.shape, generator=rng) < 0.7)
    before, moved = agent.sigma.clone(), 0
    shuffled.shuffle_sigma(agent, rng)
    live = agent.unpack(agent.live)
    for name, new in agent.unpack(agent.sigma).items():
        old, on = agent.unpack(before)[name], live[name]
        assert torch.equal(new[~on], old[~on])
        for m in range(probes.TASKS):
            assert torch.equal(new[m][on[m]].sort().values, old[m][on[m]].sort().values)
        moved += (new != old).sum().item()
    assert moved > 0.8 * agent.live.sum()


def test_sigma_is_shuffled_after_every_minibatch(monkeypatch):
    shuffle, seen = shuffled.shuffle_sigma, []
    monkeypatch.setattr(shuffled, "shuffle_sigma", lambda agent, rng: seen.append(shuffle(agent, rng)))
    args, agent = probes.settings(shuffled, num_minibatches=3, update_epochs=2), probes.make_agent(shuffled)
    optimizer, batch = torch.optim.SGD(agent.parameters(), lr=0.01), probes.random_batch(shuffled, agent, 18)
    rng = torch.Generator().manual_seed(0)
    shuffled.update(agent, optimizer, batch, shuffled.minibatch_gradients, args, rng)
    assert len(seen) == 6


def test_several_draws_are_averaged():
    args = probes.settings(samples, max_grad_norm=1e9, weight_samples=3)
    agents = [probes.make_agent(script) for script in (samples, varshare)]
    batch = probes.random_batch(varshare, agents[1], 20)
    noise = torch.stack([probes.draws(agents[1], seed)[0] for seed in range(3)])
    grads, G, stats = samples.minibatch_gradients(agents[0], batch, noise, args)
    single = [varshare.minibatch_gradients(agents[1], batch, eps, args) for eps in noise]
    for name, x in grads.items():
        torch.testing.assert_close(x, sum(one[0][name] for one in single) / 3)
    torch.testing.assert_close(G, torch.stack([one[1] for one in single]))
    for name, x in stats.items():
        torch.testing.assert_close(x, sum(one[2][name] for one in single) / 3)
    samples.learn_sigma(agents[0], G, args)
    scale = (agents[0].h_sum / G.square().mean(0))[0, 0].item()
    torch.testing.assert_close(agents[0].h_sum, scale * G.square().mean(0))
    # with a single draw it is VarShare
    states = []
    for script, agent in zip((samples, varshare), agents):
        rng = torch.Generator().manual_seed(0)
        agent.load_state_dict(probes.make_agent(varshare).state_dict())
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
        args.weight_samples = 1
        script.update(agent, optimizer, batch, script.minibatch_gradients, args, rng)
        states.append(agent.state_dict())
    torch.testing.assert_close(*states)


def test_a_fixed_sigma_is_noise_in_l2softs_gradient():
    args = probes.settings(fixed, max_grad_norm=1e9, sigma=0.2, l2_coef=0.3)
    agent, without = (
        probes.make_agent(script, **{"sigma": 0.2} if script is fixed else {}) for script in (fixed, l2soft)
    )
    batch, [noise] = probes.random_batch(l2soft, without, 20), probes.draws(agent)
    grads, _ = fixed.minibatch_gradients(agent, batch, noise, args)
    losses, _ = fixed.ppo_loss(agent, agent.unpack(agent.theta + agent.mu + 0.2 * noise), batch, args)
    objective = (losses + 0.3 * agent.mu.square().sum(1)).sum()
    torch.testing.assert_close(tuple(grads.values()), torch.autograd.grad(objective, (agent.theta, agent.mu)))
    still, _ = fixed.minibatch_gradients(agent, batch, torch.zeros_like(noise), args)
    torch.testing.assert_close(still, l2soft.minibatch_gradients(without, batch, args)[0])


@pytest.mark.learns
@pytest.mark.parametrize("name", probes.VARIANTS)
def test_variants_learn_from_sampled_rollouts(name):
    script = probes.load_script(name)
    at, _ = probes.learn(script, "RewardOfBoth", rollout_weights="sample")
    _, policy = at(-1.0, 1.0)
    assert policy[0, 0] < 0.1 and policy[0, 1] > 0.9


# The log


def test_quantiles_of_sigma_are_among_live_weights():
    rng, logged = np.random.default_rng(0), {}
    shapes = {
        "actor.0.weight": (3, 4, 5),
        "actor.0.bias": (3, 4),
        "critic.0.weight": (3, 1, 5),
        "logstd": (3, 1),
    }
    theta = {name: torch.from_numpy(rng.normal(size=(1, *shape[1:]))) for name, shape in shapes.items()}
    sigma = {name: torch.from_numpy(rng.random(shape)) for name, shape in shapes.items()}
    live = {name: torch.from_numpy(rng.random(shape) < 0.6) for name, shape in shapes.items()}
    live["critic.0.weight"][:] = False  # of a layer without any, all count

    run = SimpleNamespace(log=lambda metric, overall, tasks=(): logged.update({metric: (overall, tasks)}))
    run.log_tasks = partial(Run.log_tasks, run)
    Run.log_sigma(run, theta, sigma, live)
    layer = np.concatenate([sigma[f"actor.0.{x}"].numpy()[live[f"actor.0.{x}"]] for x in ("weight", "bias")])
    for q in (1, 50, 99):
        assert logged[f"varshare/sigma_q{q}/actor.0"][0] == pytest.approx(np.quantile(layer, q / 100))
    of_critic = np.quantile(sigma["critic.0.weight"], 0.5)
    assert logged["varshare/sigma_q50/critic.0"][0] == pytest.approx(of_critic)
    assert logged["varshare/dead/critic.0"] == (1, [1, 1, 1])
    on = [live[f"actor.0.{x}"].flatten(1).numpy() for x in ("weight", "bias")]
    np.testing.assert_allclose(
        logged["varshare/dead/actor.0"][1], 1 - np.concatenate(on, 1).mean(1), rtol=1e-6
    )
    for m in range(3):
        own = torch.cat([sigma[name][m][live[name][m]] for name in shapes])
        assert logged["varshare/sigma"][1][m] == own.median()
