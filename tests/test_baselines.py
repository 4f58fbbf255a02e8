"""The mathematics of the baselines: what each method adds to, or takes from, VarShare-PPO."""

import numpy as np
import probes
import pytest
import scipy.optimize
import torch
from probes import BOTH, HIDDEN, OBS, TASKS, forward_task_by_task, make_agent, make_batch, run, settings

independent, hard_sharing, contextual, l2soft, pcgrad, cagrad = map(probes.load_script, probes.SIBLINGS)
varshare = probes.load_script("varshare_ppo.py")
SURGERY = pytest.mark.parametrize("method", [pcgrad, cagrad], ids=["pcgrad", "cagrad"])

pytestmark = pytest.mark.usefixtures("elsewhere")


def per_task_gradients(script, agent, batch, x):
    """(task, *x.shape): the gradient of every task's loss by x, in one backward pass each."""
    losses, _ = script.ppo_loss(agent, agent.unpack(agent.weights()), batch, settings(script))
    return torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses])


@BOTH
@pytest.mark.parametrize("script", [independent, hard_sharing, pcgrad, cagrad, l2soft])
def test_batched_forward_equals_a_loop_over_tasks(script, space):
    agent = make_agent(script, space)
    rows = {
        independent: lambda m: [agent.theta[m]],
        l2soft: lambda m: [agent.theta + agent.mu[m]],
    }.get(script, lambda m: [agent.theta, agent.heads[m]])
    weights = torch.stack([torch.cat(rows(m)) for m in range(TASKS)])
    torch.testing.assert_close(agent.weights(), weights)
    obs = torch.randn(TASKS, 40, OBS).double()
    out, values, logstd = forward_task_by_task(agent, weights, obs)
    net = agent.unpack(agent.weights())
    policy = agent.policy(net, obs)
    torch.testing.assert_close(policy, out.softmax(2) if agent.discrete else out)
    torch.testing.assert_close(agent.value(net, obs), values)
    torch.testing.assert_close(net.logstd.squeeze(1), logstd)


# Independent


def test_independent_agents_start_apart_and_every_one_gets_its_own_gradient():
    agent = independent.Agent(probes.spaces(), settings(independent), torch.Generator().manual_seed(1))
    assert agent.theta.unique(dim=0).shape[0] == TASKS
    agent = make_agent(independent)
    grads = per_task_gradients(independent, agent, make_batch(independent, agent, 20), agent.theta)
    for i, j in np.ndindex(TASKS, TASKS):
        assert grads[i, j].any() == (i == j)


def test_independent_clips_every_task_as_torch_does():
    grad = torch.randn(TASKS, 50).double() * torch.tensor([[0.001], [1.0], [30.0]])
    alone = [torch.nn.Parameter(torch.zeros(50).double()) for _ in grad]
    for x, g in zip(alone, grad, strict=True):
        x.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([x], 0.5)
    independent.clip_grad_norm_per_task(grad, 0.5)
    torch.testing.assert_close(grad, torch.stack([x.grad for x in alone]))
    torch.testing.assert_close(grad.norm(dim=1)[1:], torch.tensor([0.5, 0.5]).double(), rtol=1e-5, atol=0)


