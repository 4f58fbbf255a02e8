"""VarShare's variants with PPO: the formula that is new in each."""

import numpy as np
import pandas as pd
import probes
import pytest
import torch
from probes import TASKS, gradients, make_agent, update
from test_sigma import logged
from torch.distributions import Gamma, HalfCauchy, InverseGamma, LogNormal, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import envs
from envs.metrics import sharing
from envs.models import agent_of_task
from envs.networks import split

varshare = probes.load_script("varshare_ppo.py")
annealed, horseshoe, learned_prior, lora, reptile, trust_region = (
    probes.load_script(f"{name}_ppo")
    for name in ("annealed", "horseshoe", "learned_prior", "lora", "reptile", "trust_region")
)

pytestmark = pytest.mark.usefixtures("elsewhere")


def pair(script, **changes):
    """Agents of the script and of the trunk with the same weights, and settings and a batch for both."""
    agents = [make_agent(x, **changes) for x in (script, varshare)]
    agents[0].load_state_dict(agents[1].state_dict(), strict=False)
    args = [probes.settings(x, num_minibatches=3, update_epochs=2) for x in (script, varshare)]
    return *agents, *args, probes.random_batch(varshare, agents[1], 18)


# Annealed


def test_schedule_is_geometric_held_and_geometric_again():
    args = annealed.Args(warmup=0.2, hold=0.4)
    at = [annealed.schedule(x, 1e-2, 100.0, args) for x in (0, 0.1, 0.2, 0.3, 0.6, 0.8, 1)]
    assert at == pytest.approx([1e-2, 1e-1, 1, 1, 1, 10, 100])
    assert annealed.schedule(0, 0.5, 2.0, annealed.Args(warmup=0, hold=1)) == pytest.approx(1)
    assert annealed.schedule(0.5, 0.5, 4.0, annealed.Args(warmup=1, hold=0)) == pytest.approx(0.5**0.5)


def test_annealed_follows_todays_beta_and_prior(monkeypatch):
    schedule = {"beta": 0.03, "beta_start": 10.0, "beta_end": 20.0}
    schedule |= {"sigma_prior": 0.2, "sigma_prior_start": 0.5, "sigma_prior_end": 2.0}
    args = probes.settings(annealed, **schedule)
    for progress, beta, prior in ((0.0, 0.3, 0.1), (0.5, 0.03, 0.2), (1.0, 0.6, 0.4)):
        agent, trunk, _, _, batch = pair(annealed)
        theirs, draws = probes.settings(varshare, beta=beta, sigma_prior=prior), probes.draws(trunk)
        annealed.anneal(agent, progress, args)
        ours = gradients(annealed, agent, batch, *draws, args)
        torch.testing.assert_close(ours, gradients(varshare, trunk, batch, *draws, theirs))
        torch.testing.assert_close(agent.sigma, trunk.sigma)
        kl = annealed.gaussian_kl(agent.mu, agent.sigma, agent.sigma_prior)
        torch.testing.assert_close(kl, varshare.gaussian_kl(trunk.mu, trunk.sigma, prior))
    seen, anneal = [], annealed.anneal
    monkeypatch.setattr(annealed, "anneal", lambda agent, x, args: seen.append(x) or anneal(agent, x, args))
    probes.run(annealed, total_timesteps=4 * 2560)
    assert seen == [0, 0.25, 0.5, 0.75]


# Horseshoe


