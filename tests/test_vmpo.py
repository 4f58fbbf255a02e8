"""VarShare-V-MPO and its siblings: E-step, trust region, objective, sigma, whole runs."""

import math
from functools import partial

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from probes import BOTH, TASKS
from scipy.optimize import minimize_scalar
from test_varshare_ppo import clip
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import envs
from envs.models import load_agent

varshare, l2soft, blind = map(
    probes.load_script, ("vmpo", "baselines/l2soft_vmpo.py", "baselines/task_blind_vmpo.py")
)
LEARNED = {"varshare_vmpo": 300, "l2soft_vmpo": 300, "hard_sharing_vmpo": 200, "task_blind_vmpo": 70}
SCRIPTS = pytest.mark.parametrize("name", probes.VMPO_SCRIPTS)
LEARNS = [x if "varshare" in x else pytest.param(x, marks=pytest.mark.learns) for x in probes.VMPO_SCRIPTS]
QUICK = pytest.mark.parametrize("name", LEARNS)

pytestmark = pytest.mark.usefixtures("elsewhere")


# The E-step


def advantages(samples=200, scale=1.0, shift=0.0):
    rng = torch.Generator().manual_seed(0)
    return scale * torch.randn(TASKS, samples, generator=rng).double() + shift


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("eps", [0.01, 0.2, 1.5])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_eta_minimises_the_dual(scale, eps, share):
    """eta * eps + eta * log mean exp(A / eta) over the samples that have weight, by SciPy."""
    A, args = advantages(scale=scale), varshare.Args(eps_eta=eps, top_share=share)
    weights, eta = varshare.e_step(A, args)
    for m in range(TASKS):
        best = np.sort(A[m].numpy())[::-1][: round(share * 200)]

        def dual(log_eta, best=best):
            eta = math.exp(log_eta)
            mean = np.exp((best - best[0]) / eta).mean()
            return (eta * (eps + math.log(mean)) + best[0]) / scale

        bounds = math.log(1e-3 * scale), math.log(1e3 * scale)
        found = minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-10})
        assert eta[m].item() == pytest.approx(math.exp(found.x), rel=1e-3)
    psi = weights / 200
    torch.testing.assert_close(psi.sum(1), torch.ones(TASKS).double())
    has = weights > 0
    assert (has.sum(1) == round(share * 200)).all()
    kl = (psi * (psi * round(share * 200)).clamp(min=1e-300).log()).sum(1)
    torch.testing.assert_close(kl, torch.full_like(kl, eps), rtol=1e-6, atol=1e-9)
    for m in range(TASKS):
        assert share == 1 or A[m][has[m]].min() > A[m][~has[m]].max()
    order = A.argsort(1)
    assert (weights.gather(1, order).diff(dim=1) >= 0).all()  # the larger the advantage the larger the weight


def test_weights_do_not_depend_on_the_unit_of_advantages():
    weights, eta = varshare.e_step(advantages(), varshare.Args())
    moved, its_eta = varshare.e_step(advantages(scale=30.0, shift=-7.0), varshare.Args())
    torch.testing.assert_close(moved, weights)
    torch.testing.assert_close(its_eta, 30 * eta)


def test_weights_of_equal_advantages_and_of_ties():
    args = varshare.Args(eps_eta=2.0)
    same, eta = varshare.e_step(torch.full((TASKS, 40), 3.0), args)
    torch.testing.assert_close(same, torch.ones(TASKS, 40))
    assert eta.isfinite().all()
    A = torch.zeros(TASKS, 40)
    A[:, :20] = 1.0  # half of them: a KL of 2 cannot be, log 2 is the most
    weights, _ = varshare.e_step(A, args)
    torch.testing.assert_close(weights, 2 * A)
    half, _ = varshare.e_step(torch.zeros(TASKS, 40), varshare.Args(top_share=0.5))
    torch.testing.assert_close(half.sort(1).values, 2 * (torch.arange(40) >= 20).float().expand(TASKS, -1))


# The objective


def make_agent(script, space=probes.DISCRETE):
    """With weights of the trust region that are all different."""
    agent = probes.make_agent(script, space)
    agent.alpha.uniform_(0.3, 3.0, generator=torch.Generator().manual_seed(3))
    return agent


@torch.no_grad()
def random_batch(script, agent, samples, seed=0):
    """Random samples, whose actions were drawn from an older policy; and that policy, by torch."""
    rng, weights = torch.Generator().manual_seed(seed), agent.weights()

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=weights.dtype)

    obs = randn(TASKS, samples, probes.OBS)
    older = agent.unpack(weights + 0.1 * randn(*weights.shape))
    old = agent.actor(older, obs)
    policy = agent.distribution(older, old)
    actions = policy.sample(randn(TASKS, samples, agent.act_dim))
    if not agent.discrete:
        old = torch.cat((old, older["logstd"].unsqueeze(1).expand_as(old)), 2)
    factors, _ = script.e_step(randn(TASKS, samples), script.Args(eps_eta=0.5))
    return script.Batch(obs, actions, old, factors, agent.critic(older, obs) + randn(TASKS, samples))