def train_alone(patch, m, num_tasks, draws, **changes):
    """Weights at the end of a run on one task, with the m-th task's part of what a run on all drew."""
    noise, order, spread_seeds = iter(draws["noise"]), iter(draws["order"]), independent.spread_seeds

    def seeds(seed, stream, n):
        return spread_seeds(seed, stream, num_tasks * n)[m * n : (m + 1) * n]

    patch.setattr(independent.Agent, "init_weights", lambda *_: draws["weights"][m])
    patch.setattr(independent.Agent, "action_noise", lambda *_: next(noise)[:, m : m + 1])
    patch.setattr(torch, "randperm", lambda *_, **__: next(order))
    patch.setattr(independent, "spread_seeds", seeds)
    return probes.load(run(independent, f"alone{m}", **changes))["agent"]


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e9], ids=["clipped", "not clipped"])
def test_independent_equals_separate_runs(monkeypatch, max_grad_norm):
    """Given the same initial weights, environment seeds, action noise and minibatches."""
    tasks, draws = (4, 0, 7), {"weights": [], "noise": [], "order": []}

    def recorded(name, function):
        return lambda *args, **options: draws[name].append(function(*args, **options)) or draws[name][-1]

    changes = {"max_grad_norm": max_grad_norm, "norm_reward": True}
    steps = 5 * 8 * 32
    with monkeypatch.context() as patch:
        patch.setattr(independent.Agent, "init_weights", recorded("weights", independent.Agent.init_weights))
        patch.setattr(independent.Agent, "action_noise", recorded("noise", independent.Agent.action_noise))
        patch.setattr(torch, "randperm", recorded("order", torch.randperm))
        folder = run(independent, "together", tasks=tasks, total_timesteps=3 * steps, **changes)
    together = probes.load(folder)["agent"]
    assert len(draws["weights"]) == 3 and len(draws["noise"]) == 5 and len(draws["order"]) == 20
    for m, task in enumerate(tasks):
        with monkeypatch.context() as patch:
            alone = train_alone(patch, m, 3, draws, tasks=(task,), total_timesteps=steps, **changes)
        assert not torch.allclose(alone["theta"][0], draws["weights"][m], atol=1e-2)
        for name, x in alone.items():
            torch.testing.assert_close(together[name][m], x[0], rtol=1e-3, atol=1e-4)


# Hard sharing


def test_a_head_gets_no_gradient_from_another_task():
    for script in (hard_sharing, pcgrad, cagrad):
        agent = make_agent(script)
        batch = make_batch(script, agent, 20)
        heads = per_task_gradients(script, agent, batch, agent.heads)
        theta = per_task_gradients(script, agent, batch, agent.theta)
        for i, j in np.ndindex(TASKS, TASKS):
            assert heads[i, j].any() == (i == j)
        assert all(g.any() for g in theta)


@BOTH
def test_heads_are_the_output_layers_and_start_apart(space):
    agent = hard_sharing.Agent(probes.spaces(space), settings(hard_sharing), torch.Generator().manual_seed(1))
    out = agent.act_dim
    assert agent.heads.shape == (TASKS, (HIDDEN[-1] + 1) * (out + 1) + (0 if agent.discrete else out))
    net = agent.unpack(agent.weights())
    for *hidden, (w, _) in (net.actor, net.critic):
        assert w.unique(dim=0).shape[0] == TASKS
        assert all(w.unique(dim=0).shape[0] == 1 for w, _ in hidden)


# Contextual


@BOTH
@pytest.mark.parametrize("samples", [1, 40])
def test_the_embedding_is_concatenated_to_the_observation(space, samples):
    agent = make_agent(contextual, space, embedding_size=4)
    obs = torch.randn(TASKS, samples, OBS).double()
    inputs = torch.cat([obs, agent.embedding.unsqueeze(1).expand(-1, samples, -1)], 2)
    theta = agent.theta.expand(TASKS, -1)
    out, values, logstd = forward_task_by_task(agent, theta, inputs)
    net = agent.unpack(agent.weights())
    torch.testing.assert_close(agent.policy(net, obs), out.softmax(2) if agent.discrete else out)
    torch.testing.assert_close(agent.value(net, obs), values)
    torch.testing.assert_close(net.logstd.squeeze(1), logstd)


def test_embeddings_learn_and_tasks_end_apart():
    agent = make_agent(contextual)
    grads = per_task_gradients(contextual, agent, make_batch(contextual, agent, 20), agent.embedding)
    for i, j in np.ndindex(TASKS, TASKS):
        assert grads[i, j].any() == (i == j)
    folder = run(contextual)
    trained, _ = probes.load_agent(contextual, folder)
    fresh = contextual.Agent(
        probes.envs.make("cartpole10", 1), contextual.Args(), torch.Generator().manual_seed(1)
    )
    assert (trained.embedding - fresh.embedding).norm(dim=1).min() > 0.01
    assert torch.pdist(trained.embedding).min() > 0.5
    _, net = probes.load_agent(contextual, folder)
    values = trained.value(net, torch.zeros(10, 1, 4))
    assert values.unique().numel() == 10


