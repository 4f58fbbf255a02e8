"""The mathematics of the baselines: what each method adds to, or takes from, plain PPO.

Their gradients where they are autograd's of a formula are in test_varshare_ppo.py.
"""

import itertools

import numpy as np
import probes
import pytest
import scipy.optimize
import torch
from probes import BOTH, HIDDEN, TASKS, draws, gradients, make_agent, random_batch, run, settings

import envs
from envs.settings import ENVIRONMENTS

task_blind, independent, hard_sharing, contextual, l2soft, pcgrad, cagrad = (
    probes.load_script(f"baselines/{name}_ppo.py")
    for name in ("task_blind", "independent", "hard_sharing", "contextual", "l2soft", "pcgrad", "cagrad")
)
soft_modularization, paco, moore = (
    probes.load_script(f"baselines/{name}_ppo.py") for name in ("soft_modularization", "paco", "moore")
)
varshare = probes.load_script("varshare_ppo.py")
SURGERY = pytest.mark.parametrize("method", [pcgrad, cagrad], ids=["pcgrad", "cagrad"])
UNCLIPPED = 1e9  # as --max-grad-norm

pytestmark = pytest.mark.usefixtures("elsewhere")


# What tasks have of their own


@BOTH
def test_what_starts_apart_and_what_is_shared(space):
    def agent_of(script):
        return script.Agent(probes.spaces(space), settings(script), torch.Generator().manual_seed(1))

    assert [name for name, _ in agent_of(task_blind).named_parameters()] == ["theta"]
    assert agent_of(independent).theta.unique(dim=0).shape[0] == TASKS
    assert agent_of(contextual).embedding.unique(dim=0).shape[0] == TASKS
    agent = agent_of(hard_sharing)
    out = agent.act_dim
    assert agent.heads.shape == (TASKS, (HIDDEN[-1] + 1) * (out + 1) + (0 if agent.discrete else out))
    W = agent.unpack(agent.weights())
    rows = {name: w.flatten(1).unique(dim=0).shape[0] for name, w in W.items() if name.endswith("weight")}
    apart = {"actor.2.weight", "critic.2.weight"}
    assert rows == {name: TASKS if name in apart else 1 for name in rows} and apart < rows.keys()
    heads = [x.flatten(1) for name, x in W.items() if ".2." in name or name == "logstd"]
    assert torch.equal(torch.cat(heads, 1), agent.heads)
    sets = agent_of(paco)
    assert sets.theta.unique(dim=0).shape[0] == 5 and sets.w.unique(dim=0).shape[0] == TASKS
    for script, own in ((moore, "heads"), (soft_modularization, "embeddings")):
        agent = agent_of(script)
        assert [name for name, _ in agent.named_parameters()] == ["theta", own]
        assert getattr(agent, own).unique(dim=0).shape[0] == TASKS
        W = agent.unpack(agent.weights())
        for name, x in W.items():
            if x[0].ndim == 3:  # experts and modules are draws of their own
                assert len(x[0].unique(dim=0)) == len(x[0]) > 1, name


# Soft Modularization, PaCo and MOORE; their networks and gradients are in test_varshare_ppo.py


@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_experts_become_orthonormal_and_span_what_they_did(apart):
    rng = torch.Generator().manual_seed(0)
    common, own = (torch.randn(*size, generator=rng).double() for size in ((2, 1, 5, 7), (2, 4, 5, 7)))
    u = (common + apart * own).requires_grad_()
    v = moore.gram_schmidt(u)
    products = torch.einsum("mksd,mjsd->mskj", v, v)
    torch.testing.assert_close(products, torch.eye(4).double().expand_as(products), rtol=0, atol=1e-4)
    for k in range(1, 5):  # expert k has nothing of those behind it, and lies on the side of what it was
        first = torch.einsum("mjsd,msd->mjs", v[:, :k], u[:, k - 1])
        rest = u[:, k - 1] - torch.einsum("mjs,mjsd->msd", first, v[:, :k])
        assert rest.norm() < 1e-5 * u.norm() and (first[:, -1] > 0).all()
    (grad,) = torch.autograd.grad(v[:, 1:].square().sum(), u)
    assert grad.abs().max() < 1e-3 / apart  # lengths are fixed
    assert moore.gram_schmidt(torch.zeros(1, 3, 1, 7)).isfinite().all()  # as at an observation of zeros