def expectation(function, mean, std, nodes=60):
    """E of a function of N(mean, std^2), by Gauss' quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(nodes)
    x = torch.from_numpy(x).view(-1, *[1] * mean.ndim)
    weights = torch.from_numpy(weights / weights.sum()).view_as(x)
    return (weights * function(mean + std * x)).sum(0)


def moments(log_a, log_b):
    """E z and E z^2 of z^2 = a b, of means and standard deviations of log a and log b."""
    mean, std = (log_a[0] + log_b[0]) / 2, (log_a[1].square() + log_b[1].square()).sqrt() / 2
    return [expectation(lambda x, n=n: (n * x).exp(), mean, std) for n in (1, 2)]


def scales_kl(log_a, log_b):
    """KL of log-normal a and b, with their priors Gamma and inverse Gamma, by quadrature."""
    total = 0
    for (mean, std), prior in zip((log_a, log_b), (Gamma(0.5, 1.0), InverseGamma(0.5, 1.0))):
        q = LogNormal(mean, std)
        total += expectation(lambda x, q=q, p=prior: q.log_prob(x.exp()) - p.log_prob(x.exp()), mean, std)
    return total


def learned_horseshoe(learn=3):
    """An agent whose scales were learned from made-up gradients; its settings."""
    agent, rng = make_agent(horseshoe, probes.BOX), torch.Generator().manual_seed(0)
    agent.h_sum.copy_(1e-3 * torch.rand(agent.mu.shape, generator=rng).double() ** 4)
    agent.h_count.fill_(1)
    args = probes.settings(horseshoe, beta=0.001)
    with torch.no_grad():
        agent.mu *= 10.0 ** torch.linspace(-3, 0, agent.scales.shape[2])[agent.unit]
    for _ in range(learn):
        horseshoe.learn_scales(agent, args)
    return agent, args


def posteriors(agent):
    """Means and standard deviations of log a and log b, (task, unit) each, at the optimum of `learn_scales`.

    There E a = (1 - D) / 2 and E 1/b = (1 + D) / 2.
    """
    M, var_a, var_b, _ = agent.scales.unbind(1)
    D = ((3 * var_b - var_a) / 8 - M).tanh()
    mean_a, mean_b = ((1 - D) / 2).log() - var_a / 2, var_b / 2 - ((1 + D) / 2).log()
    return (mean_a, var_a.sqrt()), (mean_b, var_b.sqrt())


def test_the_priors_of_a_and_b_make_z_half_cauchy():
    torch.manual_seed(0)
    z = (Gamma(0.5, 1.0).sample((200_000,)) * InverseGamma(0.5, 1.0).sample((200_000,))).sqrt()
    share = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95])
    torch.testing.assert_close(z.quantile(share), HalfCauchy(1.0).icdf(share), rtol=0.05, atol=0)


def test_a_unit_is_what_one_output_depends_on():
    agent, _ = learned_horseshoe(0)
    numbers = agent.unpack(agent.unit.unsqueeze(0))
    assert len(set(agent.unit.tolist())) == agent.scales.shape[2] == 2 * sum(probes.HIDDEN) + 3 + 2
    for name, x in numbers.items():
        if name.endswith(".weight"):
            bias = numbers[name.replace("weight", "bias")]
            assert torch.equal(x, bias.unsqueeze(2).expand_as(x))


def test_scales_are_the_best_for_their_units():
    """Their KL is that of log-normals; small steps of any of the four parameters raise loss and KL."""
    agent, args = learned_horseshoe()
    q_a, q_b = posteriors(agent)
    torch.testing.assert_close(agent.scales[:, 3], scales_kl(q_a, q_b), rtol=1e-3, atol=1e-3)
    E_z, variance = agent.z()
    mean, square = moments(q_a, q_b)
    torch.testing.assert_close(E_z, mean[:, agent.unit])
    torch.testing.assert_close(E_z.square() * variance.exp(), square[:, agent.unit])
    h = args.samples_per_task / args.beta * agent.h_sum / agent.h_count
    mu = agent.mu.detach()

    def cost(q_a, q_b):
        mean, square = (x[:, agent.unit] for x in moments(q_a, q_b))
        v = Normal(mu / mean, agent.sigma)
        kl = kl_divergence(v, Normal(torch.zeros_like(mean), args.sigma_prior))
        phi = square * (v.mean.square() + agent.sigma.square()) - mu.square()
        return agent.by_unit(0.5 * h * phi + kl) + scales_kl(q_a, q_b)

    best, free = cost(q_a, q_b), torch.maximum(q_a[1], q_b[1]) < 3  # 10^(1/2) is the most
    assert free.float().mean() > 0.9
    for i, j in np.ndindex(2, 2):
        for step in (-0.03, 0.03):
            q = [[x.clone() for x in q_a], [x.clone() for x in q_b]]
            q[i][j] += step
            assert (cost(*q) > best)[free].all()
    norm = mu.abs()
    assert E_z[norm < 1e-3].median() < 0.6 * E_z[norm > 0.3].median()


def test_mu_is_the_mean_of_the_residuals_and_their_variance_is_that_of_a_product():
    agent, _ = learned_horseshoe()
    draws, rng, few = 15_000, torch.Generator().manual_seed(0), 30  # weights, because it is slow
    noise = torch.zeros(draws, TASKS, agent.mu.shape[1] + agent.scales.shape[2]).double()
    for part in (noise[..., :few], noise[..., agent.mu.shape[1] :]):
        part.copy_(torch.randn(part.shape, generator=rng))
    torch.testing.assert_close(agent.weights() - agent.theta, agent.mu)
    phi = (agent.weights(noise) - agent.theta)[..., :few].detach()
    E_z, variance = (x[:, :few] for x in agent.z())
    mu, sigma = agent.mu.detach()[:, :few], agent.sigma[:, :few]
    expected = E_z.square() * variance.exp() * ((mu / E_z).square() + sigma.square()) - mu.square()
    error = (phi.mean(0) - mu) / expected.sqrt()
    torch.testing.assert_close(error, torch.zeros_like(mu), rtol=0, atol=0.05)
    torch.testing.assert_close(phi.var(0), expected, rtol=0.2, atol=0)


def test_horseshoe_gradients_and_sigma_are_those_of_the_objective(monkeypatch):
    agent, args = learned_horseshoe()
    args.beta, args.max_grad_norm, rows, learn = 0.7, 1e9, [], horseshoe.learn_sigma
    monkeypatch.setattr(horseshoe, "learn_sigma", lambda agent, G, args: rows.append(G.clone()))
    batch, draws = probes.random_batch(horseshoe, agent, 20), probes.draws(agent)
    W = agent.weights(*draws).detach().requires_grad_()
    losses, _ = probes.losses_task_by_task(agent, W, batch, args)
    (G,) = torch.autograd.grad(losses.sum(), W)
    mean, square = (x[:, agent.unit] for x in moments(*posteriors(agent)))
    weight, h = args.beta / args.samples_per_task, agent.h_sum / agent.h_count

    def kl(sigma):  # of v
        return kl_divergence(Normal(agent.mu / mean, sigma), Normal(torch.zeros_like(mean), args.sigma_prior))

    # G is at a draw: what is missing is the variance of z mu / E z, at the curvature h
    missing = 0.5 * h * (square / mean.square() - 1) * agent.mu.square() + weight * kl(agent.sigma)
    expected = G + torch.autograd.grad(missing.sum(), agent.mu)[0]
    grads, _ = gradients(horseshoe, agent, batch, *draws, args)
    torch.testing.assert_close(rows, [G])
    torch.testing.assert_close(grads, {"theta": G.sum(0), "mu": expected})
    learn(agent, torch.zeros_like(agent.mu), args)
    sigma = agent.sigma.clone().requires_grad_()
    loss = 0.5 * agent.h_sum / agent.h_count * square * sigma.square() + weight * kl(sigma)
    (slope,) = torch.autograd.grad(loss.sum(), sigma)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_an_update_learns_the_scales_and_units_that_are_off_are_logged():
    agent, args = make_agent(horseshoe), probes.settings(horseshoe, num_minibatches=3)
    start, batch = agent.scales.clone(), probes.random_batch(horseshoe, agent, 18)
    update(horseshoe, agent, args, batch)
    assert not torch.allclose(agent.scales, start)
    once = agent.scales.clone()
    horseshoe.learn_scales(agent, args)
    torch.testing.assert_close(agent.scales, once, rtol=0, atol=0.1)
    off = torch.rand(TASKS, agent.scales.shape[2], generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():  # those whose noise is larger than their mean
        E_z, variance = agent.z()
        agent.mu.copy_(E_z * (variance / 2).exp() * agent.sigma * torch.where(off, 0.9, 1.1)[:, agent.unit])
    metrics = logged(horseshoe, agent, args, None)
    for name, x in agent.unpack(off[:, agent.unit].double()).items():
        if name.endswith("bias"):
            expected = x.mean(1).tolist()
            assert metrics[f"varshare/off/{name.removesuffix('.bias')}"][1:] == pytest.approx(expected)


@pytest.mark.learns
def test_units_are_off_on_identical_tasks_and_on_different_tasks_some_are_not():
    """If what all residuals have in common is in theta."""
    size = {"num_steps": 128, "eval_episodes": 1, "total_timesteps": 307_200, "hidden_sizes": (64, 64)}
    shares = {}
    for env_id in ("cartpole-goals-physics10", "cartpole-identical10"):
        changes = {"norm_value": True, "beta": 0.03, "reptile_alpha": 1.0}
        folder = probes.run(horseshoe, env_id, env_id=env_id, **changes, **size)
        log = pd.read_csv(folder / "heartbeat.csv").query("metric.str.startswith('varshare/off/')")
        last = log[log.global_step == log.global_step.max()]
        shares[env_id] = last.pivot(index="metric", columns="task", values="value").drop(columns="mean")
    different, identical = shares.values()
    assert identical.to_numpy().min() > 0.9
    first = different.loc["varshare/off/actor.0"]
    assert first.max() < 0.95 and first.max() - first.min() > 0.1


# Learned prior


@pytest.mark.parametrize("per", ["layer", "weight"])
def test_the_prior_that_is_approached_has_the_smallest_kl(per):
    agent = make_agent(learned_prior)
    with torch.no_grad():
        agent.mu -= agent.mu.mean(0)
    start = agent.sigma_prior.clone()

    def learn(decay=0.0, bounds=(1e-9, 1e9)):
        args = probes.settings(learned_prior, prior_per=per, prior_decay=decay, prior_bounds=bounds)
        agent.sigma_prior = start.clone()
        learned_prior.learn_prior(agent, args)
        return agent.sigma_prior.clone()

    def kl(sigma_prior):
        q = Normal(agent.mu.detach(), agent.sigma)
        return kl_divergence(q, Normal(torch.zeros_like(agent.mu), sigma_prior)).sum()

    best = learn()
    ours = learned_prior.gaussian_kl(agent.mu.detach(), agent.sigma, best).sum()
    torch.testing.assert_close(ours, kl(best))
    rng, parts = torch.Generator().manual_seed(0), agent.unpack(best.unsqueeze(0))
    assert all((x == x.flatten()[0]).all() for x in parts.values()) == (per == "layer")
    for _ in range(20):  # other priors of the same form
        if per == "layer":
            change = torch.cat([torch.randn(1, generator=rng).expand(x.numel()) for x in parts.values()])
        else:
            change = torch.randn(len(best), generator=rng)
        assert kl(best * (0.01 * change).exp()) > kl(best)
    torch.testing.assert_close(learn(decay=0.5), ((start**2 + best**2) / 2).sqrt())  # half way in the square
    low, high = best.quantile(0.3).item(), best.quantile(0.7).item()
    torch.testing.assert_close(learn(bounds=(low, high)), best.clamp(low, high))


def test_the_prior_does_not_depend_on_the_gauge_and_of_a_single_task_does_not_vanish():
    agent, seen = make_agent(learned_prior), {}
    for freeze_theta in (False, True):
        changes = {"prior_decay": 0.0, "prior_bounds": (1e-9, 1e9), "freeze_theta": freeze_theta}
        for shift in (0.0, 0.2):
            with torch.no_grad():
                agent.mu += shift
            learned_prior.learn_prior(agent, probes.settings(learned_prior, **changes))
            seen[freeze_theta, shift] = agent.sigma_prior.clone()
            with torch.no_grad():
                agent.mu -= shift
    torch.testing.assert_close(seen[False, 0.0], seen[False, 0.2])
    assert not torch.allclose(seen[True, 0.0], seen[True, 0.2])  # because theta cannot take it
    args = probes.settings(learned_prior, prior_decay=0.0, prior_per="weight", prior_bounds=(1e-9, 1e9))
    agent = learned_prior.Agent(probes.spaces(num_tasks=1), args, torch.Generator().manual_seed(0))
    with torch.no_grad():
        agent.mu.fill_(0.3)
    learned_prior.learn_prior(agent, args)
    torch.testing.assert_close(agent.sigma_prior, (0.3**2 + agent.sigma[0] ** 2).sqrt())


def test_weights_with_a_wide_prior_are_pulled_less():
    agent, trunk, args, theirs, batch = pair(learned_prior)
    args.max_grad_norm = theirs.max_grad_norm = 1e9
    sigma, draws = trunk.sigma.clone(), probes.draws(trunk)
    agent.sigma_prior.fill_(theirs.sigma_prior)
    ours = gradients(learned_prior, agent, batch, *draws, args)
    expected = gradients(varshare, trunk, batch, *draws, theirs)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(agent.sigma, trunk.sigma)
    agent.sigma, agent.sigma_prior[::2] = sigma, 2 * theirs.sigma_prior
    moved, _ = gradients(learned_prior, agent, batch, *draws, args)
    pull = theirs.beta / theirs.samples_per_task / theirs.sigma_prior**2 * trunk.mu.detach()
    difference = expected[0]["mu"] - moved["mu"]
    torch.testing.assert_close(difference[:, ::2], 0.75 * pull[:, ::2])
    torch.testing.assert_close(difference[:, 1::2], torch.zeros_like(pull[:, 1::2]))
    args.prior_bounds, args.prior_decay = (1e-9, 1e9), 1.0  # with which an update leaves it
    prior = agent.sigma_prior.clone()
    update(learned_prior, agent, args, batch)
    torch.testing.assert_close(agent.sigma_prior, prior)
    args.prior_decay = 0.9
    update(learned_prior, agent, args, batch)
    assert not torch.allclose(agent.sigma_prior, prior)


# LoRA


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


def residuals(agent, own):
    """theta's residuals (task, weight) with the products of the factors `own` (task, factor) formed."""
    W, parts = split(own, agent.factors), []
    for name in agent.shapes:
        layer = name.removesuffix(".weight")
        x = W[name] if layer == name else W[f"{layer}.B"] @ W[f"{layer}.A"]
        parts.append(x.flatten(1))
    return torch.cat(parts, 1)


