"""The mathematics of the baselines: what each method adds to, or takes from, VarShare-PPO."""

import itertools

import numpy as np
import probes
import pytest
import scipy.optimize
import torch
from probes import (
    BOTH,
    HIDDEN,
    OBS,
    TASKS,
    draws,
    forward_task_by_task,
    make_agent,
    random_batch,
    run,
    settings,
    task_gradients,
)

import envs

NAMES = ("task_blind", "independent", "hard_sharing", "contextual", "l2soft", "pcgrad", "cagrad")
SCRIPTS = tuple(probes.load_script(f"baselines/{name}_ppo.py") for name in NAMES)
shared, independent, hard_sharing, contextual, l2soft, pcgrad, cagrad = SCRIPTS
varshare = probes.load_script("varshare_ppo.py")
SURGERY = pytest.mark.parametrize("method", [pcgrad, cagrad], ids=["pcgrad", "cagrad"])
UNCLIPPED = 1e9  # as --max-grad-norm

pytestmark = pytest.mark.usefixtures("elsewhere")


def per_task_gradients(script, agent, batch, x):
    """(task, *x.shape): the gradient of every task's loss by x, in one backward pass each."""
    losses, _ = script.ppo_loss(agent, agent.unpack(agent.weights()), batch, settings(script))
    return torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses])


def unclipped_gradients(script, agent, batch, **changes):
    args = settings(script, max_grad_norm=UNCLIPPED, **changes)
    return script.minibatch_gradients(agent, batch, *draws(agent), args)[0]


@BOTH
@pytest.mark.parametrize("script", [shared, independent, hard_sharing, pcgrad, cagrad, l2soft])
def test_batched_forward_equals_a_loop_over_tasks(script, space):
    agent = make_agent(script, space)
    rows = {
        shared: lambda m: [agent.theta],
        independent: lambda m: [agent.theta[m]],
        l2soft: lambda m: [agent.theta + agent.mu[m]],
    }.get(script, lambda m: [agent.theta, agent.heads[m]])
    weights = torch.stack([torch.cat(rows(m)) for m in range(TASKS)])
    torch.testing.assert_close(agent.weights(), weights)
    obs = torch.randn(TASKS, 40, OBS).double()
    out, values, logstd = forward_task_by_task(agent, weights, obs)
    W = agent.unpack(agent.weights())
    torch.testing.assert_close(script.mlp(obs, W, "actor"), out)
    torch.testing.assert_close(agent.policy(W, obs), out.softmax(2) if agent.discrete else out)
    torch.testing.assert_close(script.mlp(obs, W, "critic").squeeze(-1), values)
    torch.testing.assert_close(W.get("logstd", torch.zeros(TASKS, 0).double()), logstd)


PLAIN = [shared, independent, hard_sharing, contextual, l2soft]  # whose objective is a formula


@BOTH
@pytest.mark.parametrize("freeze_theta", [False, True])
@pytest.mark.parametrize("script", PLAIN)
def test_gradient_equals_autograds_of_the_objective(script, freeze_theta, space):
    changes = {"freeze_theta": True} if freeze_theta else {}
    if freeze_theta and not hasattr(script.Args, "freeze_theta"):
        assert script in (shared, independent)
        return
    agent = make_agent(script, space)
    args, batch = settings(script, **changes), random_batch(script, agent, 20)
    losses, _ = script.ppo_loss(agent, agent.unpack(agent.weights()), batch, args)
    total = losses.sum()
    if script is l2soft:
        total = total + args.l2_coef * agent.mu.square().sum()
    parameters = {name: x for name, x in agent.named_parameters() if not (freeze_theta and name == "theta")}
    expected = dict(zip(parameters, torch.autograd.grad(total, parameters.values()), strict=True))
    G = task_gradients(script, agent, agent.weights(), batch, args)
    for ours in (
        script.parameter_gradients(agent, G, args),
        unclipped_gradients(script, agent, batch, **changes),
    ):
        torch.testing.assert_close(ours, expected)


# Shared


def test_shared_is_blind_to_the_task():
    agent = make_agent(shared)
    assert [name for name, _ in agent.named_parameters()] == ["theta"]
    obs = torch.randn(1, 40, OBS).double().expand(TASKS, -1, -1)
    for out in forward_task_by_task(agent, agent.weights(), obs)[:2]:
        torch.testing.assert_close(out, out[:1].expand_as(out))


# Independent


def test_independent_agents_start_apart_and_every_one_gets_its_own_gradient():
    agent = independent.Agent(probes.spaces(), settings(independent), torch.Generator().manual_seed(1))
    assert agent.theta.unique(dim=0).shape[0] == TASKS
    agent = make_agent(independent)
    grads = per_task_gradients(independent, agent, random_batch(independent, agent, 20), agent.theta)
    for i, j in np.ndindex(TASKS, TASKS):
        assert grads[i, j].any() == (i == j)