def torchs(agent, parameters):
    """The policy of logits, or of means and log standard deviations, by torch.distributions."""
    if agent.discrete:
        return Categorical(logits=parameters)
    mean, logstd = parameters.chunk(2, -1)
    return Independent(Normal(mean, logstd.exp()), 1)


def losses_task_by_task(agent, weights, b, args):
    """The formula of the docstrings by torch.distributions, and statistics: (task,) each."""
    out, values, logstd = probes.forward_task_by_task(agent, weights, b.obs)
    now = out if agent.discrete else torch.cat((out, logstd.unsqueeze(1).expand_as(out)), 2)
    policy, old = torchs(agent, now), torchs(agent, b.old)
    kl, parts = kl_divergence(old, policy), []
    if agent.discrete:
        parts = [kl]
    else:
        mean, std = b.old[..., : agent.act_dim], b.old[..., agent.act_dim :]
        for moved in (torch.cat((out, std), 2), torch.cat((mean, now[..., agent.act_dim :]), 2)):
            parts.append(kl_divergence(old, torchs(agent, moved)))
    logp = policy.log_prob(b.actions)
    policy_loss = (kl - (b.weights - 1) * logp if args.control_variate else -b.weights * logp).mean(1)
    value_loss, entropy = 0.5 * (values - b.returns).square().mean(1), policy.entropy().mean(1)
    losses = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    for i, part in enumerate(parts):
        losses = losses + agent.alpha[:, i] * part.mean(1)
    stats = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl.mean(1)}
    return losses, {f"losses/{x}": y.detach() for x, y in stats.items()}


@BOTH
@pytest.mark.parametrize("control_variate", [True, False])
@SCRIPTS
def test_gradients_are_those_of_the_objective(monkeypatch, name, control_variate, space):
    script = probes.load_script(name)
    agent, rows = make_agent(script, space), []
    flags = {name: 0.7 for name in ("beta", "l2_coef") if hasattr(script.Args, name)}
    args = probes.settings(
        script, control_variate=control_variate, vf_coef=0.7, ent_coef=0.03, max_grad_norm=1e9, **flags
    )
    b, draws = random_batch(script, agent, 20), probes.draws(agent)
    weights, inputs = probes.networks(agent, b.obs, *draws)
    losses, stats = losses_task_by_task(agent, weights, b._replace(obs=inputs), args)
    total = losses.sum()
    if script is varshare:
        (expected_rows,) = torch.autograd.grad(total, weights, retain_graph=True)
        monkeypatch.setattr(script, "learn_sigma", lambda agent, G, *rest: rows.append(G.clone()))
        total = total + args.beta / 18 * kl_divergence(Normal(agent.mu, agent.sigma), Normal(0.0, 0.3)).sum()
    if script is l2soft:
        total = total + args.l2_coef * agent.mu.square().sum()
    trained = dict(agent.named_parameters())
    expected = dict(zip(trained, torch.autograd.grad(total, trained.values())))
    grads, found = probes.gradients(script, agent, b, *draws, args)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(found, stats)
    assert not any(x.requires_grad for x in found.values())
    for G in rows:
        torch.testing.assert_close(G, expected_rows)
    args.max_grad_norm = 0.05
    clipped, _ = probes.gradients(script, agent, b, *draws, args)
    torch.testing.assert_close(clipped, clip(expected, 0.05, apart=False))


@BOTH
def test_the_control_variate_changes_no_gradient_in_expectation(space):
    """Over the actions of pi_old: all of them, or the nodes of a quadrature that is exact for log pi."""
    agent = make_agent(varshare, space)
    b = random_batch(varshare, agent, 5)
    if agent.discrete:
        nodes = [torch.full_like(b.actions, a) for a in range(agent.act_dim)]
        shares = [b.old.softmax(2)[..., a] for a in range(agent.act_dim)]
    else:
        mean, logstd = b.old.chunk(2, 2)
        places = math.sqrt(3) * torch.arange(-1, 2).double()
        chances = torch.tensor([1.0, 4, 1]).double() / 6
        grid = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        nodes = [mean + logstd.exp() * places[node] for node in grid]
        shares = [chances[node].prod().expand(TASKS, 5) for node in grid]
    totals = []
    for control_variate in (True, False):
        args, total = probes.settings(varshare, control_variate=control_variate, vf_coef=0.0), 0.0
        for actions, share in zip(nodes, shares):
            for i in range(5):
                one = varshare.Batch(*(x[:, i : i + 1] for x in b._replace(actions=actions)))
                losses, _ = varshare.vmpo_loss(agent, agent.unpack(agent.weights()), one, args)
                total = total + (share[:, i] * losses).sum()
        totals.append(torch.autograd.grad(total, agent.mu)[0])
    torch.testing.assert_close(*totals)
    assert totals[0].abs().max() > 1e-2


