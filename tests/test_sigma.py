"""The variational part of VarShare: weights, KL, re-centring, sigma, what is logged of them; controls."""

import math
from types import SimpleNamespace

import numpy as np
import probes
import pytest
import torch
from probes import BOTH, TASKS
from torch.distributions import Normal, kl_divergence

from envs.metrics import sharing, sigma_quantiles
from envs.runs import Run

varshare, sac = map(probes.load_script, ("varshare_ppo.py", "varshare_sac.py"))

pytestmark = pytest.mark.usefixtures("elsewhere")


# Weights


@BOTH
def test_kl_equals_that_of_torch_and_is_0_at_the_prior(trunk, space):
    agent = probes.make_agent(trunk, space)
    prior = Normal(torch.zeros(()).double(), 0.7)
    expected = kl_divergence(Normal(agent.mu, agent.sigma), prior).sum(1)
    torch.testing.assert_close(trunk.gaussian_kl(agent.mu, agent.sigma, 0.7), expected)
    zero = trunk.gaussian_kl(torch.zeros_like(agent.mu), torch.full_like(agent.sigma, 0.03), 0.03)
    assert zero.abs().max() < 1e-12


@BOTH
def test_weights_start_as_one_orthogonal_draw_for_all_tasks(trunk, space):
    args = probes.settings(trunk, sigma_init=0.02)
    agent, same, other = (
        trunk.Agent(probes.spaces(space), args, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(agent.theta, same.theta) and not torch.equal(agent.theta, other.theta)
    assert not agent.mu.any() and agent.mu.shape == (TASKS, len(agent.theta))
    torch.testing.assert_close(agent.sigma, torch.full_like(agent.mu, 0.02))
    W = agent.unpack(agent.weights())
    nets = ("actor", "critic1", "critic2") if trunk is sac else ("actor", "critic")
    names = [f"{net}.{i}.{kind}" for net in nets for i in range(3) for kind in ("weight", "bias")]
    assert [name for name in W if name != "logstd"] == names
    assert not W.get("logstd", torch.zeros(1)).any()
    for net in nets:
        for i, gain in enumerate((math.sqrt(2), math.sqrt(2), 0.01 if net == "actor" else 1.0)):
            w = W[f"{net}.{i}.weight"]
            assert not W[f"{net}.{i}.bias"].any()
            small = w[0] @ w[0].T if w.shape[1] <= w.shape[2] else w[0].T @ w[0]
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-5)
    weights = agent.weights().detach().clone()
    for x in agent.unpack(weights).values():  # views of one matrix, all of it
        x.zero_()
    assert not weights.any()


def test_recentring_changes_no_weights_and_has_the_smallest_kl_of_all_common_shifts(trunk):
    agent = probes.make_agent(trunk)
    [noise] = probes.draws(agent)
    before, theta, mu = (x.detach().clone() for x in (agent.weights(noise), agent.theta, agent.mu))
    trunk.recentre(agent, 0.1)
    torch.testing.assert_close(agent.weights(noise).detach(), before)
    torch.testing.assert_close(
        agent.theta.detach(), theta + 0.1 * mu.mean(0)
    )  # 10 % of the way, in every task
    torch.testing.assert_close(agent.mu.detach(), mu - 0.1 * mu.mean(0))
    trunk.recentre(agent, 1.0)
    shift = torch.zeros_like(theta, requires_grad=True)
    kl = trunk.gaussian_kl(agent.mu.detach() - shift, agent.sigma, 0.3).sum()  # which is convex in it
    (slope,) = torch.autograd.grad(kl, shift)
    assert slope.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["varshare_ppo.py", "varshare_sac.py", "baselines/l2soft_ppo.py"])
def test_runs_recentre_after_every_update_phase(name):
    script, changes = probes.load_script(name), {"total_timesteps": 500 if "sac" in name else 5120}
    changes |= {"beta": 1e-12} if name == "varshare_sac.py" else {}
    means = []
    for alpha in (0.0, 1.0):
        folder = probes.run(script, str(alpha), reptile_alpha=alpha, **changes)
        means.append(probes.load(folder)["agent"]["mu"].mean(0).abs().max())
    assert means[0] > 1e-3 and means[1] < 1e-5