@probes.BOTH
def test_low_rank_gradients_are_autograds_of_the_objective_with_full_matrices(monkeypatch, space):
    agent, rows = make_agent(lora, space, rank=2), []
    args = probes.settings(lora, beta=0.7, max_grad_norm=1e9, rank=2)
    batch, [noise] = probes.random_batch(lora, agent, 20), probes.draws(agent)
    own = agent.mu + agent.sigma * noise
    weights = agent.theta + residuals(agent, own)
    losses, expected_stats = probes.losses_task_by_task(agent, weights, batch, args)
    prior = Normal(torch.zeros_like(agent.mu), args.factor_prior)
    kl = kl_divergence(Normal(agent.mu, agent.sigma), prior)
    total = losses.sum() + args.beta / args.samples_per_task * kl.sum()
    theta, mu = torch.autograd.grad(total, (agent.theta, agent.mu), retain_graph=True)
    (G,) = torch.autograd.grad(losses.sum(), own)
    monkeypatch.setattr(lora, "learn_sigma", lambda agent, G, args: rows.append(G.clone()))
    grads, stats = gradients(lora, agent, batch, noise, args)
    torch.testing.assert_close(grads, {"theta": theta, "mu": mu})
    torch.testing.assert_close(stats, expected_stats, check_dtype=False)
    torch.testing.assert_close(rows, [G])
    agent.theta.requires_grad_(False)
    frozen, _ = gradients(lora, agent, batch, noise, args)
    torch.testing.assert_close(frozen, {"mu": mu})
    assert agent.factors["actor.1.A"] == (2, probes.HIDDEN[0]) and agent.factors["critic.2.B"] == (1, 1)
    # what is logged is that of their products
    names = split(residuals(agent, agent.mu.detach()), agent.shapes)
    theta = split(agent.theta.detach().unsqueeze(0), agent.shapes)
    metrics = logged(lora, agent, args, 0.9 * agent.theta.detach())
    for name, (tasks, overall) in sharing(theta, names, 0.9 * agent.theta.detach()).items():
        own = [] if tasks is None else tasks.tolist()
        assert metrics[name] == pytest.approx([overall, *own])