@BOTH
def test_no_task_depends_on_another(space):
    agent, rows = make_agent(varshare, space), []
    args, A = probes.settings(varshare, max_grad_norm=1e9), advantages()
    changed = A.clone()
    changed[1] *= 5
    both = [varshare.e_step(x, args)[0] for x in (A, changed + torch.tensor([[0.0], [1.0], [0.0]]))]
    torch.testing.assert_close(both[0][[0, 2]], both[1][[0, 2]])
    b, other = (random_batch(varshare, agent, 20, seed) for seed in (0, 1))
    mixed = varshare.Batch(*(torch.stack((x[0], y[1], x[2])) for x, y in zip(b, other)))
    for batch in (b, mixed):
        agent = make_agent(varshare, space)  # whose sigma has not learned yet
        grads, stats = probes.gradients(varshare, agent, batch, *probes.draws(agent), args)
        varshare.learn_alpha(agent, batch, args)
        rows.append({"mu": grads["mu"], "alpha": agent.alpha, "sigma": agent.sigma} | stats)
    for name, x in rows[0].items():
        torch.testing.assert_close(rows[1][name][[0, 2]], x[[0, 2]])
        moved = not torch.allclose(rows[1][name][1], x[1])
        same = {"alpha"} if agent.discrete else {"alpha", "losses/entropy"}  # at its limit; logstd's
        assert moved or name in same


# The trust region's weight, and sigma


@BOTH
@SCRIPTS
def test_the_trust_region_counts_more_after_a_step_too_far_and_rests_at_eps(name, space):
    script = probes.load_script(name)
    agent, args = probes.make_agent(script, space), probes.settings(script, alpha_min=0.4)
    b = random_batch(script, agent, 20)
    weights, inputs = probes.networks(agent, b.obs)
    now, _, logstd = probes.forward_task_by_task(agent, weights, inputs)
    if not agent.discrete:  # the part of the standard deviation
        now = torch.cat((b.old[..., : agent.act_dim], logstd.unsqueeze(1).expand_as(now)), 2)
    kl = kl_divergence(torchs(agent, b.old), torchs(agent, now)).mean(1).detach()
    for distance, expected in ((1.0, 1.0), (1.21, 1.1), (0.81, 0.9), (100.0, 2.0), (0.01, 0.5), (0.0, 0.5)):
        agent.alpha.fill_(1.0)
        agent.eps = kl.unsqueeze(1) / max(distance, 1e-30)
        script.learn_alpha(agent, b, args)
        torch.testing.assert_close(agent.alpha[:, -1], torch.full_like(kl, expected))
    script.learn_alpha(agent, b, args)
    assert (agent.alpha[:, -1] == 0.4).all()  # no less