# Sigma's rule


def squared_error(agent, W, mb, args):
    """0.5 (y - x W)^2, a mean over samples: the negative log-likelihood of noise with variance 1."""
    predicted = varshare.linear(mb.obs, W, "critic.0").squeeze(-1)
    nothing = {"losses/clipfrac": predicted.new_zeros(len(predicted))}
    return 0.5 * (predicted - mb.returns).square().mean(1), nothing


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_sigma_and_mu_are_those_of_a_known_posterior(monkeypatch, beta):
    """Of linear regressions y = x w + noise, after updates of PPO's form."""
    monkeypatch.setattr(varshare, "ppo_loss", squared_error)
    tasks, features, samples, prior, rng = 6, 15, 1024, 0.1, torch.Generator().manual_seed(0)
    size = {"hidden_sizes": (), "envs_per_task": 8, "num_steps": samples // 8, "update_epochs": 12}
    size |= {"beta": beta, "sigma_prior": prior, "sigma_init": 0.003}
    args = varshare.Args(**size, max_grad_norm=1e9, freeze_theta=True)
    agent = varshare.Agent(probes.spaces(num_tasks=tasks, obs_dim=features), args, rng)
    agent.theta.requires_grad_(False).zero_()
    x = torch.randn(tasks, samples, features, generator=rng) * torch.logspace(-2, 1, features)
    w = prior * torch.randn(tasks, features, 1, generator=rng)
    y = (x @ w).squeeze(2) + torch.randn(tasks, samples, generator=rng)
    batch = varshare.Batch(x, y, y, y, y)
    optimizer = torch.optim.Adam([agent.mu], lr=0.01)
    for step in range(16):  # 16 times 12 epochs of 4 minibatches
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 16)
        varshare.update(agent, optimizer, batch, varshare.minibatch_backward, args, rng)
    x = torch.cat((x, torch.ones(tasks, samples, 1)), 2)  # the bias
    precision = x.mT @ x / beta + torch.eye(features + 1) / prior**2
    true_mu = torch.linalg.solve(precision, x.mT @ y.unsqueeze(2) / beta).squeeze(2)
    true_sigma = precision.diagonal(dim1=1, dim2=2).rsqrt()  # of the best factorised Gaussian
    mu, sigma = agent.mu[:, -(features + 1) :].detach(), agent.sigma[:, -(features + 1) :]
    assert ((sigma - true_sigma).abs() / true_sigma).mean(0).max() < 0.1
    assert ((mu - true_mu).abs() / (true_mu.abs() + true_sigma)).mean(0).max() < 0.1
    actor = agent.sigma[:, : -(features + 1)]  # which has no part in the loss
    torch.testing.assert_close(actor, torch.full_like(actor, prior))


@pytest.mark.parametrize(
    ("script", "minibatches", "expected"),
    [(varshare, 3, 1 - (1 - 0.3) * 6 / 18), (varshare, 1, 0.5), (sac, None, 1 + 0.3 * 12 / 18)],
)
def test_sigma_has_the_smallest_expected_loss_and_kl(script, minibatches, expected):
    """With h the curvature, d/dsigma [h sigma^2 / 2 + beta / N KL] = 0, whatever sigma was before.

    h is B times a running mean of squared gradients that starts with the first, over `expected`.
    """
    args, N = probes.settings(script, beta=0.3), 18
    agent, rng = probes.make_agent(script), torch.Generator().manual_seed(0)
    if script is varshare:
        args.num_minibatches, B, more = minibatches, 18 // minibatches, ()
    else:
        args.batch_size, B, more = 12, 12, (torch.tensor(18.0).double(),)
    size = 10 ** torch.linspace(-6, 1, agent.mu.shape[1]).double()
    size[::7] = 0
    gradients = [size * torch.randn(agent.mu.shape, generator=rng).double() for _ in range(4)]
    for G in gradients:
        script.learn_sigma(agent, G, *more, args)
    weights = args.sigma_decay ** torch.arange(3, -1, -1)
    h = B / expected * sum(w * G.square() for w, G in zip(weights, gradients)) / weights.sum()
    sigma = agent.sigma.clone().requires_grad_()
    zero = torch.zeros(()).double()
    kl = kl_divergence(Normal(zero, sigma), Normal(zero, args.sigma_prior))
    (slope,) = torch.autograd.grad((0.5 * h * sigma.square() + 0.3 / N * kl).sum(), sigma)
    assert (slope * sigma).abs().max() < 1e-6 * 0.3 / N
    torch.testing.assert_close(agent.sigma[:, ::7], torch.full_like(sigma[:, ::7], args.sigma_prior))


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_sacs_sigma_is_a_known_posteriors(beta):
    """Of many regressions with one weight each; as many samples as there are, drawn with replacement."""
    samples, args = 256, probes.settings(sac, beta=beta, sigma_prior=10.0, batch_size=256, sigma_decay=0.999)
    agent, rng = probes.make_agent(sac, hidden_sizes=(3,)), torch.Generator().manual_seed(0)
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