def test_independent_clips_every_task_as_torch_does():
    agent = make_agent(independent)
    batch = random_batch(independent, agent, 20)
    grads = unclipped_gradients(independent, agent, batch)["theta"]
    norms = grads.norm(dim=1)
    low, high = norms.sort().values[:2]
    assert high > 1.01 * low
    max_norm = (low + high).item() / 2  # the first is not clipped, the others are
    args = settings(independent, max_grad_norm=max_norm)
    clipped = independent.minibatch_gradients(agent, batch, args)[0]["theta"]
    alone = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for x, g in zip(alone, grads, strict=True):
        x.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([x], max_norm)
    torch.testing.assert_close(clipped, torch.stack([x.grad for x in alone]))
    torch.testing.assert_close(clipped.norm(dim=1), norms.clamp(max=max_norm), rtol=1e-5, atol=0)


def test_independent_gradients_equal_those_of_every_task_alone():
    agent = make_agent(independent)
    batch, args = random_batch(independent, agent, 20), settings(independent, max_grad_norm=0.1)
    grads, stats = independent.minibatch_gradients(agent, batch, args)
    for m in range(TASKS):
        alone = make_agent(independent)
        alone.theta = torch.nn.Parameter(agent.theta[m : m + 1].detach().clone())
        its_batch = independent.Batch(*(x[m : m + 1] for x in batch))
        its_grads, its_stats = independent.minibatch_gradients(alone, its_batch, args)
        torch.testing.assert_close(its_grads["theta"][0], grads["theta"][m])
        torch.testing.assert_close(its_stats, {name: x[m : m + 1] for name, x in stats.items()})


def train_alone(patch, m, num_tasks, drawn, **changes):
    """Weights at the end of a run on one task, with the m-th task's part of what a run on all drew."""
    noise, order, spread_seeds = iter(drawn["noise"]), iter(drawn["order"]), envs.runs.spread_seeds

    def seeds(seed, stream, n):
        return spread_seeds(seed, stream, num_tasks * n)[m * n : (m + 1) * n]

    patch.setattr(independent.Agent, "init_weights", lambda *_: drawn["weights"][m])
    patch.setattr(independent.Agent, "action_noise", lambda *_: next(noise)[:, m : m + 1])
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
        patch.setattr(independent.Agent, "action_noise", recorded("noise", independent.Agent.action_noise))
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


# Hard sharing


def test_a_head_gets_no_gradient_from_another_task():
    for script in (hard_sharing, pcgrad, cagrad):
        agent = make_agent(script)
        batch = random_batch(script, agent, 20)
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
    W = agent.unpack(agent.weights())
    rows = {name: w.flatten(1).unique(dim=0).shape[0] for name, w in W.items() if name.endswith("weight")}
    apart = {"actor.2.weight", "critic.2.weight"}
    assert rows == {name: TASKS if name in apart else 1 for name in rows} and apart < rows.keys()
    heads = [x.flatten(1) for name, x in W.items() if ".2." in name or name == "logstd"]
    assert torch.equal(torch.cat(heads, 1), agent.heads)


# Contextual


@BOTH
@pytest.mark.parametrize("samples", [1, 40])
def test_the_embedding_is_concatenated_to_the_observation(space, samples):
    agent = make_agent(contextual, space, embedding_size=4)
    obs = torch.randn(TASKS, samples, OBS).double()
    inputs = torch.cat([obs, agent.embedding.unsqueeze(1).expand(-1, samples, -1)], 2)
    theta = agent.theta.expand(TASKS, -1)
    out, values, logstd = forward_task_by_task(agent, theta, inputs)
    W = agent.unpack(agent.weights())
    assert list(W)[-1] == "embedding"
    torch.testing.assert_close(agent.policy(W, obs), out.softmax(2) if agent.discrete else out)
    torch.testing.assert_close(contextual.mlp(obs, W, "critic").squeeze(-1), values)
    torch.testing.assert_close(W.get("logstd", torch.zeros(TASKS, 0).double()), logstd)


def test_embeddings_learn_and_tasks_end_apart():
    agent = make_agent(contextual)
    grads = per_task_gradients(contextual, agent, random_batch(contextual, agent, 20), agent.embedding)
    for i, j in np.ndindex(TASKS, TASKS):
        assert grads[i, j].any() == (i == j)
    folder = run(contextual)
    trained, _ = probes.load_agent(contextual, folder)
    fresh = contextual.Agent(envs.make("cartpole10", 1), contextual.Args(), torch.Generator().manual_seed(1))
    assert (trained.embedding - fresh.embedding).norm(dim=1).min() > 0.01
    assert torch.pdist(trained.embedding).min() > 0.05
    _, W = probes.load_agent(contextual, folder)
    values = contextual.mlp(torch.zeros(10, 1, 4), W, "critic")
    assert values.unique().numel() == 10


