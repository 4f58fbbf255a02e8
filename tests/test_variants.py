"""VarShare's variants with PPO: the formula that is new in each."""

import math
import signal

import numpy as np
import pandas as pd
import probes
import pytest
import torch
from probes import TASKS
from torch.distributions import Gamma, HalfCauchy, InverseGamma, LogNormal, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import envs
from envs.runs import Run

varshare = probes.load_script("varshare_ppo.py")
annealed, horseshoe, learned_prior, lora, reptile, trust_region = (
    probes.load_script(f"variants/varshare_{name}_ppo.py")
    for name in ("annealed", "horseshoe", "learned_prior", "lora", "reptile", "trust_region")
)

pytestmark = pytest.mark.usefixtures("elsewhere")


def update(script, agent, args, batch, optimizer=None):
    """An update phase of the trunk's form, with SGD and always the same draws."""
    optimizer = optimizer or torch.optim.SGD(agent.parameters(), lr=0.01)
    rng = torch.Generator().manual_seed(0)
    return script.update(agent, optimizer, batch, script.minibatch_gradients, args, rng)


def pair(script, **changes):
    """Agents of the script and of the trunk with the same weights, and settings and a batch for both."""
    agents = [probes.make_agent(x, **changes) for x in (script, varshare)]
    agents[0].load_state_dict(agents[1].state_dict(), strict=False)
    args = [probes.settings(x, num_minibatches=3, update_epochs=2) for x in (script, varshare)]
    return *agents, *args, probes.random_batch(varshare, agents[1], 18)


def logged_by(function, *args, **settings):
    """What a function that takes a run logs: name -> (mean, tasks'...)."""
    run, logged = Run.__new__(Run), {}
    run.args, run.theta_start = varshare.Args(**settings), args[0].theta.detach() * 0.9
    run.log = lambda name, x, per_task=(): logged.update({name: [x, *per_task]})
    function(run, *args)
    return logged


# Annealed


def test_schedule_is_geometric_held_and_geometric_again():
    args = annealed.Args(warmup=0.2, hold=0.4)
    at = [annealed.schedule(x, 1e-2, 100.0, args) for x in (0, 0.1, 0.2, 0.3, 0.6, 0.8, 1)]
    assert at == pytest.approx([1e-2, 1e-1, 1, 1, 1, 10, 100])
    assert annealed.schedule(0, 0.5, 2.0, annealed.Args(warmup=0, hold=1)) == pytest.approx(1)
    assert annealed.schedule(0.5, 0.5, 4.0, annealed.Args(warmup=1, hold=0)) == pytest.approx(0.5**0.5)


def test_annealed_follows_todays_beta_and_prior():
    agent, trunk, _, _, batch = pair(annealed)
    schedule = {"beta": 0.03, "beta_start": 10.0, "beta_end": 20.0}
    schedule |= {"sigma_prior": 0.2, "sigma_prior_start": 0.5, "sigma_prior_end": 2.0}
    args = probes.settings(annealed, **schedule)
    for progress, beta, prior in ((0.0, 0.3, 0.1), (0.5, 0.03, 0.2), (1.0, 0.6, 0.4)):
        theirs = probes.settings(varshare, beta=beta, sigma_prior=prior)
        annealed.anneal(agent, progress, args)
        draws = probes.draws(trunk)
        ours = annealed.minibatch_gradients(agent, batch, *draws, args)
        expected = varshare.minibatch_gradients(trunk, batch, *draws, theirs)
        torch.testing.assert_close(ours, expected)
        for script, one, settings in ((annealed, agent, args), (varshare, trunk, theirs)):
            one.h_sum.zero_()
            one.h_count.zero_()
            script.learn_sigma(one, expected[1], settings)
        torch.testing.assert_close(agent.sigma, trunk.sigma)
        kl = annealed.gaussian_kl(agent.mu, agent.sigma, agent.sigma_prior)
        torch.testing.assert_close(kl, varshare.gaussian_kl(trunk.mu, trunk.sigma, prior))


def test_a_constant_schedule_is_varshare():
    changes = {"total_timesteps": 7_680}
    folders = [
        probes.run(annealed, "constant", beta_start=1.0, **changes),
        probes.run(varshare, "trunk", **changes),
    ]
    for key in ("theta", "mu", "sigma"):
        ours, expected = (probes.load(folder)["agent"][key] for folder in folders)
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=1e-3)