def test_modules_are_mixed_evenly_at_first_and_routing_depends_on_task_and_observation():
    agent = soft_modularization.Agent(
        probes.spaces(), settings(soft_modularization), torch.Generator().manual_seed(0)
    )
    W, e = agent.unpack(agent.weights()), torch.randn(TASKS, 8, HIDDEN[-1])
    P = soft_modularization.route(e, [], W, "actor")
    assert P.shape == (TASKS, 8, 2, 2)
    torch.testing.assert_close(P, torch.full_like(P, 0.5), rtol=0, atol=0.05)
    agent, obs = make_agent(soft_modularization), torch.randn(1, 2, probes.OBS).double().expand(TASKS, -1, -1)
    seen, route = [], soft_modularization.route

    def keep(*inputs):
        seen.append(route(*inputs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_modularization, "route", keep)
        agent.actor(agent.unpack(agent.weights()), obs)
    assert [P.shape[2:] for P in seen] == [(2, 2), (1, 2)]
    for P in seen:
        torch.testing.assert_close(P.sum(3), torch.ones_like(P[..., 0]))
        assert len(P.detach().flatten(0, 1).unique(dim=0)) == 2 * TASKS


@pytest.mark.parametrize("amount", [100.0, float("inf"), float("nan")])
def test_a_task_whose_loss_is_too_large_is_left_out_and_mixes_anew(amount):
    agent = make_agent(paco, dtype=torch.float32)
    args = settings(paco, max_loss=50.0, max_grad_norm=UNCLIPPED)
    b = random_batch(paco, agent, 20)
    without, _ = gradients(paco, agent, b, args)
    b.returns[1] += amount
    grads, stats = gradients(paco, agent, b, args)
    assert stats["losses/lost"].tolist() == [0, 1, 0]
    assert all(x.isfinite().all() for x in [*grads.values(), *stats.values()])
    assert not grads["w"][1].any()
    torch.testing.assert_close(grads["w"][[0, 2]], without["w"][[0, 2]])
    none, _ = gradients(paco, agent, b, settings(paco, max_loss=1e-9))
    assert not any(x.any() for x in none.values())

    before = agent.w.detach().clone()
    paco.mix_anew(agent, stats["losses/lost"] > 0, torch.Generator().manual_seed(0))
    assert torch.equal(agent.w[[0, 2]], before[[0, 2]])
    share = (agent.w[1] - before[0]) @ (before[2] - before[0]) / (before[2] - before[0]).square().sum()
    assert 0 < share < 1
    torch.testing.assert_close(agent.w[1], before[0] + share * (before[2] - before[0]))
    before = agent.w.detach().clone()
    for lost in (torch.ones(3), torch.zeros(3)):  # nobody to mix, nobody lost
        paco.mix_anew(agent, lost > 0, torch.Generator().manual_seed(0))
        assert torch.equal(agent.w, before)


def test_who_was_lost_in_any_minibatch_mixes_anew_once_after_the_update_phase(monkeypatch):
    agent, calls = make_agent(paco, dtype=torch.float32), []
    monkeypatch.setattr(paco, "mix_anew", lambda agent, lost, rng: calls.append(lost.tolist()))
    b = random_batch(paco, agent, 18)
    b.returns[2, 7] = 1e9  # in one of the minibatches
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    args = settings(paco, max_loss=50.0, num_minibatches=3, update_epochs=2)
    stats = probes.update(paco, agent, args, b, optimizer)
    assert calls == [[False, False, True]]
    torch.testing.assert_close(stats["losses/lost"], torch.tensor([0, 0, 1 / 3]))


# Independent


def train_alone(patch, m, num_tasks, drawn, **changes):
    """Weights at the end of a run on one task, with the m-th task's part of what a run on all drew."""
    noise, order, spread_seeds = iter(drawn["noise"]), iter(drawn["order"]), envs.runs.spread_seeds

    def seeds(seed, stream, n):
        return spread_seeds(seed, stream, num_tasks * n)[m * n : (m + 1) * n]

    patch.setattr(independent.Agent, "init_weights", lambda *_: drawn["weights"][m])
    patch.setattr(independent, "action_noise", lambda *_: next(noise)[:, m : m + 1])
    patch.setattr(torch, "randperm", lambda *_, **__: next(order))
    patch.setattr(envs.runs, "spread_seeds", seeds)
    return probes.load(run(independent, f"alone{m}", **changes))["agent"]


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e9], ids=["clipped", "not clipped"])
def test_independent_equals_separate_runs(monkeypatch, max_grad_norm):
    """Given the same initial weights, environment seeds, action noise and minibatches.

    Of one rollout and two steps: in more of them differences of rounding grow.
    """
    tasks, drawn = (4, 0, 7), {"weights": [], "noise": [], "order": []}

    def recorded(name, function):
        return lambda *args, **options: drawn[name].append(function(*args, **options)) or drawn[name][-1]

    changes = {"max_grad_norm": max_grad_norm, "norm_reward": True, "update_epochs": 1, "num_minibatches": 2}
    steps = 8 * 32
    with monkeypatch.context() as patch:
        patch.setattr(independent.Agent, "init_weights", recorded("weights", independent.Agent.init_weights))
        patch.setattr(independent, "action_noise", recorded("noise", independent.action_noise))
        patch.setattr(torch, "randperm", recorded("order", torch.randperm))
        folder = run(independent, "together", tasks=tasks, total_timesteps=3 * steps, **changes)
    together = probes.load(folder)["agent"]
    assert len(drawn["weights"]) == 3 and len(drawn["noise"]) == 1 and len(drawn["order"]) == 1
    for m, task in enumerate(tasks):
        with monkeypatch.context() as patch:
            alone = train_alone(patch, m, 3, drawn, tasks=(task,), total_timesteps=steps, **changes)
        start = torch.cat([x.flatten() for x in drawn["weights"][m].values()])
        assert not torch.allclose(alone["theta"][0], start, atol=1e-3)
        for name, x in alone.items():
            torch.testing.assert_close(together[name][m], x[0], rtol=1e-3, atol=3e-5)