@pytest.mark.parametrize("name", ["varshare_ppo.py", "samples_ppo"])
def test_an_update_learns_sigma_in_every_minibatch_and_says_which_weights_are_live(name):
    script = probes.load_script(name)
    args, agent = probes.settings(script, num_minibatches=3, update_epochs=2), probes.make_agent(script)
    agent.live.fill_(1)
    before = agent.h_count.clone()
    batch = probes.random_batch(script, agent, 18)
    batch.obs[..., 0] = 0  # nothing depends on the weights of this input
    probes.update(script, agent, args, batch)
    weight = (1 - args.sigma_decay**6) / (1 - args.sigma_decay)
    torch.testing.assert_close(agent.h_count - before * args.sigma_decay**6, torch.full_like(before, weight))
    live, sigma = agent.unpack(agent.live > 0), agent.unpack(agent.sigma)
    for net in ("actor", "critic"):
        name = f"{net}.0.weight"
        assert not live[name][..., 0].any() and live[name][..., 1:].any()
        torch.testing.assert_close(
            sigma[name][..., 0], torch.full_like(sigma[name][..., 0], args.sigma_prior)
        )
        assert (sigma[name][live[name]] < args.sigma_prior).all()


# Controls: sigma shuffled, averaged over several draws, constant


def test_sigma_is_shuffled_among_live_weights_of_a_task_and_layer_after_every_minibatch(monkeypatch):
    shuffled = probes.load_script("shuffled_sigma_ppo")
    agent, rng = probes.make_agent(shuffled), torch.Generator().manual_seed(0)
    on = torch.rand(agent.live.shape, generator=rng) < 0.7
    before, moved = agent.sigma.clone(), 0
    shuffled.shuffle_sigma(agent, on, rng)
    live, new = agent.unpack(on), agent.unpack(agent.sigma)
    for name, old in agent.unpack(before).items():
        assert torch.equal(new[name][~live[name]], old[~live[name]])
        for m in range(TASKS):
            mine = live[name][m]
            assert torch.equal(new[name][m][mine].sort().values, old[m][mine].sort().values)
        moved += (new[name] != old).sum().item()
    assert moved > 0.8 * on.sum()
    calls = []
    monkeypatch.setattr(shuffled, "shuffle_sigma", lambda agent, live, rng: calls.append(live.clone()))
    agent.live.copy_(on)
    args = probes.settings(shuffled, num_minibatches=3, update_epochs=2)
    probes.update(shuffled, agent, args, probes.random_batch(shuffled, agent, 18))
    assert len(calls) == 6 and all(torch.equal(live, on) for live in calls)  # of the update before


