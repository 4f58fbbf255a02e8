"""The mathematics of VarShare-SAC, its replay buffer, and what it learns."""

import inspect
import itertools
import math
import operator
import signal
from functools import partial

import gymnasium as gym
import numpy as np
import probes
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from probes import BOTH, DISCRETE, HIDDEN, OBS, TASKS
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

import enjoy
from envs.runs import load_agent

sac = probes.load_script("varshare_sac.py")
ASYMMETRIC = gym.spaces.Box(-1.0, 3.0, (2,))  # bias 1, scale 2
make_agent, settings = partial(probes.make_agent, sac), partial(probes.settings, sac)

pytestmark = pytest.mark.usefixtures("elsewhere")


def make_batch(agent, samples, seed=0):
    """Random transitions; the second half of them ended by termination."""
    rng = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, TASKS, samples, OBS, generator=rng).double()
    if agent.discrete:
        actions = torch.randint(agent.act_dim, (TASKS, samples, 1), generator=rng).double()
    else:
        actions = torch.rand(TASKS, samples, agent.act_dim, generator=rng).double() * 2 - 1
    rewards = torch.randn(TASKS, samples, generator=rng).double()
    terminated = (torch.arange(samples) >= samples // 2).double().expand(TASKS, -1)
    noise = torch.randn(2, TASKS, samples, agent.act_dim, generator=rng).double()
    return sac.Batch(obs, next_obs, actions, rewards, terminated, noise)


def forward(agent, row, net, x):
    """Output of one network of one task, from its row of weights, by plain linear layers."""
    for name, (n_out, n_in) in agent.shapes.items():
        part, row = row[: n_out * (n_in + 1)], row[n_out * (n_in + 1) :]
        if name.startswith(net):
            x = F.linear(
                x.relu() if not name.endswith("_0") else x, part[:-n_out].view(n_out, n_in), part[-n_out:]
            )
    return x


def gaussian(agent, row, obs):
    """The squashed Gaussian policy of Haarnoja et al., by torch.distributions, and its base."""
    mean, logstd = forward(agent, row, "actor", obs).chunk(2, -1)
    base = Normal(mean, (-5 + 0.5 * 7 * (logstd.tanh() + 1)).exp())
    squash = [TanhTransform(), AffineTransform(agent.action_bias, agent.action_scale)]
    return Independent(TransformedDistribution(base, squash), 1), base


def losses_task_by_task(agent, weights, b, args):
    """Bellman errors, actor's and temperature's loss of each task, (task, 3), from the papers' formulas."""
    results = []
    of_both = torch.min if args.critics == "min" else lambda x, y: (x + y) / 2
    for m in range(TASKS):
        row, target, alpha = weights[m], agent.target[m], agent.log_alpha[m].exp().item()
        if agent.discrete:
            pi_next = Categorical(logits=forward(agent, row, "actor", b.next_obs[m]))
            pi = Categorical(logits=forward(agent, row, "actor", b.obs[m]))
            q_next = of_both(*(forward(agent, target, f"critic{k}", b.next_obs[m]) for k in (1, 2)))
            value = (pi_next.probs * (q_next - alpha * pi_next.logits)).sum(1)
            q = [forward(agent, row, f"critic{k}", b.obs[m]) for k in (1, 2)]
            taken = [x[torch.arange(len(x)), b.actions[m, :, 0].long()] for x in q]
            actor = (pi.probs * (alpha * pi.logits - of_both(*q))).sum(1).mean()
            entropy = pi.entropy()
        else:
            pi_next, base = gaussian(agent, row, b.next_obs[m])
            action = agent.action_bias + agent.action_scale * (base.mean + base.stddev * b.noise[0, m]).tanh()
            x = torch.cat((b.next_obs[m], action), 1)
            q_next = of_both(*(forward(agent, target, f"critic{k}", x) for k in (1, 2))).squeeze(1)
            value = q_next - alpha * pi_next.log_prob(action)
            x = torch.cat((b.obs[m], b.actions[m]), 1)
            taken = [forward(agent, row, f"critic{k}", x).squeeze(1) for k in (1, 2)]
            pi, base = gaussian(agent, row, b.obs[m])
            action = agent.action_bias + agent.action_scale * (base.mean + base.stddev * b.noise[1, m]).tanh()
            x = torch.cat((b.obs[m], action), 1)
            q = of_both(*(forward(agent, row, f"critic{k}", x) for k in (1, 2))).squeeze(1)
            actor = (alpha * pi.log_prob(action) - q).mean()
            entropy = -pi.log_prob(action)
        y = args.reward_scale * b.rewards[m] + args.gamma * (1 - b.terminated[m]) * value
        bellman = sum(0.5 * (x - y).square().mean() for x in taken)
        temperature = alpha * (entropy.mean() - agent.target_entropy)
        results.append(torch.stack((bellman, actor, torch.as_tensor(temperature))))
    return torch.stack(results)


@pytest.mark.parametrize("space", [DISCRETE, ASYMMETRIC], ids=["Discrete", "Box"])
@pytest.mark.parametrize("critics", ["min", "mean"])
def test_losses_and_what_follows_which_equal_a_computation_task_by_task(space, critics):
    """The critics' weights follow the Bellman errors alone, the actor's the actor's loss alone."""
    rng = torch.Generator().manual_seed(0)
    agent, args = (
        make_agent(space).requires_grad_(False),
        settings(reward_scale=0.7, gamma=0.9, critics=critics),
    )
    agent.target += 0.1 * torch.randn(agent.target.shape, generator=rng)
    b = make_batch(agent, 40)
    weights = agent.weights(torch.randn(agent.mu.shape, generator=rng).double())
    weights = (
        0.3 * weights
    ).requires_grad_()  # atanh, in the log-probability of a saturated action, is rough
    loss, _ = sac.sac_loss(agent, agent.unpack(weights), agent.unpack(agent.target), b, args)
    bellman, actor, temperature = losses_task_by_task(agent, weights, b, args).unbind(1)
    torch.testing.assert_close(loss, bellman + actor + temperature)
    (grad,) = torch.autograd.grad(loss.sum(), weights)
    of = [torch.autograd.grad(x.sum(), weights, retain_graph=True)[0] for x in (bellman, actor)]
    is_actor = [torch.full((n,), x.startswith("actor")) for x, n in zip(agent.shapes, agent.sizes)]
    torch.testing.assert_close(grad, torch.where(torch.cat(is_actor), of[1], of[0]))


def test_discrete_losses_by_hand():
    """One task, one state, two actions, Q and policy set by the biases of the last layers."""
    agent = make_agent(gym.spaces.Discrete(2)).requires_grad_(False)
    for x in (agent.theta, agent.mu, agent.target):
        x.zero_()
    ends = np.cumsum(agent.sizes)
    biases = {name: slice(end - n_out, end) for (name, (n_out, _)), end in zip(agent.shapes.items(), ends)}
    agent.theta[biases["actor_2"]] = torch.tensor([math.log(3), 0.0]).double()  # probabilities 3/4 and 1/4
    agent.theta[biases["critic1_2"]] = torch.tensor([1.0, 2.0]).double()
    agent.theta[biases["critic2_2"]] = torch.tensor([3.0, 0.0]).double()
    agent.target[:, biases["critic1_2"]] = torch.tensor([4.0, 8.0]).double()
    agent.target[:, biases["critic2_2"]] = torch.tensor([6.0, 4.0]).double()
    agent.log_alpha.fill_(math.log(0.5))
    b = sac.Batch(*(x[:, :1] for x in make_batch(agent, 2)))
    b = b._replace(actions=torch.zeros(TASKS, 1, 1), rewards=torch.full((TASKS, 1), 1.0).double())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    y = 1 + 0.9 * (0.75 * 4 + 0.25 * 4 + 0.5 * entropy)
    bellman = 0.5 * ((1 - y) ** 2 + (3 - y) ** 2)
    actor = -0.5 * entropy - (0.75 * 1 + 0.25 * 0)
    temperature = 0.5 * (entropy - agent.target_entropy)
    nets = agent.unpack(agent.weights()), agent.unpack(agent.target)
    loss, stats = sac.sac_loss(agent, *nets, b, settings(gamma=0.9, reward_scale=1.0))
    assert loss.tolist() == pytest.approx([bellman + actor + temperature] * TASKS)
    assert stats.tolist() == pytest.approx([1, 3, bellman, actor, entropy, temperature])


@BOTH
def test_a_task_does_not_touch_another(space):
    agent = make_agent(space)
    nets = agent.unpack(agent.weights()), agent.unpack(agent.target)
    loss, _ = sac.sac_loss(agent, *nets, make_batch(agent, 20), settings())
    names = [name for name, _ in agent.named_parameters()]
    for m, x in enumerate(loss):
        grads = torch.autograd.grad(x, agent.parameters(), retain_graph=True, allow_unused=True)
        grad = dict(zip(names, grads))
        for j in range(TASKS):
            assert grad["mu"][j].any() == (j == m) == (grad["log_alpha"][j] != 0).item()
        torch.testing.assert_close(grad["theta"], grad["mu"][m])


@BOTH
def test_actions_are_drawn_from_the_policy_or_at_random(space):
    agent = make_agent(space if space is DISCRETE else ASYMMETRIC).requires_grad_(False)
    net, rng, n = agent.unpack(0.3 * agent.weights()), torch.Generator().manual_seed(0), 20_000
    obs = torch.randn(TASKS, 1, OBS, generator=rng).double().expand(-1, n, -1)
    noise = agent.action_noise((TASKS, n), rng).double()
    actions, uniform = agent.act(net, obs, noise), agent.random_actions(noise)
    for m in range(TASKS):
        if space is DISCRETE:
            counts = [np.bincount(x[m], minlength=4) for x in (actions, uniform)]
            for count, p in zip(counts, (agent.policy(net, obs)[m, 0].numpy(), np.full(4, 0.25))):
                assert scipy.stats.chisquare(count, p / p.sum() * n).pvalue > 0.001
        else:
            mean, logstd = forward(agent, 0.3 * agent.weights()[m], "actor", obs[m, :1]).chunk(2, 1)
            u = torch.atanh((actions[m] - 1) / 2)
            z = (u - mean) / (-5 + 3.5 * (logstd.tanh() + 1)).exp()
            assert all(scipy.stats.kstest(z[:, i], "norm").pvalue > 0.001 for i in range(2))
            assert all(
                scipy.stats.kstest(uniform[m, :, i], "uniform", (-1, 4)).pvalue > 0.001 for i in range(2)
            )
            torch.testing.assert_close(agent.greedy(agent.policy(net, obs))[m, :1], 1 + 2 * mean.tanh())


def test_temperatures_move_towards_their_target_entropy():
    agent = make_agent()
    b = make_batch(agent, 20)
    with torch.no_grad():
        agent.mu.zero_()
        ends = np.cumsum(agent.sizes)
        i = list(agent.shapes).index("actor_2")
        agent.mu[0, ends[i] - 4] = 100.0  # the first task always acts the same, the others do not
    net, target = agent.unpack(agent.weights()), agent.unpack(agent.target)
    loss, _ = sac.sac_loss(agent, net, target, b, settings(target_entropy=0.2))
    grad = torch.autograd.grad(loss.sum(), agent.log_alpha)[0]
    assert grad[0] < 0 and (grad[1:] > 0).all()  # alpha rises, falls
    assert agent.target_entropy == pytest.approx(0.2 * math.log(4))


def test_kl_is_weighted_by_beta_over_the_stored_transitions():
    agent = make_agent()
    b = make_batch(agent, 20)
    weights = torch.randn(agent.mu.shape, generator=torch.Generator().manual_seed(0)).double()
    kl = sac.gaussian_kl(agent.mu, agent.logvar, 0.3).sum()
    for stored in (100.0, 2000.0):
        losses = [
            sac.objective(agent, weights, b, torch.tensor(stored), settings(beta=x))[0] for x in (0.0, 0.5)
        ]
        torch.testing.assert_close(losses[1] - losses[0], 0.5 * kl / stored)


def test_recentring_changes_neither_weights_nor_targets():
    agent = make_agent()
    before = agent.weights().detach().clone(), agent.target.clone()
    theta = agent.theta.detach().clone()
    sac.recentre(agent, 0.4)
    torch.testing.assert_close(agent.weights().detach(), before[0])
    assert torch.equal(agent.target, before[1]) and not torch.allclose(agent.theta, theta)
    folders = [run(str(alpha), reptile_alpha=alpha, beta=0.0, total_timesteps=500) for alpha in (0.0, 1.0)]
    plain, moved = (probes.load(folder)["agent"] for folder in folders)
    assert moved["mu"].mean(0).abs().max() < 1e-5 < 1e-3 < plain["mu"].mean(0).abs().max()


class Counting(probes.Probe):
    """The reward is the number of the step, and a half more in the second environment."""

    steps = 0

    def reward(self, actions):
        self.steps += 1
        return self.steps + 0.5 * np.arange(self.num_envs)


gym.register("Counting", vector_entry_point=Counting)


@pytest.fixture
def saves(monkeypatch):
    """Replaces Run.save: what runs would have saved, as it was then; the last is the model."""
    saved = []

    def save(run, kind, agent, optimizer=None, buffer=None, **content):
        steps = [int(x["step"]) for x in optimizer["state"].values()] if optimizer else []
        agent = {name: x.clone() for name, x in agent.items()}
        saved.append({"agent": agent, "buffer": buffer, "updates": max(steps, default=0)})

    monkeypatch.setattr(sac.Run, "save", save)
    return saved


def test_the_buffer_keeps_the_newest_transitions_and_updates_draw_from_all_of_them(saves, monkeypatch):
    sampled, objective = [], sac.objective

    def record(agent, noise, b, num_stored, args):
        sampled.append((b.rewards.unique().tolist(), num_stored.item()))
        return objective(agent, noise, b, num_stored, args)

    monkeypatch.setattr(sac, "objective", record)
    size = {"env_id": "Counting", "total_timesteps": 50, "envs_per_task": 2, "buffer_size": 14}
    run(**size, batch_size=14, learning_starts=4, updates_per_step=10.0)
    for step, save in enumerate(saves[:24], 1):
        buffer, newest = save["buffer"], range(max(1, step - 6), step + 1)
        assert buffer.shape == (1, min(step, 7), 2, 1 + 1 + 1 + 1 + 1)
        expected = [next(t for t in newest if (t - 1) % 7 == i) for i in range(len(buffer[0]))]
        assert buffer[0, :, :, 3].tolist() == [[t, t + 0.5] for t in expected]
        assert buffer[..., 4].all()  # every step was the last of its episode
        if step > 1:
            rewards, stored = zip(*sampled[10 * (step - 2) : 10 * (step - 1)])
            assert {x for seen in rewards for x in seen} == {t + half for t in newest for half in (0, 0.5)}
            assert set(stored) == {2 * len(newest)}
    assert saves[24]["buffer"].shape[1] == 0 and len(saves) == 26  # a finished run has no use for it


def test_targets_follow_the_mean_weights_once_in_every_update(saves):
    run(updates_per_step=0.5, tau=0.3, total_timesteps=400)  # 40 steps, the first 20 at random
    for step, (old, new) in enumerate(itertools.pairwise(saves[:-1]), 2):
        assert new["updates"] == max(0, step - 19) // 2
        old, new = old["agent"], new["agent"]
        if step > 19 and (step - 19) % 2 == 0:
            torch.testing.assert_close(new["target"], old["target"].lerp(new["theta"] + new["mu"], 0.3))
        else:
            assert torch.equal(new["target"], old["target"])


def test_a_buffer_that_cannot_fit_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        run(total_timesteps=10**13, buffer_size=10**12)
    assert stop.value.code == 2 and "GiB" in capsys.readouterr().err


@pytest.mark.parametrize("hidden", [HIDDEN, (6,)])
def test_shared_parts_are_those_of_the_ppo_trunk(hidden):
    ppo = probes.load_script("varshare_ppo.py")
    for name in ("gaussian_kl", "recentre", "Agent.draw_noise", "Agent.weights"):
        sources = [inspect.getsource(operator.attrgetter(name)(script)) for script in (sac, ppo)]
        assert sources[0] == sources[1]
    agent = sac.Agent(
        probes.spaces(DISCRETE), sac.Args(hidden_sizes=hidden), torch.Generator().manual_seed(0)
    )
    assert torch.equal(agent.target, agent.weights()) and len(agent.shapes) == 3 * (len(hidden) + 1)


# Runs

SMALL = {
    "env_id": "cartpole10",
    "total_timesteps": 2_000,
    "learning_starts": 20,
    "hidden_sizes": (16,),
    "batch_size": 16,
    "buffer_size": 40,
    "eval_episodes": 2,
    "checkpoint_interval": 0.0,
}


def run(name="run", **changes):
    return sac.train(sac.Args(**SMALL | {"run_name": name} | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"rollout_weights": "sample", "reptile_alpha": 0.1, "updates_per_step": 0.7}],
    ids=["", "everything"],
)
def test_a_stopped_run_ends_the_same_and_so_does_a_second_one(tmp_path, changes):
    """The buffer is full, and came round, before the run is stopped between two logs."""
    reference = tmp_path / run("reference", **changes)
    torch.manual_seed(123)  # nothing may depend on the global generator
    probes.assert_same_runs(tmp_path / run("again", **changes | {"checkpoint_interval": 1e9}), reference)
    settings = SMALL | changes | {"run_name": "stopped"}
    process = probes.processes.Process(
        target=probes.run_and_kill,
        args=("varshare_sac.py", settings, tmp_path),
        kwargs={"moment": "after", "save": 61, "signum": signal.SIGTERM},
    )
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert probes.load(tmp_path / "runs/stopped", "checkpoint")["step"] == 61
    probes.assert_same_runs(tmp_path / run("stopped", **changes | {"resume": True}), reference)