def test_no_matrix_of_every_task_is_ever_formed():
    """Neither in an update, nor to act or to log; the most is what a hidden layer hands on."""
    size, tasks, samples = 256, 100, 6
    args = lora.Args(hidden_sizes=(size, size), rank=2, num_steps=samples, envs_per_task=1, num_minibatches=1)
    agent = lora.Agent(probes.spaces(num_tasks=tasks), args, torch.Generator().manual_seed(0))
    obs, zeros = torch.randn(tasks, samples, probes.OBS), torch.zeros(tasks, samples)
    batch = lora.Batch(obs, zeros.long(), zeros, zeros, zeros)
    with LargestTensor() as largest:
        update(lora, agent, args, batch)
        agent.policy(agent.unpack(agent.weights()), obs)
        logged(lora, agent, args, agent.theta.detach().clone())
    assert agent.mu.numel() <= largest.most < tasks * size**2 / 5


def test_b_starts_at_0_and_a_does_not_so_that_the_network_is_theta_and_both_learn():
    args = probes.settings(lora)
    agent = lora.Agent(probes.spaces(), args, torch.Generator().manual_seed(1))
    for name, x in split(agent.mu, agent.factors).items():
        std = args.factor_prior
        assert (0.5 * std < x.std() < 2 * std) if name.endswith(".A") else not x.any()
    trunk = varshare.Agent(probes.spaces(), probes.settings(varshare), torch.Generator().manual_seed(1))
    torch.testing.assert_close(agent.theta, trunk.theta)
    saved = probes.load(probes.run(lora, total_timesteps=5_120, learning_rate=0.01))["agent"]["mu"]
    suite, args = envs.make("cartpole10", 1), lora.Args(hidden_sizes=(16,))
    fresh = lora.Agent(suite, args, torch.Generator().manual_seed(1))
    for name, x in split(saved - fresh.mu.detach(), fresh.factors).items():
        assert x.abs().max() > 1e-4, name
    for rank in (1, 4):  # the prior of a residual has the width that is asked for
        args = lora.Args(sigma_prior=0.02, rank=rank)
        A, B = args.factor_prior * torch.randn(2, 200, rank, 200, generator=torch.Generator().manual_seed(0))
        assert (B.mT @ A).std().item() == pytest.approx(0.02, rel=0.02)