def test_several_draws_are_averaged_and_a_single_one_is_varshare():
    samples = probes.load_script("samples_ppo")
    args = probes.settings(samples, max_grad_norm=1e9, weight_samples=3)
    agent, trunk = (probes.make_agent(script) for script in (samples, varshare))
    sigma, learn, rows = trunk.sigma, varshare.learn_sigma, []
    batch = probes.random_batch(varshare, trunk, 20)
    noise = torch.stack([probes.draws(trunk, seed)[0] for seed in range(3)])
    grads, stats = probes.gradients(samples, agent, batch, noise, args)
    singles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varshare, "learn_sigma", lambda agent, G, args: rows.append(G.clone()))
        for eps in noise:
            singles.append(probes.gradients(varshare, trunk, batch, eps, args))
    torch.testing.assert_close(grads, {x: sum(one[0][x] for one in singles) / 3 for x in grads})
    torch.testing.assert_close(stats, {x: sum(one[1][x] for one in singles) / 3 for x in stats})
    learn(trunk, torch.stack(rows).square().mean(0).sqrt(), args)
    torch.testing.assert_close(agent.sigma, trunk.sigma)
    assert not torch.allclose(agent.sigma, sigma)
    args.weight_samples = 1
    for script, one in ((samples, agent), (varshare, trunk)):
        one.load_state_dict(probes.make_agent(varshare).state_dict())
        probes.update(script, one, args, batch)
    torch.testing.assert_close(agent.state_dict(), trunk.state_dict())


def test_a_constant_sigma_is_sacs_noise_without_the_rule():
    """With PPO it is one of the scripts in test_varshare_ppo.py."""
    fixed = probes.load_script("fixed_sigma_sac")
    agent, other = probes.make_agent(sac), probes.make_agent(fixed, sigma=0.2)
    agent.sigma.fill_(0.2)
    other.load_state_dict({name: agent.state_dict()[name] for name in other.state_dict()})
    target, b = probes.target_of(agent), probes.random_transitions(sac, agent, 20)
    inputs = target, b, *probes.draws(agent), torch.tensor(50.0).double()
    ours = probes.gradients(fixed, other, *inputs, probes.settings(fixed, beta=0.7, sigma=0.2))
    torch.testing.assert_close(ours, probes.gradients(sac, agent, *inputs, probes.settings(sac, beta=0.7)))


# The log


def logged(trunk, agent, args, theta_start):
    """What `log_method` logs: name -> [overall, task, ...]."""
    rows = {}
    run = Run.__new__(Run)
    run.global_step, run.theta_start = 0, theta_start
    run.output = SimpleNamespace(add=lambda step, name, tasks, x: rows.update({name: [x, *tasks]}))
    number = [9] if trunk is sac else []
    trunk.log_method(run, agent, *number, args)
    return rows


def test_what_is_logged_of_the_method(trunk):
    """Sharing does not depend on the gauge, unless theta is frozen: theta + c, mu_m - c is the same."""
    agent, measured = probes.make_agent(trunk, probes.BOX), {}
    agent.live.copy_(torch.rand(agent.mu.shape, generator=torch.Generator().manual_seed(0)) < 0.6)
    start = 0.9 * agent.theta.detach()
    for frozen in (False, True):
        args = probes.settings(trunk, freeze_theta=frozen, load="x")
        for shift in (0.0, 0.2):
            with torch.no_grad():
                agent.theta += shift
                agent.mu -= shift
            measured[frozen, shift] = logged(trunk, agent, args, start + shift)
            theta, mu = agent.theta.detach().clone(), agent.mu.detach().clone()
            if not frozen:
                theta, mu = theta + mu.mean(0), mu - mu.mean(0)
            kl = kl_divergence(Normal(agent.mu, agent.sigma), Normal(0.0, args.sigma_prior)).sum(1)
            last = agent.unpack(mu)["critic1.2.bias" if trunk is sac else "logstd"].flatten(1)
            theta_last = agent.unpack(theta.unsqueeze(0))[
                "critic1.2.bias" if trunk is sac else "logstd"
            ].flatten()
            expected = {
                "kl": kl,
                "kl_loss": kl * args.beta / (9 if trunk is sac else 18),
                "mu_norm": mu.norm(dim=1),
                "theta_norm": theta.norm(),
                "theta_moved": (theta - start - shift).norm(),
            }
            if trunk is varshare:
                ratio = theta_last.square().sum() / (theta_last.square().sum() + last.square().sum(1))
                expected["sharing_ratio/logstd"] = ratio
                both = theta_last.square().sum() + last.square().sum(1).mean()
                assert measured[frozen, shift]["varshare/sharing_ratio/logstd"][0] == pytest.approx(
                    (theta_last.square().sum() / both).item()
                )
            for name, x in expected.items():
                assert measured[frozen, shift][f"varshare/{name}"][-x.numel() :] == pytest.approx(
                    x.flatten().tolist(), rel=1e-5
                ), name
            with torch.no_grad():
                agent.theta -= shift
                agent.mu += shift
    layers = len({name.rpartition(".")[0] or name for name in agent.shapes})
    assert len(measured[False, 0.0]) == 2 + 3 + 2 + 5 * layers
    for name in (x for x in measured[False, 0.0] if "norm" in x or "ratio" in x):
        assert measured[False, 0.0][name] == pytest.approx(measured[False, 0.2][name])
        assert measured[True, 0.0][name] != pytest.approx(measured[True, 0.2][name], rel=1e-3)