# L2Soft


def without_noise(monkeypatch):
    monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.zeros_like(agent.mu))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_varshare_without_noise_and_kl_is_l2soft_without_penalty(monkeypatch, alpha):
    """In an update phase, by gradient descent."""
    without_noise(monkeypatch)
    results = []
    for script, zero in ((varshare, "beta"), (l2soft, "l2_coef")):
        args = settings(script, **{zero: 1e-12}, reptile_alpha=alpha, num_minibatches=2, max_grad_norm=0.3)
        agent = make_agent(script)
        stats = probes.update(script, agent, args, random_batch(l2soft, make_agent(l2soft), 18))
        results.append((stats, agent.theta.detach(), agent.mu.detach()))
    before = make_agent(l2soft)
    assert not torch.allclose(results[1][1], before.theta, atol=1e-4)
    assert not torch.allclose(results[1][2], before.mu, atol=1e-4)
    torch.testing.assert_close(*results)


def test_a_rollout_of_varshare_without_noise_and_kl_is_l2softs_without_penalty(monkeypatch):
    """A run of one rollout and two steps, because in more of them differences of rounding grow."""
    without_noise(monkeypatch)
    changes = {"total_timesteps": 2560, "update_epochs": 1, "num_minibatches": 2, "reptile_alpha": 0.3}
    ours = run(varshare, "varshare", beta=1e-12, **changes)
    theirs = run(l2soft, "l2soft", l2_coef=0.0, **changes)
    agent, expected = probes.load(ours)["agent"], probes.load(theirs)["agent"]
    assert expected["mu"].abs().max() > 1e-3
    for name in expected:
        torch.testing.assert_close(agent[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("env_id", ["cartpole10", *ENVIRONMENTS["ppo"]])
def test_penalties_are_equal_in_every_environment(env_id):
    """lambda of VarShare, which is beta / (2 N_m sigma_prior^2), is L2Soft's and that of a fixed sigma."""
    scripts = varshare, l2soft, probes.load_script("fixed_sigma_ppo")
    ours, *others = (
        script.Args(**ENVIRONMENTS["ppo"].get(env_id, {}), **script.ENV_DEFAULTS.get(env_id, {}))
        for script in scripts
    )
    penalty = ours.beta / (2 * ours.samples_per_task * ours.sigma_prior**2)
    assert [x.l2_coef for x in others] == pytest.approx([penalty] * 2, rel=0.05)


# PCGrad and CAGrad: gradients of the tasks to a gradient of theta


def random_gradients(num_tasks, num_params=40, seed=0):
    return torch.randn(num_tasks, num_params, generator=torch.Generator().manual_seed(seed)).double()


def nearly_opposed(num_tasks):
    g = random_gradients(num_tasks)
    signs = torch.where(torch.arange(num_tasks) % 2 == 0, 1.0, -0.6).double()
    return signs.unsqueeze(1) * g[0] + 1e-3 * g


GRADIENTS = {
    "random": random_gradients,
    "agreeing": lambda m: random_gradients(m) + 3 * random_gradients(1, seed=1),
    "nearly parallel": lambda m: random_gradients(1, seed=1) + 1e-5 * random_gradients(m),
    "parallel": lambda m: random_gradients(1, seed=1) * torch.linspace(0.5, 2, m).double().unsqueeze(1),
    "nearly opposed": nearly_opposed,
    "very unequal": lambda m: random_gradients(m) * torch.logspace(-3, 3, m).double().unsqueeze(1),
    "some zero": lambda m: random_gradients(m) * (torch.arange(m) % 3 != 0).double().unsqueeze(1),
    "in few dimensions": lambda m: random_gradients(m, 3),
}
KINDS = pytest.mark.parametrize("kind", GRADIENTS)


def algorithm_1(grads, order):
    """Yu et al. 2020, Alg. 1, word for word; order[i] are the other tasks as task i visits them."""
    projected = grads.clone()
    for i in range(len(grads)):
        for j in order[i]:
            dot = projected[i] @ grads[j]
            if dot < 0:
                projected[i] -= dot / (grads[j] @ grads[j]) * grads[j]
    return projected


def random_keys(num_tasks, seed=0):
    return torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(seed))


def visits(keys):
    """The order in which `pcgrad` visits, by random keys."""
    return [[j for j in row.argsort().tolist() if j != i] for i, row in enumerate(keys)]


@pytest.mark.parametrize("num_tasks", [2, 3, 10, 50])
@KINDS
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_pcgrad_is_algorithm_1(kind, num_tasks, scale):
    grads = scale * GRADIENTS[kind](num_tasks)
    keys = random_keys(num_tasks, 3)
    expected = algorithm_1(grads, visits(keys)).sum(0)
    result = pcgrad.pcgrad(grads, keys)
    assert (result - expected).norm() <= 1e-6 * expected.norm() + 1e-12 * grads.norm()
    assert pcgrad.pcgrad(grads.float(), keys).dtype == torch.float32


def test_pcgrad_projects_onto_the_original_gradients():
    """Three gradients in the plane: with projected partners in the place of the originals it would differ."""
    grads = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]]).double()
    keys = random_keys(3)
    order, results = visits(keys), pcgrad.pcgrad(grads, keys)
    expected = []
    for i in range(3):
        g = grads[i]
        for j in order[i]:
            g = g - min(g @ grads[j], 0) / (grads[j] @ grads[j]) * grads[j]
        expected.append(g)
    torch.testing.assert_close(results, sum(expected))