@pytest.mark.parametrize(("alpha", "eps_eta"), [(0.0, 0.2), (1.0, 0.2), (0.0, 0.03)])
@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("beta", [1.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_sigma_and_mu_are_those_of_a_known_posterior(monkeypatch, beta, control_variate, alpha, eps_eta):
    """Of actions a = x w + noise with weights that have nothing to do with the noise."""
    monkeypatch.setattr(varshare, "learn_alpha", lambda *_: None)
    tasks, features, samples, prior, rng = 6, 12, 1024, 0.1, torch.Generator().manual_seed(0)
    size = {"hidden_sizes": (), "envs_per_task": 8, "num_steps": samples // 8, "update_epochs": 12}
    size |= {"beta": beta, "sigma_prior": prior, "freeze_theta": True, "max_grad_norm": 1e9}
    args = varshare.Args(**size, control_variate=control_variate, eps_eta=eps_eta)
    agent = varshare.Agent(probes.spaces(gym.spaces.Box(-1.0, 1.0, (1,)), tasks, features), args, rng)
    agent.theta.requires_grad_(False).zero_()
    agent.alpha.fill_(alpha)
    x = torch.randn(tasks, samples, features, generator=rng) * torch.logspace(-1.5, 0.5, features)
    noise = torch.randn(tasks, samples, 1, generator=rng)
    weights, _ = varshare.e_step(torch.randn(tasks, samples, generator=rng), args)
    batch = varshare.Batch(x, noise, torch.zeros(tasks, samples, 2), weights, noise.squeeze(2))
    optimizer = torch.optim.Adam([agent.mu], lr=0.01)
    for step in range(16):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 16)
        varshare.update(agent, optimizer, batch, varshare.minibatch_backward, args, rng)
    x = torch.cat((x, torch.ones(tasks, samples, 1)), 2)  # the bias
    prior_precision = torch.eye(features + 1) / prior**2
    likelihood, region = (x.mT @ (w * x) / beta for w in (weights.unsqueeze(2), alpha))
    target = x.mT @ ((weights - int(control_variate)).unsqueeze(2) * noise) / beta
    true_mu = torch.linalg.solve(likelihood + region + prior_precision, target).squeeze(2)
    true_sigma = (likelihood + prior_precision).diagonal(dim1=1, dim2=2).rsqrt()
    mu, sigma = agent.mu[:, : features + 1].detach(), agent.sigma[:, : features + 1]
    error = (sigma - true_sigma) / true_sigma
    assert error.mean(0).abs().max() < 0.1 and error.abs().mean(0).max() < 0.2
    assert ((mu - true_mu).abs() / (true_mu.abs() + true_sigma)).mean(0).max() < 0.2


# Whole runs


@SCRIPTS
def test_a_resumed_run_is_the_same_bit_for_bit(monkeypatch, name):
    script = probes.load_script(name)
    changes = {"total_timesteps": 10_240, "checkpoint_interval": 0.0}
    whole, end = probes.run(script, "whole", **changes), script.Run.end_iteration

    def stop(run):
        end(run)
        if run.iteration == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "end_iteration", stop)
        with pytest.raises(KeyboardInterrupt):
            probes.run(script, "parts", **changes)
    probes.assert_same_runs(probes.run(script, "parts", resume=True, **changes), whole)
    metrics = {row[1] for row in probes.read_heartbeat(whole) if row[1].startswith("losses/")}
    names = {"policy_loss", "value_loss", "entropy", "kl", "kl_first_minibatch", "explained_variance"}
    assert metrics == {f"losses/{x}" for x in names | {"eta", "alpha"}}
    first = [float(x[3]) for x in probes.read_heartbeat(whole) if x[1] == "losses/kl_first_minibatch"]
    assert "varshare" in name or max(first) < 1e-6  # pi_old is what acted


@pytest.mark.slow
@SCRIPTS
def test_a_compiled_run_is_an_eager_one(monkeypatch, name):
    """By Dynamo alone, whose operations are the same."""
    script, results = probes.load_script(name), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for flag in (False, True):
        folder = probes.run(script, str(flag), total_timesteps=5120, compile=flag)
        results.append(probes.load(folder)["agent"])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@SCRIPTS
def test_a_loaded_model_keeps_the_weight_of_its_trust_region(name):
    script = probes.load_script(name)
    folder = probes.run(script, tasks=(0, 1), total_timesteps=2560)
    args = script.Args(tasks=(2, 1), load=str(folder), hidden_sizes=(16,))
    agent = script.Agent(envs.make("cartpole10", 1, (2, 1)), args, torch.Generator())
    load_agent(agent, args, [envs.cartpole.NAMES[m] for m in (2, 1)])
    saved = probes.load(folder)["agent"]["alpha"]
    assert agent.alpha.tolist() == [[1.0], saved[1].tolist()] and saved[1] != 1


@QUICK
def test_probe_gaussian_policy_finds_the_best_force(name):
    at, folder = probes.learn(probes.load_script(name), "RewardOfForce", eps_std=0.01)
    np.testing.assert_allclose(4 * at(-1.0, 1.0)[1], [[-1, 1]], atol=0.3)  # in units of the bounds
    first = [float(x[3]) for x in probes.read_heartbeat(folder) if x[1] == "losses/kl_first_minibatch"]
    assert "varshare" in name or max(first) < 1e-6  # pi_old is what acted


@SCRIPTS
def test_probe_two_tasks_with_opposite_actions_and_rewards_of_different_scale(name):
    script = probes.load_script(name)
    at, _ = probes.learn(script, "Opposites", rollouts=20)
    _, policy = at(0.0)
    if script is blind:  # the control, which must fail
        assert policy[0] == pytest.approx(policy[1], abs=1e-6)
    else:
        assert policy[0] < 0.1 and policy[1] > 0.9


def test_bad_settings_are_refused():
    for changes in (
        {"eps_eta": 7.0},
        {"eps_eta": 1e6},
        {"eps_eta": 3.0, "top_share": 0.01},
        {"top_share": 0.0},
    ):
        with pytest.raises(ValueError, match="--eps-eta must be below the logarithm"):
            varshare.train(varshare.Args(**changes))


@QUICK
def test_learns_cartpole_goals10(name):
    """Return after 204,800 steps; a random policy has 20."""
    script = probes.load_script(name)
    args = script.make_args("cartpole-goals10", total_timesteps=204_800, eval_episodes=5, run_name="goals")
    assert probes.evaluation(script.train(args))["mean"] > LEARNED[probes.stem(script)]
