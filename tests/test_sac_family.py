"""The siblings of VarShare-SAC: each method's gradients and updates, and what it learns."""

import re
from functools import partial

import numpy as np
import probes
import pytest
import torch
from probes import BOTH, TASKS
from test_baselines import surgery_by_hand
from test_variants import residuals
from test_varshare_sac import losses_task_by_task
from torch.distributions import Normal, kl_divergence

from envs.models import agent_of_task

varshare, lora, reptile = map(probes.load_script, ("varshare_sac.py", "lora_sac", "reptile_sac"))
BASELINES = {name: probes.load_script(name) for name in probes.SAC_SIBLINGS}
l2soft, independent, hard_sharing, pcgrad, cagrad = (
    BASELINES[f"baselines/{x}_sac.py"] for x in ("l2soft", "independent", "hard_sharing", "pcgrad", "cagrad")
)
NAMES = [*BASELINES, "variants/varshare_lora_sac.py", "variants/varshare_reptile_sac.py"]
OF_SAC = [x for x in NAMES if "brc" not in x]  # whose losses are the trunk's; BRC's are in test_brc.py
KEPT = ("obs_norm.sums", "obs_norm.mean", "obs_norm.std")  # of all tasks together
LEARNED = dict.fromkeys(NAMES, 70) | {"baselines/task_blind_sac.py": 40}
STORED = torch.tensor(50.0).double()

pytestmark = pytest.mark.usefixtures("elsewhere")


def weights_by_hand(agent, noise=0.0):
    """Weights of every task (task, weight), by each method's formula."""
    if hasattr(agent, "factors"):
        return agent.theta + residuals(agent, agent.mu + agent.sigma * noise)
    if hasattr(agent, "mu"):
        return agent.theta + agent.mu
    if hasattr(agent, "w"):
        return torch.stack([sum(w * theta for w, theta in zip(ws, agent.theta)) for ws in agent.w])
    if agent.theta.ndim == 2:
        return agent.theta.clone()
    names = [name for name in ("heads", "embedding", "embeddings") if hasattr(agent, name)]
    own = getattr(agent, *names) if names else torch.zeros(TASKS, 0).double()
    return torch.stack([torch.cat((agent.theta, row)) for row in own])


def penalty(agent, args):
    """What a method adds to the losses."""
    if hasattr(args, "factor_prior"):
        q, p = Normal(agent.mu, agent.sigma), Normal(0.0, args.factor_prior)
        return args.beta / STORED * kl_divergence(q, p).sum()
    return args.l2_coef / STORED * agent.mu.square().sum() if hasattr(args, "l2_coef") else 0.0


def small(agent):
    """The agent with smaller weights: atanh, in the log-probability of a saturated action, is rough."""
    with torch.no_grad():
        for name, x in agent.named_parameters():
            x *= 1.0 if name == "log_alpha" else 0.3
    return agent