# L2Soft


def test_the_penalty_is_lambda_times_the_square_of_the_residuals():
    agent = make_agent(l2soft)
    batch = make_batch(l2soft, agent, 20)
    losses = [l2soft.objective(agent, batch, settings(l2soft, l2_coef=c))[0] for c in (0.0, 0.3)]
    torch.testing.assert_close(losses[1] - losses[0], 0.3 * agent.mu.square().sum())
    grads = [torch.autograd.grad(loss, agent.mu)[0] for loss in losses]
    torch.testing.assert_close(grads[1] - grads[0], 0.6 * agent.mu)


def test_recentring_changes_no_weights():
    agent = make_agent(l2soft)
    before, mean = agent.weights().detach(), agent.mu.detach().mean(0)
    l2soft.recentre(agent, 0.3)
    torch.testing.assert_close(agent.weights().detach(), before)
    torch.testing.assert_close(agent.mu.detach().mean(0), 0.7 * mean)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_varshare_without_noise_and_kl_is_l2soft_without_penalty(monkeypatch, alpha):
    noise = torch.Generator().manual_seed(0)  # of its own: the other draws must be the same
    monkeypatch.setattr(
        varshare.Agent, "draw_noise", lambda agent, rng: torch.randn(agent.mu.shape, generator=noise)
    )
    changes = {"beta": 0.0, "sigma_init": 1e-12, "reptile_alpha": alpha}
    ours = run(varshare, "varshare", **changes)
    theirs = run(l2soft, "l2soft", l2_coef=0.0, reptile_alpha=alpha)
    agent, expected = probes.load(ours)["agent"], probes.load(theirs)["agent"]
    assert expected["mu"].abs().max() > 0.01
    for name in expected:
        torch.testing.assert_close(agent[name], expected[name], rtol=1e-5, atol=1e-6)


def test_l2soft_recentres_after_every_update_phase():
    changes = {"l2_coef": 0.0, "total_timesteps": 5120}
    plain, moved = (
        probes.load(run(l2soft, str(alpha), reptile_alpha=alpha, **changes))["agent"] for alpha in (0.0, 1.0)
    )
    assert plain["mu"].mean(0).abs().max() > 1e-3 and moved["mu"].mean(0).abs().max() < 1e-6


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
CASES = pytest.mark.parametrize("num_tasks", [2, 3, 10, 50])
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


def visits(num_tasks, generator):
    """The order that `pcgrad` draws."""
    keys = torch.rand(num_tasks, num_tasks, generator=generator)
    return [[j for j in row.argsort().tolist() if j != i] for i, row in enumerate(keys)]


@CASES
@KINDS
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_pcgrad_is_algorithm_1(kind, num_tasks, scale):
    grads = scale * GRADIENTS[kind](num_tasks)
    expected = algorithm_1(grads, visits(num_tasks, torch.Generator().manual_seed(3))).sum(0)
    result = pcgrad.pcgrad(grads, torch.Generator().manual_seed(3))
    assert (result - expected).norm() <= 1e-6 * expected.norm() + 1e-12 * grads.norm()
    assert pcgrad.pcgrad(grads.float(), torch.Generator()).dtype == torch.float32


def test_pcgrad_projects_onto_the_original_gradients():
    """Three gradients in the plane: with projected partners in the place of the originals it would differ."""
    grads = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]]).double()
    generator = torch.Generator().manual_seed(0)
    order, results = visits(3, torch.Generator().manual_seed(0)), pcgrad.pcgrad(grads, generator)
    expected = []
    for i in range(3):
        g = grads[i]
        for j in order[i]:
            g = g - min(g @ grads[j], 0) / (grads[j] @ grads[j]) * grads[j]
        expected.append(g)
    torch.testing.assert_close(results, sum(expected))