# Reptile


def test_a_turn_is_varshares_update_of_a_single_task():
    """With theta as the turns before have left it; mu and moments of other tasks do not move."""
    agent, trunk, args, theirs, batch = pair(reptile)
    args.reptile_alpha = theirs.reptile_alpha = 0.3
    ones = [agent_of_task(agent, m) for m in range(TASKS)]
    optimizer = torch.optim.Adam([agent.theta, *(one.mu for one in ones)], lr=0.01)
    before = agent.weights().detach()
    rng = torch.Generator().manual_seed(0)
    stats = reptile.take_turns(agent, ones, optimizer, batch, reptile.minibatch_backward, args, rng)

    rng = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(trunk.theta.detach().clone())
    mus = [torch.nn.Parameter(x.clone()) for x in trunk.mu.detach()]
    adam = torch.optim.Adam([theta, *mus], lr=0.01)
    sigma, moves = trunk.sigma.clone(), torch.zeros_like(before)
    N, B = args.samples_per_task, args.samples_per_task // args.num_minibatches
    for m in torch.randperm(TASKS, generator=rng).tolist():
        start, squares, weight = theta.detach().clone(), trunk.h_sum[m].clone(), trunk.h_count[m].item()
        for _ in range(args.update_epochs):
            for inds in torch.randperm(N, generator=rng).chunk(args.num_minibatches):
                noise = torch.randn(1, len(theta), generator=rng).double()
                mb = varshare.Batch(*(x[m : m + 1, inds] for x in batch))
                W = trunk.unpack(theta + mus[m] + sigma[m] * noise)
                loss = varshare.ppo_loss(trunk, W, mb, args)[0].sum()
                G = torch.autograd.grad(loss, [theta, mus[m]])[0]
                pull = args.beta / N / args.sigma_prior**2 * mus[m].detach()
                clip = min(1, args.max_grad_norm / (torch.cat((G, G + pull)).norm().item() + 1e-6))
                adam.zero_grad()
                theta.grad, mus[m].grad = clip * G, clip * (G + pull)
                adam.step()
                h = B / max(1 - (1 - args.beta) * B / N, 0.5) * G.square()
                squares, weight = args.sigma_decay * squares + h, args.sigma_decay * weight + 1
                sigma[m] = (N / args.beta * squares / weight + 1 / args.sigma_prior**2).rsqrt()
        with torch.no_grad():
            theta += 0.3 * mus[m]
            mus[m] *= 0.7
        moves[m] = theta.detach() - start
    torch.testing.assert_close(agent.theta.detach(), theta.detach())
    torch.testing.assert_close(agent.mu.detach(), torch.stack(mus).detach())
    torch.testing.assert_close(agent.sigma, sigma)

    others = moves.sum(0) - moves
    assert others.norm(dim=1).min() > 0.01
    torch.testing.assert_close(stats["varshare/moved_by_others"], others.norm(dim=1))
    own = agent.weights().detach() - before - others
    torch.testing.assert_close(stats["varshare/moved_by_itself"], own.norm(dim=1))
    assert (stats["varshare/approx_kl_by_others"] > 0).all()
    assert stats["losses/policy_loss"].shape == (TASKS,)