# Horseshoe


def random_horseshoe():
    """An agent with scales that all are different, and gradients seen."""
    agent, rng = probes.make_agent(horseshoe, probes.BOX), torch.Generator().manual_seed(0)
    agent.scales[:, 0].normal_(generator=rng)
    agent.scales[:, 1].uniform_(0.2, 0.9, generator=rng)
    agent.h_sum.copy_(1e-3 * torch.rand(agent.mu.shape, generator=rng).double() ** 4)
    agent.h_count.fill_(1)
    return agent


def expectation(function, mean, std, nodes=60):
    """E of a function of N(mean, std^2), by Gauss' quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(nodes)
    x = torch.from_numpy(x).view(-1, *[1] * mean.ndim)
    weights = torch.from_numpy(weights / weights.sum()).view_as(x)
    return (weights * function(mean + std * x)).sum(0)


def test_the_priors_of_a_and_b_make_z_half_cauchy():
    torch.manual_seed(0)
    z = (Gamma(0.5, 1.0).sample((200_000,)) * InverseGamma(0.5, 1.0).sample((200_000,))).sqrt()
    share = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95])
    torch.testing.assert_close(z.quantile(share), HalfCauchy(1.0).icdf(share), rtol=0.05, atol=0)


def test_kl_of_the_scales_is_that_of_log_normals():
    scales = random_horseshoe().scales
    total = 0
    for i, prior in enumerate((Gamma(0.5, 1.0), InverseGamma(0.5, 1.0))):
        mean, std = scales[:, 0, i], scales[:, 1, i]
        q = LogNormal(mean, std)
        total += expectation(lambda x, q=q, p=prior: q.log_prob(x.exp()) - p.log_prob(x.exp()), mean, std)
    torch.testing.assert_close(horseshoe.horseshoe_kl(scales), total, rtol=1e-4, atol=1e-5)


def test_a_unit_is_what_one_output_depends_on():
    agent = random_horseshoe()
    numbers = agent.unpack(agent.unit.unsqueeze(0))
    assert len(set(agent.unit.tolist())) == agent.scales.shape[3] == 2 * sum(probes.HIDDEN) + 3 + 2
    for name, x in numbers.items():
        if name.endswith(".weight"):
            bias = numbers[name.replace("weight", "bias")]
            assert torch.equal(x, bias.unsqueeze(2).expand_as(x))


def test_mu_is_the_mean_of_the_residuals_and_their_variance_is_that_of_a_product():
    agent, draws = random_horseshoe(), 40_000
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(draws, TASKS, 30 + agent.scales.shape[3], generator=rng).double()
    full = torch.zeros(
        draws, TASKS, len(agent.unit) - 30
    ).double()  # of the first weights only, as it is slow
    noise = torch.cat((noise[..., :30], full, noise[..., 30:]), 2)
    phi = (agent.weights(noise) - agent.theta)[..., :30].detach()
    torch.testing.assert_close(agent.weights() - agent.theta, agent.mu)
    log_z = (
        agent.scales[:, 0].mean(1),
        (agent.scales[:, 1].square().sum(1) / 4).sqrt(),
    )  # log z = log(a b) / 2
    mean, square = (expectation(lambda x, n=n: (n * x).exp(), *log_z)[:, agent.unit[:30]] for n in (1, 2))
    mu, sigma = agent.mu.detach()[:, :30], agent.sigma[:, :30]
    variance = square * (mu.square() / mean.square() + sigma.square()) - mu.square()
    torch.testing.assert_close((phi.mean(0) - mu) / variance.sqrt(), torch.zeros_like(mu), rtol=0, atol=0.03)
    torch.testing.assert_close(phi.var(0), variance, rtol=0.15, atol=0)


def test_horseshoe_gradients_and_sigma_are_those_of_the_objective():
    agent, args = random_horseshoe(), probes.settings(horseshoe, beta=0.7)
    mean = agent.z()[0]
    torch.testing.assert_close(
        mean,
        expectation(torch.exp, agent.scales[:, 0].mean(1), agent.scales[:, 1].norm(dim=1) / 2)[:, agent.unit],
    )

    def kl(sigma):  # of v
        q = Normal(agent.mu / mean, sigma)
        return kl_divergence(q, Normal(torch.zeros_like(mean), args.sigma_prior))

    weight = args.beta / args.samples_per_task
    h = agent.h_sum / agent.h_count
    square = expectation(
        lambda x: (2 * x).exp(), agent.scales[:, 0].mean(1), agent.scales[:, 1].norm(dim=1) / 2
    )
    square = square[:, agent.unit]
    loss = 0.5 * h * square * ((agent.mu / mean).square() + agent.sigma.square())  # of the mean of phi^2
    (expected,) = torch.autograd.grad((loss + weight * kl(agent.sigma)).sum(), agent.mu)
    G = h * agent.mu.detach()  # the loss' mean gradient by the weights
    grads = horseshoe.parameter_gradients(agent, G, args)
    torch.testing.assert_close(grads["mu"], expected)
    torch.testing.assert_close(grads["theta"], G.sum(0))
    horseshoe.learn_sigma(agent, torch.zeros_like(agent.mu), args)
    sigma = agent.sigma.clone().requires_grad_()
    h = agent.h_sum / agent.h_count
    loss = 0.5 * h * square * sigma.square() + weight * kl(sigma)
    (slope,) = torch.autograd.grad(loss.sum(), sigma)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_scales_are_the_best_for_their_units():
    """Small steps of any of the four raise loss and KL; units without a residual have small ones."""
    agent, args = random_horseshoe(), probes.settings(horseshoe, beta=0.001)
    with torch.no_grad():
        agent.mu *= 10.0 ** torch.linspace(-3, 0, agent.scales.shape[3])[agent.unit]
    for _ in range(5):
        horseshoe.learn_scales(agent, args)
    h = args.samples_per_task / args.beta * agent.h_sum / agent.h_count

    def cost(scales):
        log_z = scales[:, 0].mean(1), scales[:, 1].norm(dim=1) / 2
        mean, square = (expectation(lambda x, n=n: (n * x).exp(), *log_z)[:, agent.unit] for n in (1, 2))
        v = Normal(agent.mu.detach() / mean, agent.sigma)
        kl = kl_divergence(v, Normal(torch.zeros_like(mean), args.sigma_prior))
        variance = square * (v.mean.square() + agent.sigma.square()) - agent.mu.detach().square()
        of_unit = torch.zeros_like(scales[:, 0, 0]).index_add_(1, agent.unit, 0.5 * h * variance + kl)
        return of_unit + horseshoe.horseshoe_kl(scales)

    best, free = cost(agent.scales), agent.scales[:, 1].amax(1) < 3  # 10^(1/2) is the most
    assert free.float().mean() > 0.9
    for i in range(2):
        for j in range(2):
            for step in (-0.02, 0.02):
                other = agent.scales.clone()
                other[:, i, j] += step
                assert (cost(other) > best)[free].all()
    z, norm = agent.z()[0].clone(), agent.mu.abs()
    assert z[norm < 1e-3].median() < 0.6 * z[norm > 0.3].median()


def test_an_update_ends_with_the_best_scales():
    agent, args = probes.make_agent(horseshoe), probes.settings(horseshoe, num_minibatches=3)
    update(horseshoe, agent, args, probes.random_batch(varshare, agent, 18))
    assert not torch.equal(agent.scales, torch.full_like(agent.scales, 0.1))
    for _ in range(10):
        horseshoe.learn_scales(agent, args)
    best = agent.z()[0].clone()
    agent.scales.fill_(0.1)
    update(
        horseshoe, agent, args, probes.random_batch(varshare, agent, 18), torch.optim.SGD([agent.mu], lr=0.0)
    )
    torch.testing.assert_close(agent.z()[0].log(), best.log(), rtol=0, atol=0.3)


def test_units_that_are_off_are_those_whose_noise_is_larger_than_their_mean():
    agent = random_horseshoe()
    off = torch.rand(TASKS, agent.scales.shape[3], generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        mean, std = agent.z()
        spread = mean * (std.square() / 2).exp() * agent.sigma
        agent.mu.copy_(spread * torch.where(off, 0.9, 1.1)[:, agent.unit])
    logged = logged_by(horseshoe.log_method, agent, probes.settings(horseshoe))
    for name, x in agent.unpack(off[:, agent.unit].double()).items():
        if not name.endswith("weight"):
            assert logged[f"varshare/off/{name.removesuffix('.bias')}"][1:] == pytest.approx(
                x.mean(1).tolist()
            )


@pytest.mark.learns
def test_units_are_off_on_identical_tasks_and_on_different_tasks_some_are_not():
    """Where what all residuals have in common is in theta."""
    size = {"num_steps": 128, "eval_episodes": 1, "checkpoint_interval": 1e9, "total_timesteps": 307_200}
    shares = {}
    for env_id in ("cartpole-goals-physics10", "cartpole-identical10"):
        folder = probes.run(
            horseshoe, env_id, env_id=env_id, norm_value=True, beta=0.03, reptile_alpha=1.0, **size
        )
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
    agent = probes.make_agent(learned_prior)
    args = probes.settings(learned_prior, prior_per=per, prior_decay=0.0, prior_bounds=(1e-9, 1e9))
    with torch.no_grad():
        agent.mu -= agent.mu.mean(0)
    start = agent.sigma_prior.clone()
    learned_prior.learn_prior(agent, args)
    best, size = agent.sigma_prior.clone(), len(agent.sigma_prior)

    def kl(sigma_prior):
        q = Normal(agent.mu.detach(), agent.sigma)
        return kl_divergence(q, Normal(torch.zeros_like(agent.mu), sigma_prior)).sum()

    torch.testing.assert_close(
        learned_prior.gaussian_kl(agent.mu.detach(), agent.sigma, best).sum(), kl(best)
    )
    rng, parts = torch.Generator().manual_seed(0), agent.unpack(best.unsqueeze(0))
    assert all((x == x.flatten()[0]).all() for x in parts.values()) == (per == "layer")
    for _ in range(20):  # other priors of the same form
        if per == "layer":
            change = torch.cat([torch.randn(1, generator=rng).expand(x.numel()) for x in parts.values()])
        else:
            change = torch.randn(size, generator=rng)
        assert kl(best * (0.01 * change).exp()) > kl(best)
    # half way in the square, within bounds
    agent.sigma_prior.copy_(start)
    learned_prior.learn_prior(
        agent, probes.settings(learned_prior, prior_per=per, prior_decay=0.5, prior_bounds=(1e-9, 1e9))
    )
    torch.testing.assert_close(agent.sigma_prior, ((start**2 + best**2) / 2).sqrt())
    low, high = best.quantile(0.3).item(), best.quantile(0.7).item()
    agent.sigma_prior.copy_(start)
    learned_prior.learn_prior(
        agent, probes.settings(learned_prior, prior_per=per, prior_decay=0.0, prior_bounds=(low, high))
    )
    torch.testing.assert_close(agent.sigma_prior, best.clamp(low, high))


def test_the_prior_does_not_depend_on_the_gauge():
    agent = probes.make_agent(learned_prior)
    seen = {}
    for freeze_theta in (False, True):
        changes = {"prior_decay": 0.0, "prior_bounds": (1e-9, 1e9), "freeze_theta": freeze_theta}
        args = probes.settings(learned_prior, **changes)
        for shift in (0.0, 0.2):
            with torch.no_grad():
                agent.mu += shift
            learned_prior.learn_prior(agent, args)
            seen[freeze_theta, shift] = agent.sigma_prior.clone()
            with torch.no_grad():
                agent.mu -= shift
    torch.testing.assert_close(seen[False, 0.0], seen[False, 0.2])
    assert not torch.allclose(seen[True, 0.0], seen[True, 0.2])  # where theta cannot take it


def test_the_prior_of_a_single_task_does_not_vanish():
    spaces = probes.spaces()
    spaces.num_tasks = 1
    args = probes.settings(learned_prior, prior_decay=0.0, prior_per="weight", prior_bounds=(1e-9, 1e9))
    agent = learned_prior.Agent(spaces, args, torch.Generator().manual_seed(0))
    with torch.no_grad():
        agent.mu.fill_(0.3)
    learned_prior.learn_prior(agent, args)
    torch.testing.assert_close(agent.sigma_prior, (0.3**2 + agent.sigma[0] ** 2).sqrt())


def test_weights_with_a_wide_prior_are_pulled_less():
    agent, trunk, args, theirs, batch = pair(learned_prior)
    agent.sigma_prior.fill_(theirs.sigma_prior)
    draws = probes.draws(trunk)
    ours = learned_prior.minibatch_gradients(agent, batch, *draws, args)
    expected = varshare.minibatch_gradients(trunk, batch, *draws, theirs)
    torch.testing.assert_close(ours, expected)
    agent.sigma_prior[::2] *= 2
    G = torch.zeros_like(agent.mu)
    pull = learned_prior.parameter_gradients(agent, G, args)["mu"].detach()
    before = varshare.parameter_gradients(trunk, G, theirs)["mu"].detach()
    torch.testing.assert_close(pull[:, ::2], before[:, ::2] / 4)
    torch.testing.assert_close(pull[:, 1::2], before[:, 1::2])
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


def full_weights(agent, W):
    """theta + B_m A_m and theta + bias_m by name, (task, ...)."""
    theta = agent.split(agent.theta.unsqueeze(0), agent.shapes)
    full = {}
    for name, x in theta.items():
        layer = name.removesuffix(".weight")
        full[name] = x + (W[f"{layer}.B"] @ W[f"{layer}.A"] if layer != name else 0)
        if layer == name:
            full[name] = W[name]
    return full


@probes.BOTH
def test_low_rank_networks_are_networks_with_theta_plus_b_a(space):
    agent = probes.make_agent(lora, space, rank=2)
    obs = torch.randn(TASKS, 20, probes.OBS, generator=torch.Generator().manual_seed(3)).double()
    W = agent.unpack(agent.weights(*probes.draws(agent)))
    full = full_weights(agent, W)
    biases = {name: x for name, x in agent.split(agent.weights(*probes.draws(agent)), agent.factors).items()}
    for name, x in agent.split(agent.theta.unsqueeze(0), agent.shapes).items():
        if not name.endswith(".weight"):
            torch.testing.assert_close(W[name], x + biases[name])
    for net in ("actor", "critic"):
        torch.testing.assert_close(lora.mlp(obs, W, net), varshare.mlp(obs, full, net))
    assert agent.factors["actor.1.A"] == (2, probes.HIDDEN[0]) and agent.factors["critic.2.B"] == (1, 1)


@probes.BOTH
@pytest.mark.parametrize("freeze_theta", [False, True])
def test_low_rank_gradients_are_autograds_of_the_objective(freeze_theta, space):
    agent = probes.make_agent(lora, space)
    changes = {"freeze_theta": freeze_theta, "beta": 0.7, "max_grad_norm": 1e9}
    args, batch, (noise,) = (
        probes.settings(lora, **changes),
        probes.random_batch(lora, agent, 20),
        probes.draws(agent),
    )
    losses, _ = lora.ppo_loss(agent, agent.unpack(agent.mu + agent.sigma * noise), batch, args)
    prior = Normal(torch.zeros_like(agent.mu), args.factor_prior)
    kl = kl_divergence(Normal(agent.mu, agent.sigma), prior)
    total = losses.sum() + args.beta / args.samples_per_task * kl.sum()
    names = ["mu"] if freeze_theta else ["theta", "mu"]
    expected = dict(zip(names, torch.autograd.grad(total, [getattr(agent, x) for x in names])))
    torch.testing.assert_close(lora.minibatch_gradients(agent, batch, noise, args)[0], expected)


def test_no_matrix_of_every_task_is_ever_formed():
    """Nor in the log; the most is what a hidden layer hands on."""
    size, tasks, samples = 256, 100, 6
    spaces = probes.spaces()
    spaces.num_tasks = tasks
    args = lora.Args(hidden_sizes=(size, size), rank=2, num_steps=samples, envs_per_task=1, num_minibatches=1)
    agent = lora.Agent(spaces, args, torch.Generator().manual_seed(0))
    obs = torch.randn(tasks, samples, probes.OBS)
    zeros = torch.zeros(tasks, samples)
    batch = lora.Batch(obs, zeros.long(), zeros, zeros, zeros, zeros)
    with LargestTensor() as largest:
        update(lora, agent, args, batch)
        agent.policy(agent.unpack(agent.weights()), obs)
        logged_by(lora.log_method, agent, args)
    assert agent.mu.numel() <= largest.most < tasks * size**2 / 5


def test_b_starts_at_0_and_a_does_not_so_that_the_network_is_theta_and_both_learn():
    agent = lora.Agent(probes.spaces(), probes.settings(lora), torch.Generator().manual_seed(1))
    for name, x in agent.split(agent.mu, agent.factors).items():
        std = probes.settings(lora).factor_prior
        assert (0.5 * std < x.std() < 2 * std) if name.endswith(".A") else not x.any()
    trunk = varshare.Agent(probes.spaces(), probes.settings(varshare), torch.Generator().manual_seed(1))
    torch.testing.assert_close(agent.theta, trunk.theta)
    folder = probes.run(lora, total_timesteps=5_120, learning_rate=0.01)
    saved = probes.load(folder)["agent"]["mu"]
    args = lora.Args(env_id="cartpole10")
    fresh = lora.Agent(envs.make("cartpole10", 1), args, torch.Generator().manual_seed(1))
    for name, x in fresh.split(saved - fresh.mu.detach(), fresh.factors).items():
        assert x.abs().max() > 1e-4, name


@pytest.mark.parametrize("rank", [1, 4])
def test_the_prior_of_a_residual_has_the_width_that_is_asked_for_at_every_rank(rank):
    args = lora.Args(sigma_prior=0.02, rank=rank)
    rng = torch.Generator().manual_seed(0)
    A, B = (args.factor_prior * torch.randn(200, rank, 200, generator=rng) for _ in range(2))
    assert (B.mT @ A).std().item() == pytest.approx(0.02, rel=0.02)


def test_what_is_logged_of_factors_is_that_of_their_products():
    agent, args = probes.make_agent(lora, probes.BOX, rank=2), probes.settings(lora, rank=2)
    for freeze_theta in (False, True):
        ours = logged_by(lora.log_method, agent, args, freeze_theta=freeze_theta)
        theta = agent.split(agent.theta.unsqueeze(0), agent.shapes)
        W = agent.split(agent.mu, agent.factors)
        mu = {
            name: W[f"{name[:-7]}.B"] @ W[f"{name[:-7]}.A"] if name.endswith(".weight") else W[name]
            for name in theta
        }
        expected = logged_by(
            lambda run, _, theta=theta, mu=mu: run.log_sharing(theta, mu), agent, freeze_theta=freeze_theta
        )
        assert len(expected) == 3 + 7
        for name, x in expected.items():
            assert ours[name] == pytest.approx(x)


# Reptile


def test_a_turn_is_varshares_update_of_a_single_task():
    """With theta as the turns before have left it; mu and moments of other tasks do not move."""
    agent, trunk, args, theirs, batch = pair(reptile)
    args.reptile_alpha = theirs.reptile_alpha = 0.3
    ones = [reptile.agent_of_task(agent, m) for m in range(TASKS)]
    optimizer = torch.optim.Adam([agent.theta, *(one.mu for one in ones)], lr=0.01)
    before = agent.weights().detach()
    rng = torch.Generator().manual_seed(0)
    stats = reptile.take_turns(agent, ones, optimizer, batch, reptile.minibatch_gradients, args, rng)

    rng = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(trunk.theta.detach().clone())
    mus = [torch.nn.Parameter(x.clone()) for x in trunk.mu.detach()]
    moments = torch.optim.Adam([theta, *mus], lr=0.01)
    sigma, moves = trunk.sigma.clone(), torch.zeros_like(before)
    for m in torch.randperm(TASKS, generator=rng).tolist():
        start, squares, weight = (
            theta.detach().clone(),
            trunk.h_sum[m].clone(),
            trunk.h_count[m].item(),
        )
        for _ in range(args.update_epochs):
            for inds in torch.randperm(args.samples_per_task, generator=rng).chunk(args.num_minibatches):
                noise = torch.randn(1, len(theta), generator=rng).double()
                mb = varshare.Batch(*(x[m : m + 1, inds] for x in batch))
                moments.zero_grad()
                W = varshare.Agent.unpack(trunk, (theta + mus[m] + sigma[m] * noise))
                loss = varshare.ppo_loss(trunk, W, mb, args)[0].sum()
                G = torch.autograd.grad(loss, [theta, mus[m]])[0]
                pull = args.beta / args.samples_per_task / args.sigma_prior**2 * mus[m].detach()
                clip = min(1, args.max_grad_norm / (torch.cat((G, G + pull)).norm().item() + 1e-6))
                theta.grad, mus[m].grad = clip * G, clip * (G + pull)
                moments.step()
                N, B = args.samples_per_task, args.samples_per_task // args.num_minibatches
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
    torch.testing.assert_close(stats["varshare/moved_by_others"][0], others.norm(dim=1))
    own = agent.weights().detach() - before - others
    torch.testing.assert_close(stats["varshare/moved_by_itself"][0], own.norm(dim=1))
    assert (stats["varshare/approx_kl_by_others"] > 0).all()
    assert stats["losses/policy_loss"].shape == (6, TASKS)


def test_a_turns_recentring_keeps_its_own_weights_and_moves_all_others():
    agent = probes.make_agent(reptile)
    before, mu = agent.weights().detach(), agent.mu.detach().clone()
    reptile.recentre(reptile.agent_of_task(agent, 1), 0.3)
    moved = agent.weights().detach() - before
    torch.testing.assert_close(moved[1], torch.zeros_like(moved[1]))
    for m in (0, 2):
        torch.testing.assert_close(moved[m], 0.3 * mu[1])
        assert torch.equal(agent.mu[m], mu[m])
    torch.testing.assert_close(agent.mu[1].detach(), 0.7 * mu[1])


@pytest.mark.slow
def test_a_stopped_run_of_turns_ends_the_same(tmp_path):
    changes = {"total_timesteps": 7_680, "tasks": (0, 4), "norm_reward": True}
    reference = tmp_path / probes.run(reptile, "reference", **changes)
    process = probes.processes.Process(
        target=probes.run_and_kill,
        args=("variants/varshare_reptile_ppo.py", probes.SMALL | changes | {"run_name": "stopped"}, tmp_path),
        kwargs={"moment": "after", "save": 3, "signum": signal.SIGTERM},
    )
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    probes.assert_same_runs(tmp_path / probes.run(reptile, "stopped", resume=True, **changes), reference)


# Trust region


def test_posteriors_are_pulled_back_to_the_boundary():
    agent, rng = probes.make_agent(trust_region), torch.Generator().manual_seed(0)
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
    args.delta, seen = 1.0, []
    pull_back = trust_region.pull_back

    def watched(agent, mu, sigma, delta):
        stats = pull_back(agent, mu, sigma, delta)
        q, before = Normal(agent.mu.detach(), agent.sigma), Normal(start["mu"], start["sigma"])
        seen.append(kl_divergence(q, before).sum(1))
        return stats

    monkeypatch.setattr(trust_region, "pull_back", watched)
    stats = update(trust_region, agent, args, batch, torch.optim.Adam(agent.parameters(), lr=0.3))
    assert (stats["varshare/posterior_kl"] > 1).all() and stats["varshare/share_mu"].shape == (6, TASKS)
    torch.testing.assert_close(torch.stack(seen), torch.ones(6, TASKS).double())  # in every minibatch
    agent.load_state_dict(start, strict=False)
    agent.h_count[0] = 0  # a task that has learned nothing yet is not limited
    seen.clear()
    update(trust_region, agent, args, batch)
    assert (seen[-1][0] > 1) and (seen[-1][1:] < 1 + 1e-9).all()


# Learning

LEARNS = {annealed: 250, horseshoe: 250, learned_prior: 250, lora: 200, reptile: 200, trust_region: 250}


@pytest.mark.learns
@pytest.mark.parametrize("script", LEARNS)
def test_variants_learn_goals(script):
    size = {"num_steps": 128, "eval_episodes": 10, "checkpoint_interval": 1e9, "norm_value": True}
    size |= {"learning_rate": 6e-3} if script is horseshoe else {}  # at 3e-3 it is in full ascent by then
    folder = probes.run(script, env_id="cartpole-goals10", total_timesteps=256_000, **size)
    rows = probes.read_heartbeat(folder)
    final = next(float(row[3]) for row in rows if row[1:3] == ("eval/episodic_return", "mean"))
    assert final > LEARNS[script] and math.isfinite(final)