# L2Soft


def test_the_penalty_is_lambda_times_the_square_of_the_residuals():
    agent = make_agent(l2soft)
    batch = random_batch(l2soft, agent, 20)
    without, penalised = (unclipped_gradients(l2soft, agent, batch, l2_coef=c) for c in (0.0, 0.3))
    penalty = torch.autograd.grad(0.3 * agent.mu.square().sum(), agent.mu)[0]
    torch.testing.assert_close(penalised["mu"] - without["mu"], penalty)
    torch.testing.assert_close(penalised["theta"], without["theta"])


def test_recentring_changes_no_weights():
    agent = make_agent(l2soft)
    before, mean = agent.weights().detach(), agent.mu.detach().mean(0)
    l2soft.recentre(agent, 0.3)
    torch.testing.assert_close(agent.weights().detach(), before)
    torch.testing.assert_close(agent.mu.detach().mean(0), 0.7 * mean)


def without_noise(monkeypatch):
    monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.zeros_like(agent.mu))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_varshare_without_noise_and_kl_is_l2soft_without_penalty(monkeypatch, alpha):
    """In a minibatch and in an update, by gradient descent."""
    without_noise(monkeypatch)
    results = []
    for script, zero in ((varshare, "beta"), (l2soft, "l2_coef")):
        args = settings(script, **{zero: 1e-12}, reptile_alpha=alpha, num_minibatches=2, max_grad_norm=0.3)
        agent = make_agent(script)
        batch = random_batch(l2soft, make_agent(l2soft), 18)
        grads, *_, stats = script.minibatch_gradients(agent, batch, *draws(agent), args)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
        rng = torch.Generator().manual_seed(0)
        logs = script.update(agent, optimizer, batch, script.minibatch_gradients, args, rng)
        state = {name: x for name, x in agent.state_dict().items() if name in ("theta", "mu")}
        results.append((grads, stats, logs, state))
    before = make_agent(l2soft).state_dict()
    assert all(not torch.allclose(results[1][3][name], before[name], atol=1e-4) for name in ("mu", "theta"))
    torch.testing.assert_close(*results)