def test_a_turns_recentring_keeps_its_own_weights_and_moves_all_others():
    agent = make_agent(reptile)
    before, mu = agent.weights().detach(), agent.mu.detach().clone()
    reptile.recentre(agent_of_task(agent, 1), 0.3)
    moved = agent.weights().detach() - before
    torch.testing.assert_close(moved[1], torch.zeros_like(moved[1]))
    for m in (0, 2):
        torch.testing.assert_close(moved[m], 0.3 * mu[1])
        assert torch.equal(agent.mu[m], mu[m])
    torch.testing.assert_close(agent.mu[1].detach(), 0.7 * mu[1])


# Trust region


def test_posteriors_are_pulled_back_to_the_boundary():
    agent, rng = make_agent(trust_region), torch.Generator().manual_seed(0)
    mu, sigma = agent.mu.detach().clone(), agent.sigma.clone()
    scale = torch.tensor([[0.0], [0.01], [1.0]]).double()  # one stays, one moves little, one far
    with torch.no_grad():
        agent.mu += scale * torch.randn(mu.shape, generator=rng)
        agent.sigma *= (scale * torch.randn(mu.shape, generator=rng)).exp()
    new_mu, new_sigma = agent.mu.detach().clone(), agent.sigma.clone()

    def kl(mean, std):
        return kl_divergence(Normal(mean, std), Normal(mu, sigma)).sum(1)

    delta = torch.full((TASKS, 1), 10.0).double()
    moved = kl(new_mu, new_sigma)
    assert moved[0] == 0 and moved[1] < 5 < 100 < moved[2]
    stats = trust_region.pull_back(agent, mu, sigma, delta)
    torch.testing.assert_close(stats["varshare/posterior_kl"], moved)
    assert torch.equal(agent.mu[:2], new_mu[:2]) and torch.equal(agent.sigma[:2], new_sigma[:2])
    assert 4.9 < kl(mu, agent.sigma)[2] <= 5  # a half at most, to 12 binary places of the way
    assert kl(agent.mu.detach(), agent.sigma)[2].item() == pytest.approx(10)
    for old, new, now in ((mu, new_mu, agent.mu), (sigma.log(), new_sigma.log(), agent.sigma.log())):
        share = ((now - old) / (new - old))[2].detach()  # on a straight line
        torch.testing.assert_close(share, share[:1].expand_as(share))
        assert 0 < share[0] < 1
    # a mu that moves alone may take all of it
    with torch.no_grad():
        agent.mu.copy_(new_mu)
        agent.sigma.copy_(sigma)
    trust_region.pull_back(agent, mu, sigma, delta)
    assert kl(agent.mu.detach(), agent.sigma)[2].item() == pytest.approx(10)