@BOTH
@pytest.mark.parametrize("name", [x for x in OF_SAC if "reptile" not in x])
def test_gradients_are_those_of_each_methods_objective(monkeypatch, name, space):
    """All networks are computed task by task; surgery is of actor's and critics' shared weights apart."""
    script, rows = probes.load_script(name), []
    agent = small(probes.make_agent(script, space))
    args = probes.settings(script, reward_scale=0.7, gamma=0.9)
    target, b = probes.target_of(agent), probes.random_transitions(script, agent, 40)
    draws = probes.draws(agent)
    stored = [STORED] if hasattr(args, "beta") or hasattr(args, "l2_coef") else []
    noise = draws[0] if script is lora else 0.0
    weights = weights_by_hand(agent, noise)
    losses = losses_task_by_task(agent, weights_by_hand(target), weights, b, args)
    total = sum(x.sum() for x in losses)
    names, parameters = zip(*agent.named_parameters())
    expected = torch.autograd.grad(total + penalty(agent, args), parameters, retain_graph=True)
    expected = dict(zip(names, expected))
    if script in (pcgrad, cagrad):
        (G,) = torch.autograd.grad(total, weights, retain_graph=True)
        shared = [x for x in agent.shapes if ".2." not in x]
        sizes = [sum(agent.shapes[x].numel() for x in shared if x.startswith(y)) for y in ("actor", "critic")]
        assert sum(sizes) == len(agent.theta)
        parts = G[:, : len(agent.theta)].split(sizes, 1)
        keys = draws[0] if script is pcgrad else [None, None]
        by_hand = [
            surgery_by_hand(probes.load_script(f"baselines/{x}_ppo.py"), g, *k)
            for x in [probes.stem(script).removesuffix("_sac")]
            for g, k in zip(parts, [(k,) if k is not None else () for k in keys])
        ]
        expected["theta"] = torch.cat(by_hand)
        assert (expected["theta"] - G[:, : len(agent.theta)].sum(0)).norm() > 1e-2 * expected["theta"].norm()
    if script is lora:
        monkeypatch.setattr(lora, "learn_sigma", lambda agent, G, *rest: rows.append(G.clone()))
    inputs = target, b, *draws, *stored, args
    grads, (stats, _) = probes.gradients(script, agent, *inputs)
    assert grads.keys() == expected.keys()
    if script is lora:  # learned from the gradient by what is a task's own, before the KL
        kl = args.beta / STORED / args.factor_prior**2 * agent.mu.detach()
        torch.testing.assert_close(rows, [expected["mu"] - kl])
    for part, x in expected.items():
        assert (grads[part] - x).norm() <= (1e-4 if script is cagrad else 1e-6) * x.norm(), part
    for part, x in zip(("qf_loss", "actor_loss", "alpha_loss"), losses):
        torch.testing.assert_close(stats[f"losses/{part}"], x.detach())
    assert not any(x.requires_grad for x in stats.values())
    if hasattr(args, "freeze_theta"):
        agent.theta.requires_grad_(False)
        args.freeze_theta = True
        frozen, _ = probes.gradients(script, agent, *inputs)
        del grads["theta"]
        torch.testing.assert_close(frozen, grads)