def test_pcgrad_visits_in_a_fresh_random_order():
    grads = random_gradients(6, 4)
    results = torch.stack([pcgrad.pcgrad(grads, random_keys(6, seed)) for seed in range(20)])
    assert len(results.unique(dim=0)) > 10
    agent, results = make_agent(pcgrad), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        results.append(torch.stack([agent.draw_keys(generator) for _ in range(400)]))
    keys = results[0]
    assert torch.equal(*results) and keys.shape == (400, 2, TASKS, TASKS)
    for task, net in itertools.product(range(TASKS), range(2)):
        first, second = (j for j in range(TASKS) if j != task)
        orders = [tuple(visits(k)[task]) for k in keys[:, net]]
        assert 150 < orders.count((first, second)) < 250
    same = [visits(actor) == visits(critic) for actor, critic in keys]
    assert 25 < sum(same) < 80  # of 400, where two orders of three tasks agree in one case of eight


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_leaves_no_conflict_between_two_tasks(seed):
    grads = random_gradients(2, 5, seed)
    if grads[0] @ grads[1] > 0:
        grads[1] *= -1
    keys = random_keys(2)
    first, second = algorithm_1(grads, visits(keys))
    assert first @ grads[1] >= -1e-12 and second @ grads[0] >= -1e-12
    result = pcgrad.pcgrad(grads, keys)
    assert result @ grads[0] >= -1e-12 and result @ grads[1] >= -1e-12
    torch.testing.assert_close(result, first + second)
    grads[1] *= -1  # they agree: nothing changes
    torch.testing.assert_close(pcgrad.pcgrad(grads, keys), grads.sum(0))