def test_sharing_of_factors_is_that_of_their_products():
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=rng).double()

    theta = {"actor.0.weight": randn(1, 5, 4), "actor.0.bias": randn(1, 5), "logstd": randn(1, 2)}
    factors = {"actor.0.A": randn(TASKS, 2, 4), "actor.0.B": randn(TASKS, 5, 2)}
    rest = {"actor.0.bias": randn(TASKS, 5), "logstd": randn(TASKS, 2)}
    start = randn(5 * 4 + 5 + 2)
    for x0 in (start, None):
        ours = sharing(theta, factors | rest, x0)
        product = {"actor.0.weight": factors["actor.0.B"] @ factors["actor.0.A"]}
        expected = sharing(theta, product | rest, x0)
        assert ours.keys() == expected.keys() and ("varshare/theta_moved" in ours) == (x0 is start)
        for name, (tasks, overall) in expected.items():
            assert ours[name][1] == pytest.approx(overall)
            assert tasks is None or ours[name][0].tolist() == pytest.approx(tasks.tolist())


def test_quantiles_of_sigma_are_among_live_weights():
    rng = np.random.default_rng(0)
    shapes = {
        "actor.0.weight": (3, 4, 5),
        "actor.0.bias": (3, 4),
        "critic.0.weight": (3, 1, 5),
        "logstd": (3, 1),
    }
    theta = {name: torch.from_numpy(rng.normal(size=(1, *shape[1:]))) for name, shape in shapes.items()}
    sigma = {name: torch.from_numpy(rng.random(shape)) for name, shape in shapes.items()}
    live = {name: torch.from_numpy(rng.random(shape) < 0.6).float() for name, shape in shapes.items()}
    live["critic.0.weight"][:] = 0  # of a layer without any, all count
    metrics = sigma_quantiles(theta, sigma, live)
    on = {name: x > 0 for name, x in live.items()}
    layer = np.concatenate([sigma[f"actor.0.{x}"].numpy()[on[f"actor.0.{x}"]] for x in ("weight", "bias")])
    for q in (1, 50, 99):
        assert metrics[f"varshare/sigma_q{q}/actor.0"] == (None, pytest.approx(np.quantile(layer, q / 100)))
    of_critic = np.quantile(sigma["critic.0.weight"], 0.5)
    assert metrics["varshare/sigma_q50/critic.0"][1] == pytest.approx(of_critic)
    assert metrics["varshare/dead/critic.0"][0].tolist() == [1, 1, 1]
    parts = np.concatenate([on[f"actor.0.{x}"].flatten(1).numpy() for x in ("weight", "bias")], 1)
    np.testing.assert_allclose(metrics["varshare/dead/actor.0"][0], 1 - parts.mean(1), rtol=1e-6)
    size = torch.cat([x.flatten() for x in theta.values()]).abs().median()
    for m in range(3):
        median = torch.cat([sigma[name][m][on[name][m]] for name in shapes]).median()
        assert metrics["varshare/sigma"][0][m] == median
        assert metrics["varshare/sigma_over_theta"][0][m] == median / size