def test_pcgrad_visits_in_a_fresh_random_order():
    grads, generator = random_gradients(6, 4), torch.Generator().manual_seed(0)
    results = torch.stack([pcgrad.pcgrad(grads, generator) for _ in range(20)])
    assert len(results.unique(dim=0)) > 10
    again = torch.Generator().manual_seed(0)
    assert torch.equal(results, torch.stack([pcgrad.pcgrad(grads, again) for _ in range(20)]))
    orders = [tuple(visits(3, generator)[0]) for _ in range(400)]
    assert 150 < orders.count((1, 2)) < 250


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_leaves_no_conflict_between_two_tasks(seed):
    grads = random_gradients(2, 5, seed)
    if grads[0] @ grads[1] > 0:
        grads[1] *= -1
    order = visits(2, torch.Generator())
    first, second = algorithm_1(grads, order)
    assert first @ grads[1] >= -1e-12 and second @ grads[0] >= -1e-12
    result = pcgrad.pcgrad(grads, torch.Generator())
    assert result @ grads[0] >= -1e-12 and result @ grads[1] >= -1e-12
    torch.testing.assert_close(result, first + second)
    grads[1] *= -1  # they agree: nothing changes
    torch.testing.assert_close(pcgrad.pcgrad(grads, torch.Generator()), grads.sum(0))


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


@CASES
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


@SURGERY
def test_gradients_of_all_tasks_equal_one_backward_pass_each(method):
    agent = make_agent(method)
    batch = make_batch(method, agent, 20)
    weights = agent.weights()
    weights.retain_grad()
    method.objective(agent, weights, batch, settings(method))[0].backward()
    expected = per_task_gradients(method, agent, batch, agent.theta)
    torch.testing.assert_close(weights.grad[:, : len(agent.theta)], expected)
    torch.testing.assert_close(agent.theta.grad, expected.sum(0))  # before the surgery


@SURGERY
def test_surgery_is_on_the_hidden_layers_of_actor_and_critic_apart(monkeypatch, method):
    """Recorded in a run without value loss, where the critic's gradients are 0."""
    name, calls = method.Args.exp_name.removesuffix("_ppo"), []
    monkeypatch.setattr(method, name, lambda grads, *_: calls.append(grads.clone()) or grads.sum(0))
    run(method, vf_coef=0.0, total_timesteps=2560, ent_coef=0.1)
    hidden = 64 * (4 + 1) + 64 * (64 + 1)
    assert len(calls) == 2 * 4 * 4 and all(grads.shape == (10, hidden) for grads in calls)
    assert all(grads.any(1).all() for grads in calls[::2]) and not any(grads.any() for grads in calls[1::2])


def test_pcgrad_without_projection_and_cagrad_with_c_0_are_hard_sharing(monkeypatch):
    reference = run(hard_sharing, "hard_sharing")
    with monkeypatch.context() as patch:
        patch.setattr(pcgrad, "pcgrad", lambda grads, _: grads.sum(0))
        folders = [run(pcgrad, "sum"), run(cagrad, "mean", cagrad_c=0.0)]
    for folder in folders:
        agent, expected = probes.load(folder)["agent"], probes.load(reference)["agent"]
        for name in expected:
            torch.testing.assert_close(agent[name], expected[name], rtol=1e-3, atol=1e-4)


@SURGERY
def test_theta_follows_what_surgery_returns_and_heads_their_own_gradient(monkeypatch, method):
    name = method.Args.exp_name.removesuffix("_ppo")
    monkeypatch.setattr(method, name, lambda grads, _: torch.zeros_like(grads[0]))
    agent, _ = probes.load_agent(method, run(method, total_timesteps=2560))
    fresh = method.Agent(probes.envs.make("cartpole10", 1), method.Args(), torch.Generator().manual_seed(1))
    assert torch.equal(agent.theta, fresh.theta) and (agent.heads - fresh.heads).abs().max() > 1e-3


@SURGERY
def test_share_of_conflicting_tasks(method):
    agent = make_agent(method)
    n = len(agent.theta) // 2
    grads = torch.zeros_like(agent.weights())
    grads[:, 0], grads[:, n] = torch.tensor([1.0, -1.0, 1.0]), 1.0  # in the actor task 1 conflicts with all
    metrics = method.method_metrics(agent, grads)
    assert metrics["varshare/conflicts/actor"][0].tolist() == [0.5, 1.0, 0.5]
    assert metrics["varshare/conflicts/critic"][0].tolist() == [0, 0, 0]