def test_a_rollout_of_varshare_without_noise_and_kl_is_l2softs_without_penalty(monkeypatch):
    """A run of one rollout and two steps, as in more of them differences of rounding grow."""
    without_noise(monkeypatch)
    changes = {"total_timesteps": 2560, "update_epochs": 1, "num_minibatches": 2, "reptile_alpha": 0.3}
    ours = run(varshare, "varshare", beta=1e-12, **changes)
    theirs = run(l2soft, "l2soft", l2_coef=0.0, **changes)
    agent, expected = probes.load(ours)["agent"], probes.load(theirs)["agent"]
    assert expected["mu"].abs().max() > 1e-3
    for name in expected:
        torch.testing.assert_close(agent[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("env_id", ["cartpole10", *varshare.ENV_DEFAULTS])
def test_penalties_are_equal_in_every_environment(env_id):
    """lambda of VarShare, which is beta / (2 N_m sigma_prior^2), is L2Soft's and that of a fixed sigma."""
    fixed = probes.load_script("studies/posterior/varshare_fixed_sigma_ppo.py")
    ours, *others = (x.Args(**x.ENV_DEFAULTS.get(env_id, {})) for x in (varshare, l2soft, fixed))
    penalty = ours.beta / (2 * ours.samples_per_task * ours.sigma_prior**2)
    assert [x.l2_coef for x in others] == pytest.approx([penalty] * 2, rel=0.05)


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


def random_keys(num_tasks, seed=0):
    return torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(seed))


def visits(keys):
    """The order in which `pcgrad` visits, by random keys."""
    return [[j for j in row.argsort().tolist() if j != i] for i, row in enumerate(keys)]


@CASES
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
@pytest.mark.parametrize("freeze_theta", [False, True])
def test_surgery_is_of_the_gradients_of_one_backward_pass_each(method, freeze_theta):
    agent = make_agent(method)
    batch = random_batch(method, agent, 20)
    theta = per_task_gradients(method, agent, batch, agent.theta)
    split = theta.split(len(agent.theta) // 2, 1)  # actor's and critic's hidden layers
    if method is pcgrad:
        [keys] = draws(agent)
        expected = torch.cat([algorithm_1(g, visits(k)).sum(0) for g, k in zip(split, keys, strict=True)])
    else:  # scaled as Hard sharing's, which is the sum
        expected = TASKS * torch.cat([largest_worst_case(g, 0.5) for g in split])
    heads = per_task_gradients(method, agent, batch, agent.heads).sum(0)  # each of one task only
    grads = unclipped_gradients(method, agent, batch, freeze_theta=freeze_theta)
    assert list(grads) == ["heads"] if freeze_theta else ["theta", "heads"]
    torch.testing.assert_close(grads["heads"], heads)
    if not freeze_theta:
        assert (grads["theta"] - theta.sum(0)).norm() > 1e-2 * expected.norm()  # there was something to do
        assert (grads["theta"] - expected).norm() <= 1e-4 * expected.norm()


@SURGERY
def test_surgery_is_on_the_hidden_layers_of_actor_and_critic_apart(monkeypatch, method):
    """Recorded in a run without value loss, where the critic's gradients are 0."""
    name, calls = method.Args.exp_name.removesuffix("_ppo"), []
    monkeypatch.setattr(method, name, lambda *args: calls.append(args) or args[0].sum(0))
    run(method, vf_coef=0.0, total_timesteps=2560, ent_coef=0.1)
    hidden = 64 * (4 + 1) + 64 * (64 + 1)
    assert len(calls) == 2 * 4 * 4 and all(grads.shape == (10, hidden) for grads, _ in calls)
    assert all(grads.any(1).all() for grads, _ in calls[::2])
    assert not any(grads.any() for grads, _ in calls[1::2])
    if method is pcgrad:  # a fresh order every time
        assert len(torch.stack([keys for _, keys in calls]).unique(dim=0)) == 2 * 4 * 4


def test_pcgrad_without_projection_and_cagrad_with_c_0_are_hard_sharing(monkeypatch):
    agent = make_agent(hard_sharing)
    batch = random_batch(hard_sharing, agent, 20)
    expected = unclipped_gradients(hard_sharing, agent, batch)
    torch.testing.assert_close(unclipped_gradients(cagrad, make_agent(cagrad), batch, cagrad_c=0.0), expected)
    monkeypatch.setattr(pcgrad, "pcgrad", lambda grads, _: grads.sum(0))
    torch.testing.assert_close(unclipped_gradients(pcgrad, make_agent(pcgrad), batch), expected)
    # and in a run of one rollout and two steps, as in more of them differences of rounding grow
    changes = {"total_timesteps": 2560, "update_epochs": 1, "num_minibatches": 2}
    reference = probes.load(run(hard_sharing, "hard_sharing", **changes))["agent"]
    for folder in (run(pcgrad, "sum", **changes), run(cagrad, "mean", cagrad_c=0.0, **changes)):
        trained = probes.load(folder)["agent"]
        for name in reference:
            torch.testing.assert_close(trained[name], reference[name], rtol=1e-3, atol=1e-4)


@SURGERY
def test_theta_follows_what_surgery_returns_and_heads_their_own_gradient(monkeypatch, method):
    name = method.Args.exp_name.removesuffix("_ppo")
    monkeypatch.setattr(method, name, lambda grads, _: torch.zeros_like(grads[0]))
    agent, _ = probes.load_agent(method, run(method, total_timesteps=2560))
    fresh = method.Agent(envs.make("cartpole10", 1), method.Args(), torch.Generator().manual_seed(1))
    assert torch.equal(agent.theta, fresh.theta) and (agent.heads - fresh.heads).abs().max() > 1e-3


@SURGERY
def test_share_of_conflicting_tasks(monkeypatch, method):
    agent = make_agent(method)
    batch = random_batch(method, agent, 20)
    _, stats = method.minibatch_gradients(agent, batch, *draws(agent), settings(method))
    theta = per_task_gradients(method, agent, batch, agent.theta)
    for net, grads in zip(("actor", "critic"), theta.split(len(agent.theta) // 2, 1), strict=True):
        conflicts = [[float(g @ other < 0) for other in grads] for g in grads]
        assert stats[f"varshare/conflicts/{net}"].tolist() == [sum(row) / (TASKS - 1) for row in conflicts]

    def losses(agent, W, *_):  # in the actor task 1 conflicts with all, in the critic nobody
        return W["actor.0.weight"][:, 0, 0] * torch.tensor([1, -1, 1]) + W["critic.0.weight"][:, 0, 0], {}

    monkeypatch.setattr(method, "ppo_loss", losses)
    _, stats = method.minibatch_gradients(agent, batch, *draws(agent), settings(method))
    assert stats["varshare/conflicts/actor"].tolist() == [0.5, 1.0, 0.5]
    assert stats["varshare/conflicts/critic"].tolist() == [0, 0, 0]