def largest_worst_case(grads, c):
    """Of all d within c |g0| of the mean g0 the one with the largest min_m g_m . d.

    By SLSQP in this primal form, which is smooth: d = g0 + radius * basis u; maximise t under
    weight * t <= start + x u and |u| <= 1.
    """
    g = grads[grads.norm(dim=1) > 0].numpy()
    g0 = grads.mean(0).numpy()
    radius, size = c * np.linalg.norm(g0), np.linalg.norm(g, axis=1)
    basis, _ = np.linalg.qr(g.T)
    x, weight = (g @ basis) / size[:, None], size.min() / size
    start = x @ (basis.T @ g0) / radius
    constraints = [
        {
            "type": "ineq",
            "fun": lambda v: start + x @ v[:-1] - weight * v[-1],
            "jac": lambda _: np.column_stack([x, -weight]),
        },
        {
            "type": "ineq",
            "fun": lambda v: 0.5 * (1 - v[:-1] @ v[:-1]),
            "jac": lambda v: np.append(-v[:-1], 0),
        },
    ]
    best = scipy.optimize.minimize(
        lambda v: -v[-1],
        np.append(0.5 * x.mean(0), 0),
        jac=lambda v: np.append(np.zeros(len(v) - 1), -1),
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return torch.from_numpy(g0 + radius * basis @ best.x[:-1])


@pytest.mark.parametrize("num_tasks", [2, 3, 10, pytest.param(50, marks=pytest.mark.slow)])
@KINDS
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_cagrad_agrees_with_an_independent_solver(kind, num_tasks, c):
    grads = GRADIENTS[kind](num_tasks)
    expected, g0 = largest_worst_case(grads, c), grads.mean(0)
    for scale in (1e-6, 1.0, 1e6):
        result = cagrad.cagrad(scale * grads, c) / scale
        assert (result - expected).norm() <= 1e-3 * expected.norm()
        assert (result - g0).norm() == pytest.approx(c * g0.norm().item(), rel=1e-4)
        single = cagrad.cagrad((scale * grads).float(), c)
        assert single.dtype == torch.float32
        assert (single / scale - expected).norm() <= 1e-3 * expected.norm()


@KINDS
def test_cagrad_with_c_0_is_the_mean(kind):
    grads = GRADIENTS[kind](10)
    torch.testing.assert_close(cagrad.cagrad(grads, 0.0), grads.mean(0), rtol=1e-12, atol=0)


def test_cagrad_where_gradients_vanish_or_cancel():
    zero = torch.zeros(3, 5)
    assert torch.equal(cagrad.cagrad(zero, 0.5), torch.zeros(5))
    g = random_gradients(1, 5)
    assert cagrad.cagrad(torch.cat([g, -g]), 0.5).norm() < 1e-12
    torch.testing.assert_close(cagrad.cagrad(torch.cat([g, g]), 0.5), 1.5 * g[0])
    torch.testing.assert_close(cagrad.cagrad(g, 0.5), 1.5 * g[0])
    # the second task's only way up leads the third down: what is left is the first's, across
    plane = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.5, 0.0]]).double()
    torch.testing.assert_close(
        cagrad.cagrad(plane, 0.5), torch.tensor([0.0, 1 / 3]).double(), atol=1e-6, rtol=0
    )


def surgery_by_hand(method, grads, keys=None):
    """What the method makes of gradients (task, weight), scaled as Hard sharing's, which is the sum."""
    if method is pcgrad:
        return algorithm_1(grads, visits(keys)).sum(0)
    return TASKS * largest_worst_case(grads, 0.5)