def one_update(script, agent, args, transitions=60, seed=0):
    """An update by gradient descent, of agent and target; returns the target, and statistics."""
    space = probes.DISCRETE if agent.discrete else probes.BOX
    buffer = script.ReplayBuffer(probes.spaces(space), transitions // 2, torch.device("cpu"))
    buffer.data = buffer.data.double()
    rng = torch.Generator().manual_seed(3)
    for _ in range(transitions // 2):
        obs, next_obs = torch.randn(2, TASKS, 2, probes.OBS, generator=rng).double()
        actions = torch.rand(TASKS, 2, agent.act_dim, generator=rng).double()
        actions = (4 * actions[..., 0]).floor() if agent.discrete else actions
        buffer.add(obs, next_obs, actions, obs[..., 0], torch.zeros(TASKS, 2).double())
    target = probes.target_of(agent)
    more, parameters = [], list(agent.parameters())
    if script is reptile:
        ones = [(agent_of_task(agent, m), agent_of_task(target, m)) for m in range(TASKS)]
        more, parameters = [ones], [agent.theta, *(x for one, _ in ones for x in (one.mu, one.log_alpha))]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    before = probes.copy.deepcopy(target)
    rng = torch.Generator().manual_seed(seed)
    stats = script.update(agent, target, *more, optimizer, buffer, script.minibatch_backward, args, rng)
    for old, new, now in zip(before.parameters(), target.parameters(), agent.parameters()):
        torch.testing.assert_close(new, old.lerp(now, args.tau))
    return target, stats


@pytest.mark.parametrize("name", ["varshare_sac.py", "baselines/l2soft_sac.py"])
def test_recentring_changes_no_weights_and_no_targets(name):
    """In an update, with and without it: only theta and mu differ, in the agent and in the target."""
    script, results = probes.load_script(name), []
    for alpha in (0.0, 0.3):
        agent = probes.make_agent(script)
        target, _ = one_update(script, agent, probes.settings(script, reptile_alpha=alpha))
        results.append((agent, target))
    (agent, target), (moved, moved_target) = results
    assert (agent.theta - moved.theta).abs().max() > 0.01
    assert (target.theta - moved_target.theta).abs().max() > 1e-4
    torch.testing.assert_close(moved.weights(), agent.weights())
    torch.testing.assert_close(moved_target.weights(), target.weights())


def test_l2soft_is_varshare_without_noise_at_equal_lambda(monkeypatch):
    """lambda / N_m |mu|^2 is the part of beta / N_m KL that mu has a part in."""
    monkeypatch.setattr(varshare.Agent, "draw_noise", lambda agent, rng: torch.zeros_like(agent.mu))
    ours, theirs = probes.make_agent(varshare), probes.make_agent(l2soft)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    beta, prior = 0.7, 0.3
    one_update(varshare, ours, probes.settings(varshare, beta=beta, sigma_prior=prior))
    one_update(l2soft, theirs, probes.settings(l2soft, l2_coef=beta / (2 * prior**2)))
    torch.testing.assert_close(dict(theirs.named_parameters()), dict(ours.named_parameters()))
    a, b = varshare.Args(), l2soft.Args()  # and so it is by default
    assert b.l2_coef == pytest.approx(a.beta / (2 * a.sigma_prior**2), rel=0.05)
    for env_id, own in varshare.ENV_DEFAULTS.items():
        lander = l2soft.make_args(env_id).l2_coef
        assert lander == pytest.approx(own["beta"] / (2 * own["sigma_prior"] ** 2))


def test_pcgrad_without_projection_and_cagrad_with_c_0_are_hard_sharing(monkeypatch):
    monkeypatch.setattr(pcgrad, "pcgrad", lambda grads, _: grads.sum(0))
    results = {}
    for script, changes in ((hard_sharing, {}), (pcgrad, {}), (cagrad, {"cagrad_c": 0.0})):
        agent = probes.make_agent(script)
        one_update(script, agent, probes.settings(script, **changes))
        results[script] = dict(agent.named_parameters())
    torch.testing.assert_close(results[pcgrad], results[hard_sharing])
    torch.testing.assert_close(results[cagrad], results[hard_sharing])


def test_loras_sigma_has_the_prior_of_the_factors():
    agent, args = probes.make_agent(lora, rank=2), probes.settings(lora, rank=2, beta=0.7)
    G, h = torch.randn(agent.mu.shape, generator=torch.Generator().manual_seed(0)).double(), args.batch_size
    lora.learn_sigma(agent, G, STORED, args)
    h = h / (1 + 0.7 * h / 50) * G.square()
    torch.testing.assert_close(agent.sigma, (50 * h / 0.7 + 1 / args.factor_prior**2).rsqrt())


@BOTH
@pytest.mark.parametrize("norm_value", [False, True])
def test_turns_are_varshares_updates_of_single_tasks(monkeypatch, space, norm_value):
    """In random order, each on what the turns before left of theta; then theta moves towards the task."""
    agent = probes.make_agent(reptile, space, norm_value=norm_value)
    agent.value_norm.see(torch.arange(12.0).double().view(TASKS, 4))
    args = probes.settings(reptile, reptile_alpha=0.3, norm_value=norm_value)
    start, target = probes.copy.deepcopy(agent), probes.target_of(agent)
    turns, backward = [], reptile.minibatch_backward

    def record(one, its_target, b, noise, *rest):
        places = [agent.mu[m].data_ptr() for m in range(TASKS)]
        turns.append((places.index(one.mu.data_ptr()), b, noise))
        return backward(one, its_target, b, noise, *rest)

    monkeypatch.setattr(reptile, "minibatch_backward", record)
    _, stats = one_update(reptile, agent, args)
    order = [m for m, _, _ in turns]
    assert sorted(order) == list(range(TASKS))

    theta, mu, sigma, alpha = (
        x.detach().clone() for x in (start.theta, start.mu, start.sigma, start.log_alpha)
    )
    moves = torch.zeros_like(mu)
    for m, b, noise in turns:
        single, slow = (
            varshare.Agent(probes.spaces(space, 1), args, torch.Generator()).double() for _ in range(2)
        )
        for one, source in ((single, start), (slow, target)):
            rows = source.state_dict()
            rows = {x: y if x in ("theta", *KEPT) else y[m, None] for x, y in rows.items()}
            one.load_state_dict(rows)
        with torch.no_grad():
            single.theta.copy_(theta)
        varshare.minibatch_backward(single, slow, b, noise, torch.tensor(60), args)
        before = theta.clone()
        theta -= 0.01 * single.theta.grad
        mu[m] -= 0.01 * single.mu.grad[0]
        alpha[m] -= 0.01 * single.log_alpha.grad[0]
        sigma[m] = single.sigma
        theta += 0.3 * mu[m]
        mu[m] *= 0.7
        moves[m] = theta - before
    torch.testing.assert_close(agent.theta.detach(), theta)
    torch.testing.assert_close(agent.mu.detach(), mu)
    torch.testing.assert_close(agent.sigma, sigma)
    torch.testing.assert_close(agent.log_alpha.detach(), alpha)
    others = moves.sum(0) - moves
    assert others.norm(dim=1).min() > 0.01
    torch.testing.assert_close(stats["varshare/moved_by_others"], others.norm(dim=1))

    turns.clear()
    for seed in range(8):
        one_update(reptile, agent, args, seed=seed)
    orders = {tuple(m for m, _, _ in turns[i : i + TASKS]) for i in range(0, len(turns), TASKS)}
    assert len(orders) > 1


@pytest.mark.parametrize("amount", [100.0, float("inf"), float("nan")])
def test_paco_leaves_out_a_task_whose_loss_is_too_large(amount):
    paco = BASELINES["baselines/paco_sac.py"]
    agent = probes.make_agent(paco, dtype=torch.float32)
    b, target = probes.random_transitions(paco, agent, 20), probes.target_of(agent)
    b = b._replace(**{name: x.float() for name, x in b._asdict().items() if name != "actions"})
    args = probes.settings(paco, max_loss=1000.0, reward_scale=1.0)
    before, (stats, _) = probes.gradients(paco, agent, target, b, args)
    errors = 2 * stats["losses/qf_loss"]  # squared, of both critics, whatever the actor's loss is
    for share, lost in ((0.99, True), (1.01, False)):
        close = probes.settings(paco, max_loss=share * errors[0].item(), reward_scale=1.0)
        assert probes.gradients(paco, agent, target, b, close)[1][0]["losses/lost"][0] == lost
    b.rewards[1] += amount
    grads, (stats, _) = probes.gradients(paco, agent, target, b, args)
    assert stats["losses/lost"].tolist() == [0, 1, 0]
    assert all(x.isfinite().all() for x in [*grads.values(), *stats.values()])
    for name in ("w", "log_alpha"):
        assert not grads[name][1].any()
        torch.testing.assert_close(grads[name][[0, 2]], before[name][[0, 2]])

    w, slow = agent.w.detach().clone(), target.w.clone()
    paco.mix_anew(agent, target, stats["losses/lost"] > 0, torch.Generator().manual_seed(0))
    inside = (agent.w[1] - w[0]) @ (w[2] - w[0]) / (w[2] - w[0]).square().sum()
    assert torch.equal(agent.w[[0, 2]], w[[0, 2]]) and 0 < inside < 1
    torch.testing.assert_close(agent.w[1], w[0].lerp(w[2], inside))
    assert torch.equal(target.w[[0, 2]], slow[[0, 2]]) and torch.equal(target.w[1], agent.w[1])


# Independent agents, and whole runs


@pytest.mark.parametrize("m", range(TASKS))
def test_an_independent_agent_learns_as_if_it_were_alone(m):
    """A gradient of one task moves no other: Adam's step on all is each task's own."""
    results = []
    for others in (0.0, 5.0):
        agent = probes.make_agent(independent)
        b = probes.random_transitions(independent, agent, 20)
        rewards = b.rewards + others * (torch.arange(TASKS) != m).double().unsqueeze(1)
        optimizer = torch.optim.Adam(agent.parameters(), lr=0.01)
        args, target = probes.settings(independent), probes.target_of(agent)
        for _ in range(3):
            optimizer.zero_grad()
            independent.minibatch_backward(agent, target, b._replace(rewards=rewards), args)
            optimizer.step()
        results.append(agent)
    one, other = (x.theta.detach() for x in results)
    torch.testing.assert_close(one[m], other[m])
    assert (one - other).abs().amax(1).min() == (one[m] - other[m]).abs().max()


@pytest.mark.parametrize("name", probes.slow_but(("baselines/pcgrad_sac.py",), NAMES))
def test_a_resumed_run_is_the_same_bit_for_bit(monkeypatch, name):
    script = probes.load_script(name)
    changes = {"total_timesteps": 400, "checkpoint_interval": 0.0}
    whole, end = probes.run(script, "whole", **changes), script.Run.end_iteration

    def stop(run):
        end(run)
        if run.iteration == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "end_iteration", stop)
        with pytest.raises(KeyboardInterrupt):
            probes.run(script, "parts", **changes)
    probes.assert_same_runs(probes.run(script, "parts", resume=True, **changes), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_run_is_an_eager_one(monkeypatch, name):
    """By Dynamo alone, whose operations are the same."""
    script, results = probes.load_script(name), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for flag in (False, True):
        folder = probes.run(script, str(flag), total_timesteps=400, compile=flag)
        results.append(probes.load(folder)["agent"])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


# without an observation L2Soft has output biases only: theta's goes where the task with large rewards wants
# it, and the other task's residual back, in Adam's steps of the same size. Soft Modularization's critics
# learn both tasks, but its shared actor is saturated by the task with a thousand times larger rewards
@pytest.mark.learns
@pytest.mark.parametrize("name", [x for x in NAMES if not re.search("task_blind|l2soft|modular", x)])
def test_probe_tasks_with_opposite_actions(name):
    changes = {"reptile_alpha": 0.0} if "reptile" in name else {}  # which leads theta to and fro here
    script = probes.load_script(name)
    scale = {"reward_scale": 100.0}
    if not hasattr(script.Args, "reward_scale"):  # BRC, in whose scale is a term of entropy
        scale = {"gamma": 0.0, "learning_rate": 3e-3}
    at, _ = probes.learn(script, "Opposites", **scale, **changes)
    _, policy = at(0.0)
    assert policy[0] < 0.1 and policy[1] > 0.9


@pytest.mark.learns
def test_probe_soft_modularizations_critics_learn_both_tasks():
    """Of rewards of 0.1 and of 100; its shared actor follows the larger ones."""
    script = probes.load_script("baselines/soft_modularization_sac.py")
    changes = {"reward_scale": 100.0, "learning_rate": 3e-3, "total_timesteps": 9_600}
    at, _ = probes.learn(script, "Opposites", **changes)
    values, policy = at(0.0)
    np.testing.assert_allclose(values[:, 0], [[0.1, -0.1], [-100, 100]], rtol=0.05)
    assert policy[1] > 0.9


@pytest.mark.learns
def test_probe_task_blind_cannot_tell_opposite_tasks():
    at, _ = probes.learn(probes.load_script("baselines/task_blind_sac.py"), "Opposites", reward_scale=100.0)
    _, policy = at(0.0)
    assert policy[0] == policy[1]


@pytest.mark.learns
@pytest.mark.parametrize("name", NAMES)
def test_learns_goals(name):
    """After 30 k steps; a random policy has 19."""
    changes = {"env_id": "cartpole-goals10", "total_timesteps": 30_000}
    script = probes.load_script(name)
    folder = script.train(script.Args(**changes, eval_episodes=10, run_name="goals"))
    assert probes.evaluation(folder)["mean"] > LEARNED[name]