def test_final_evaluation_is_of_the_saved_model_and_enjoy_repeats_it():
    folder = run()
    rows = {
        row[2]: float(row[3]) for row in probes.read_heartbeat(folder) if row[1] == "eval/episodic_return"
    }
    names, returns, _, _ = enjoy.play(enjoy.Args(folder, episodes=2))
    assert [rows[name] for name in names] == returns.mean(1).tolist()
    assert enjoy.play(enjoy.Args(folder, "ensemble", episodes=2, ensemble_size=2))[1].shape == (10, 2)


def test_loading_and_a_frozen_theta():
    folder = run(tasks=(0, 1, 2), total_timesteps=300)
    saved = probes.load(folder)["agent"]
    agent = sac.Agent(
        probes.envs.make("cartpole10", 1, (2, 5)),
        sac.Args(hidden_sizes=(16,)),
        torch.Generator().manual_seed(7),
    )
    load_agent(agent, folder, [probes.envs.cartpole.NAMES[task] for task in (2, 5)])
    assert torch.equal(agent.theta, saved["theta"]) and torch.equal(agent.mu[0], saved["mu"][2])
    assert not agent.mu[1].any() and agent.log_alpha[1].exp().item() == pytest.approx(sac.Args.alpha_init)
    new = {"tasks": (5,), "load": str(folder), "total_timesteps": 100}
    still = probes.load(run("still", **new, learning_rate=1e-30))["agent"]
    torch.testing.assert_close(still["target"][0], saved["theta"])  # targets start from what was loaded
    moved = probes.load(run("moved", **new, freeze_theta=True))["agent"]
    assert torch.equal(moved["theta"], saved["theta"]) and moved["mu"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer_size": 10}, "--buffer-size must be at least"),
        ({"hidden_sizes": ()}, "--hidden-sizes"),
        ({"tau": 1.5}, "--tau must be at most 1"),
        ({"tau": 0.0}, "--tau must be positive"),
        ({"updates_per_step": 0.0}, "--updates-per-step must be positive"),
        ({"target_entropy": -1.0}, "--target-entropy must be positive or 0"),
        ({"total_timesteps": 199}, "--total-timesteps must be at least 200:"),
        ({"total_timesteps": 9, "learning_starts": 0}, "--total-timesteps must be at least 10:"),
        ({"env_id": "nonsense"}, "unknown environment"),
        ({"freeze_theta": True}, "needs a theta"),
    ],
)
def test_bad_input(capsys, tmp_path, changes, message):
    with pytest.raises(SystemExit) as stop:
        run(**changes)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_nan_stops_the_run_and_is_not_in_the_checkpoint(tmp_path):
    for seed in range(4):
        with pytest.raises(SystemExit) as stop:
            run(str(seed), env_id="TurnsToNaN", total_timesteps=500, learning_starts=20, seed=seed)
        folder = tmp_path / f"runs/{seed}"
        assert "NaN" in stop.value.code and not (folder / "model.pt").exists()
        checkpoint = probes.load(folder, "checkpoint")
        assert all(x.isfinite().all() for x in (checkpoint["buffer"], *checkpoint["agent"].values()))