def test_an_update_keeps_within_delta_and_without_a_limit_is_varshares(monkeypatch):
    agent, trunk, args, theirs, batch = pair(trust_region)
    agent.h_count.fill_(1)
    trunk.h_count.fill_(1)
    start = {name: x.clone() for name, x in trunk.state_dict().items()}
    args.delta = 1e9
    update(trust_region, agent, args, batch)
    update(varshare, trunk, theirs, batch)
    assert all(torch.equal(agent.state_dict()[name], x) for name, x in trunk.state_dict().items())
    agent.load_state_dict(start, strict=False)
    args.delta, seen, pull_back = 1.0, [], trust_region.pull_back

    def watched(agent, mu, sigma, delta):
        stats = pull_back(agent, mu, sigma, delta)
        q, before = Normal(agent.mu.detach(), agent.sigma), Normal(start["mu"], start["sigma"])
        seen.append(kl_divergence(q, before).sum(1))
        return stats

    monkeypatch.setattr(trust_region, "pull_back", watched)
    stats = update(trust_region, agent, args, batch, torch.optim.Adam(agent.parameters(), lr=0.3))
    assert (stats["varshare/posterior_kl"] > 1).all() and stats["varshare/share_mu"].shape == (TASKS,)
    torch.testing.assert_close(torch.stack(seen), torch.ones(6, TASKS).double())  # in every minibatch
    agent.load_state_dict(start, strict=False)
    agent.h_count[0] = 0  # a task that has learned nothing yet is not limited
    seen.clear()
    update(trust_region, agent, args, batch)
    assert (seen[-1][0] > 1) and (seen[-1][1:] < 1 + 1e-9).all()