@SURGERY
@pytest.mark.parametrize("freeze_theta", [False, True])
def test_surgery_is_of_the_tasks_gradients_of_actor_and_critic_apart(method, freeze_theta):
    """Heads keep their own gradient; then all is clipped as torch does."""
    agent, args = make_agent(method), settings(method, max_grad_norm=UNCLIPPED, freeze_theta=freeze_theta)
    agent.theta.requires_grad_(not freeze_theta)
    batch, keys = random_batch(method, agent, 20), draws(agent)
    weights, _ = probes.networks(agent, batch.obs)
    losses, expected_stats = probes.losses_task_by_task(agent, weights, batch, args)
    rows = torch.autograd.grad(losses.sum(), weights)[0]
    theta, heads = rows[:, : len(agent.theta)], rows[:, len(agent.theta) :]
    split = theta.split(len(agent.theta) // 2, 1)  # actor's and critic's hidden layers
    expected = torch.cat(
        [surgery_by_hand(method, g, *k) for g, k in zip(split, zip(*keys) if keys else [(), ()])]
    )
    grads, stats = gradients(method, agent, batch, *keys, args)
    assert list(grads) == ["heads"] if freeze_theta else ["theta", "heads"]
    torch.testing.assert_close(grads["heads"], heads)
    for name, x in expected_stats.items():
        torch.testing.assert_close(stats[name], x, check_dtype=False)
    for net, g in zip(("actor", "critic"), split, strict=True):
        conflicts = [[float(one @ other < 0) for other in g] for one in g]
        assert stats[f"varshare/conflicts/{net}"].tolist() == [sum(row) / (TASKS - 1) for row in conflicts]
    if not freeze_theta:
        assert (grads["theta"] - theta.sum(0)).norm() > 1e-2 * expected.norm()  # there was something to do
        assert (grads["theta"] - expected).norm() <= 1e-4 * expected.norm()
        args.max_grad_norm = 0.1
        clipped, _ = gradients(method, agent, batch, *keys, args)
        norm = torch.cat([x.flatten() for x in grads.values()]).norm()
        for name, x in clipped.items():
            torch.testing.assert_close(x, grads[name] * 0.1 / norm, rtol=1e-4, atol=1e-9)


@SURGERY
def test_surgery_is_in_every_minibatch_of_a_run(monkeypatch, method):
    """Recorded in a run without value loss, where the critic's gradients are 0."""
    name, calls = probes.stem(method).removesuffix("_ppo"), []
    monkeypatch.setattr(method, name, lambda *args: calls.append(args) or 0 * args[0].sum(0))
    folder = run(method, vf_coef=0.0, total_timesteps=2560, ent_coef=0.1)
    agent, _ = probes.load_agent(method, folder)
    suite = envs.make("cartpole10", 1)
    fresh = method.Agent(suite, method.Args(hidden_sizes=(16,)), torch.Generator().manual_seed(1))
    assert torch.equal(agent.theta, fresh.theta) and (agent.heads - fresh.heads).abs().max() > 1e-3
    assert len(calls) == 2 * 4 * 4 and all(grads.shape == (10, 16 * (4 + 1)) for grads, _ in calls)
    assert all(grads.any(1).all() for grads, _ in calls[::2])
    assert not any(grads.any() for grads, _ in calls[1::2])
    if method is pcgrad:  # a fresh order every time
        assert len(torch.stack([keys for _, keys in calls]).unique(dim=0)) == 2 * 4 * 4


def test_pcgrad_without_projection_and_cagrad_with_c_0_are_hard_sharing(monkeypatch):
    """In a run of one rollout and two steps, because in more of them differences of rounding grow."""
    monkeypatch.setattr(pcgrad, "pcgrad", lambda grads, _: grads.sum(0))
    changes = {"total_timesteps": 2560, "update_epochs": 1, "num_minibatches": 2}
    reference = probes.load(run(hard_sharing, "hard_sharing", **changes))["agent"]
    for folder in (run(pcgrad, "sum", **changes), run(cagrad, "mean", cagrad_c=0.0, **changes)):
        trained = probes.load(folder)["agent"]
        for name in reference:
            torch.testing.assert_close(trained[name], reference[name], rtol=1e-3, atol=1e-4)