def test_sampled_weights_act_differently():
    folders = [run(x, rollout_weights=x, sigma_init=0.5, total_timesteps=600) for x in ("mean", "sample")]
    rows = [[r for r in probes.read_heartbeat(f) if r[1] == "charts/episodic_length"] for f in folders]
    assert rows[0] != rows[1]


# Probes: what it must learn where the answer is known

PROBE = {
    "beta": 0.0,
    "envs_per_task": 4,
    "learning_starts": 50,
    "hidden_sizes": (32,),
    "batch_size": 64,
    "learning_rate": 3e-3,
    "reward_scale": 1.0,
    "target_entropy": 0.1,
    "eval_episodes": 2,
    "run_name": "probe",
}


def learn(env_id, steps, **changes):
    """Train on a probe: Q (task, obs, action) of the first critic, and the policy, at observations."""
    num_tasks = gym.spec(env_id).vector_entry_point.num_tasks
    folder = sac.train(
        sac.Args(**PROBE | {"env_id": env_id, "total_timesteps": 4 * steps * num_tasks} | changes)
    )
    agent, net = probes.load_agent(sac, folder)

    def at(observations, actions=None):
        obs = torch.tensor(observations).view(1, -1, 1).expand(num_tasks, -1, 1)
        actions = None if actions is None else torch.tensor(actions).view(1, -1, 1)
        return agent.q(net.critics, obs, actions)[:, 0].numpy(), agent.greedy(agent.policy(net, obs)).numpy()

    return at


def test_probe_the_policy_depends_on_the_observation():
    q, policy = learn("RewardOfBoth", 1000)([-1.0, 1.0])
    assert policy.tolist() == [[0, 1]]
    np.testing.assert_allclose(q[0], [[1, -1], [-1, 1]], atol=0.2)


def test_probe_tasks_with_opposite_actions():
    _, policy = learn("Opposites", 1000, target_entropy=0.01)([0.0])
    assert policy.tolist() == [[0], [1]]


def test_probe_truncation_is_not_an_end():
    """Nothing depends on actions: values are those of going on forever, and of an entropy as good as 0."""
    q, _ = learn("Truncated", 2500, gamma=0.8, target_entropy=0.0, alpha_init=1e-4)([-1.0, 1.0])
    np.testing.assert_allclose(q.mean(2), [[-5, 5]], atol=0.7)


def test_probe_the_best_force():
    q, force = learn("RewardOfForce", 1500)([-1.0, 1.0], [-1.0, 1.0])
    np.testing.assert_allclose(force[0, :, 0], [-1, 1], atol=0.25)
    np.testing.assert_allclose(q[0, :, 0], [0, 0], atol=0.3)


# Learning


def final_return(folder):
    rows = probes.read_heartbeat(folder)
    return next(float(row[3]) for row in rows if row[1:3] == ("eval/episodic_return", "mean"))


def test_learns_cartpole10():
    folder = sac.train(sac.Args(total_timesteps=20_000, eval_episodes=5, run_name="cartpole10"))
    assert final_return(folder) > 200  # a random policy has 22


def test_learns_pendulum():
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 4_000, "target_entropy": 1.0, "batch_size": 64}
    folder = sac.train(sac.Args(**settings, run_name="pendulum"))
    assert final_return(folder) > -400  # a random policy has -1200
