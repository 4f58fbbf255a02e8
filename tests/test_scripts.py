"""Of every script: what it learns on probes and CartPoles, seeds, files, loading and failures.

What siblings have literally in common (test_siblings.py) is tested with the trunks only: fixture `trunk`.
"""

import itertools
import json
import re
import subprocess
import time

import numpy as np
import probes
import pytest
import torch
import torch.nn.functional as F
from probes import learn, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
from envs import runs
from envs.evaluation import greedy, play_episodes, spread_seeds
from envs.normalisation import RunningNorm
from envs.rewards import scale_rewards
from envs.runs import load_agent

TASKS = 3

pytestmark = pytest.mark.usefixtures("elsewhere")


# Normalisation and evaluation


def test_running_norms_are_those_of_all_that_was_seen():
    rng, norm, seen = np.random.default_rng(0), RunningNorm((5,), on=True, limit=3), []
    x = torch.from_numpy(rng.normal(size=(7, 5)))
    assert torch.equal(norm(x), x.clamp(-3, 3)) and torch.equal(norm.inverse(x), x)  # nothing seen
    for shape in ((4, 3, 2), (1,), (50,)):
        seen.append(rng.normal(size=(*shape, 5)) * [1, 1e-3, 1e3, 0, 1] + [0, 1, -1e4, 7, 0])
        norm.see(torch.from_numpy(seen[-1]).float())
    seen = np.concatenate([x.reshape(-1, 5) for x in seen])
    np.testing.assert_allclose(norm.mean, seen.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.std, np.sqrt(seen.var(0) + 1e-8), rtol=1e-3)
    x = torch.from_numpy(seen).float()
    expected = np.clip((seen - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8), -3, 3)
    np.testing.assert_allclose(norm(x), expected, atol=2e-3)
    inside = norm(x).abs() < 3
    torch.testing.assert_close(norm.inverse(norm(x))[inside], x[inside], rtol=1e-3, atol=1e-3)
    assert not norm(x[:, 3:4].expand(-1, 5))[:, 3].any()  # a constant is 0


def test_running_norms_forget_and_are_off_unless_told():
    norm, off = RunningNorm((2, 1), on=True, decay=0.5), RunningNorm((2, 1), on=False, limit=0.1)
    for x in ([[1.0, 3.0], [10.0, 10.0]], [[5.0], [20.0]]):
        norm.see(torch.tensor(x).T.unsqueeze(-1))
        off.see(torch.tensor(x).T.unsqueeze(-1))
    weights, x = np.array([0.5, 0.5, 1]) / 2, np.array([[1, 3, 5], [10, 10, 20]])
    np.testing.assert_allclose(norm.mean[:, 0], x @ weights)
    np.testing.assert_allclose(norm.std[:, 0], np.sqrt(x**2 @ weights - (x @ weights) ** 2), rtol=1e-6)
    x = torch.randn(2, 7)
    assert off(x) is off.inverse(x) is x and not off.sums.any()


def test_what_was_normalised_is_what_the_update_sees(trunk):
    """Observations, values, advantages and returns of `make_batch` against plain NumPy of one rollout."""
    changes = {"norm_obs": True, "norm_value": True, "norm_adv": False, "gamma": 0.9}
    agent, args = probes.make_agent(trunk, **changes), probes.settings(trunk, **changes)
    rng = np.random.default_rng(0)
    before = 10 + 5 * torch.from_numpy(rng.normal(size=(30, TASKS, 1)))
    agent.value_norm.see(before)
    agent.obs_norm.see(torch.from_numpy(rng.normal(size=(30, probes.OBS)) + 3))
    size = (args.num_steps, TASKS, args.envs_per_task)
    obs = torch.from_numpy(rng.normal(size=(size[0] + 1, *size[1:], probes.OBS)) * 9 + 4)
    rewards, done = torch.from_numpy(rng.normal(size=size)) * 20, torch.zeros(size).double()
    W = agent.unpack(agent.weights().detach())
    old, scale, mean, std = (
        x.clone() for norm in (agent.value_norm, agent.obs_norm) for x in (norm.mean, norm.std)
    )
    with torch.no_grad():
        out = trunk.mlp(agent.obs_norm(trunk.by_task(obs[:-1])), W, "actor").unflatten(1, size[::2])
        out = out.transpose(0, 1)  # what has acted, with the statistics of then
    actions = agent.act(
        W, trunk.by_task(out), agent.action_noise((TASKS, size[0] * size[2]), torch.Generator())
    )
    logprobs, _ = agent.log_prob_entropy(W, trunk.by_task(out), actions)
    actions = actions.unflatten(1, size[::2]).transpose(0, 1)
    data = trunk.Rollout(obs, out, actions, rewards, done, done, torch.zeros_like(obs[1:]))
    batch = trunk.make_batch(W, data, agent, torch.zeros(size[1:]), args)

    assert agent.obs_norm.sums[0, 0] == 30 + np.prod(size)  # but seen after the batch was made
    expected = ((trunk.by_task(obs[:-1]) - mean) / std).clamp(-10, 10)
    torch.testing.assert_close(batch.obs, expected)
    torch.testing.assert_close(batch.logprobs, logprobs)  # of the policy that has acted
    everything = ((obs - mean) / std).clamp(-10, 10).transpose(0, 1).flatten(1, 2)
    values = trunk.mlp(everything, W, "critic").squeeze(-1) * scale + old  # of the critic before the update
    values = values.unflatten(1, (size[0] + 1, -1)).detach()
    advantages = torch.zeros(TASKS, size[0] + 1, size[2]).double()
    for t in reversed(range(size[0])):
        delta = rewards[t] + 0.9 * values[:, t + 1] - values[:, t]
        advantages[:, t] = delta + 0.9 * args.gae_lambda * advantages[:, t + 1]
    advantages, values = advantages[:, :-1].flatten(1), values[:, :-1].flatten(1)
    torch.testing.assert_close(batch.advantages, advantages)  # in the units of the rewards
    returns = advantages + values
    weights = torch.cat((torch.full((30,), 0.9), torch.ones(returns.shape[1])))
    seen = torch.cat((before[..., 0].T, returns), dim=1)
    mean = (weights * seen).sum(1, keepdim=True) / weights.sum()
    std = ((weights * seen.square()).sum(1, keepdim=True) / weights.sum() - mean.square()).sqrt()
    torch.testing.assert_close(batch.returns, (returns - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.values, (values - mean) / std, rtol=1e-4, atol=1e-4)


def test_the_critic_is_normalised_in_its_hidden_layers_and_the_actor_is_not(trunk):
    """Against a loop over tasks and layers, in the values of the batch and in the loss."""
    args = probes.settings(trunk, norm_critic=True)
    agent = probes.make_agent(trunk, norm_critic=True)
    W = agent.unpack(agent.weights().detach())

    def forward(x, m, net, norm):
        for i in range(3):
            x = x @ W[f"{net}.{i}.weight"][m].T + W[f"{net}.{i}.bias"][m]
            if norm and i < 2:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            x = x.relu() if i < 2 else x
        return x

    batch = probes.random_batch(trunk, agent, 20)
    values, out = (
        torch.stack([forward(x, m, net, norm) for m, x in enumerate(batch.obs)])
        for net, norm in (("critic", True), ("actor", False))
    )
    _, stats = trunk.ppo_loss(agent, W, batch, args)
    loss = 0.5 * (values.squeeze(-1) - batch.returns).square().mean(1)
    torch.testing.assert_close(stats["losses/value_loss"], loss)
    logprobs, _ = agent.log_prob_entropy(W, out, batch.actions)
    torch.testing.assert_close(stats["losses/old_approx_kl"], (batch.logprobs - logprobs).mean(1))

    obs, zeros = batch.obs.transpose(0, 1).unsqueeze(2), torch.zeros(19, TASKS, 1).double()
    data = (zeros, zeros, zeros, torch.zeros_like(obs[1:]))  # rewards, terminated, truncated, final_obs
    outs, actions = (x.transpose(0, 1).unsqueeze(2)[:-1] for x in (out, batch.actions))
    made = trunk.make_batch(W, trunk.Rollout(obs, outs, actions, *data), agent, zeros[0], args)
    torch.testing.assert_close(made.values, values[:, :-1, 0])


@pytest.mark.parametrize("flag", ["norm_obs", "norm_value", "norm_critic"])
def test_a_model_is_loaded_with_the_normalisation_it_was_trained_with(trunk, capsys, flag):
    for theirs in (False, True):
        folder = run(trunk, f"trained-{theirs}", total_timesteps=2560, **{flag: theirs})
        with pytest.raises(SystemExit):
            run(trunk, "other", load=str(folder), **{flag: not theirs})
        message = f"was trained {'with' if theirs else 'without'} --{flag.replace('_', '-')}"
        assert message in capsys.readouterr().err


def test_rewards_are_scaled_by_the_std_of_their_tasks_discounted_return():
    rng, gamma, shape = np.random.default_rng(0), 0.9, (16, TASKS, 4)
    stats, running = torch.zeros(TASKS, 3, dtype=torch.float64), torch.zeros(TASKS, 4)
    seen, returns = [[] for _ in range(TASKS)], np.zeros(shape[1:])
    for _ in range(4):  # rollouts, over which an episode can run on
        rewards = (rng.normal(size=shape) * [[[1.0], [1000.0], [0.01]]] + [[[0.0], [500.0], [1.0]]]).astype(
            "f4"
        )
        done = (rng.random(shape) < 0.1).astype("f4")
        scaled = scale_rewards(stats, torch.from_numpy(rewards), torch.from_numpy(done), running, gamma)
        for t in range(16):
            for m, i in np.ndindex(shape[1:]):
                returns[m, i] = gamma * returns[m, i] + rewards[t, m, i]
                seen[m].append(returns[m, i])
                returns[m, i] *= 1 - done[t, m, i]
        for m in range(TASKS):
            np.testing.assert_allclose(scaled[:, m], rewards[:, m] / np.std(seen[m]), rtol=1e-4)
        np.testing.assert_allclose(running, returns, rtol=1e-5)


def test_a_tasks_rewards_do_not_touch_another_tasks():
    rewards, done = torch.randn(8, 2, 3), torch.zeros(8, 2, 3)
    results = []
    for factor in (1.0, 100.0):
        changed, stats = rewards.clone(), torch.zeros(2, 3, dtype=torch.float64)
        changed[:, 1] *= factor
        running = torch.zeros(2, 3)
        results.append((scale_rewards(stats, changed, done, running, 0.9), running))
        assert running.all()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.movedim(-2, 0)[0], other.movedim(-2, 0)[0])
    torch.testing.assert_close(results[0][0], results[1][0])  # and the scale of a task's rewards drops out


def balance(obs):
    """A controller of numbers that are the same for one observation and for many."""
    if obs.shape[-1] == 4:  # a pole
        return (obs[..., 2] + obs[..., 3] > 0).long()
    return torch.where(obs[..., 3] < -0.3, 2, torch.where(obs[..., 4] > 0, 3, 1))  # a lander


@pytest.mark.parametrize("env_id", ["cartpole10", "lunarlander20"])
def test_evaluation_plays_one_episode_in_each_environment(env_id):
    tasks, episodes = [7, 0, 3], 3
    suite = envs.make(env_id, episodes, tasks)

    def policy(obs):
        return F.one_hot(balance(obs), int(suite.single_action_space.n)).float()

    returns, lengths, successes = play_episodes(policy, suite, spread_seeds(5, 1, 9))
    assert returns.shape == lengths.shape == (3, episodes) and np.isnan(successes).all()
    seeds = iter(spread_seeds(5, 1, 9))
    for (m, task), i in itertools.product(enumerate(tasks), range(episodes)):
        env = envs.make_single(env_id, task)
        obs, _ = env.reset(seed=next(seeds))
        total, steps, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(balance(torch.from_numpy(obs)).item())
            total, steps, over = total + reward, steps + 1, terminated or truncated
        assert (returns[m, i], lengths[m, i]) == (pytest.approx(total, rel=1e-12), steps)
    assert len(np.unique(lengths)) > 4  # short episodes did not wait for long ones by playing on


def test_seeds_of_environments_are_all_different():
    seeds = [
        s for seed in (*range(20), 10**9) for stream in range(20) for s in spread_seeds(seed, stream, 20)
    ]
    assert len(set(seeds)) == len(seeds)
    assert spread_seeds(3, 1, 20)[:5] == spread_seeds(3, 1, 5)
    assert all(type(s) is int for s in seeds)


# A minibatch


def test_gradients_are_clipped_as_torch_does(script):
    """By the norm of all together, but Independent's by that of every task."""
    agent = probes.make_agent(script)
    batch, draws = probes.random_batch(script, agent, 20), probes.draws(agent)

    def gradients(max_grad_norm):
        args = probes.settings(script, max_grad_norm=max_grad_norm)
        grads = script.minibatch_gradients(agent, batch, *draws, args)[0]
        assert {name: x.shape for name, x in grads.items()} == {
            name: x.shape for name, x in agent.named_parameters()
        }
        joint = script.Args.exp_name != "independent_ppo"
        return [list(grads.values())] if joint else [[x] for x in grads["theta"]]

    for together, *others in zip(*(gradients(x) for x in (1e9, 1e3, 0.03)), strict=True):
        norm = torch.cat([x.flatten() for x in together]).norm().item()
        assert 0.1 < norm < 500
        for max_grad_norm, clipped in zip((1e3, 0.03), others, strict=True):
            parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in together]
            for parameter, x in zip(parameters, together, strict=True):
                parameter.grad = x.clone()
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            torch.testing.assert_close(clipped, [x.grad for x in parameters])
            size = torch.cat([x.flatten() for x in clipped]).norm().item()
            assert size == pytest.approx(min(norm, max_grad_norm), rel=1e-4)


# Probes: what a script must learn in an environment with a known answer


def test_probe_value_of_a_constant_reward(trunk):
    at, folder = learn(trunk, "ConstantReward")
    np.testing.assert_allclose(at(0.0)[0], [[1], [2], [3]], atol=0.15)
    rows = [row[2:] for row in probes.read_heartbeat(folder) if row[1] == "eval/episodic_return"]
    assert rows == [("task0", "1.0"), ("task1", "2.0"), ("task2", "3.0"), ("mean", "2.0")]
    rows = [row[2:] for row in probes.read_heartbeat(folder) if row[1] == "charts/episodic_return"]
    assert rows == [("task0", "1.0"), ("task1", "2.0"), ("task2", "3.0"), ("mean", "2.0")] * 40


def test_probe_value_depends_on_the_observation(trunk):
    at, _ = learn(trunk, "RewardOfObservation")
    np.testing.assert_allclose(at(-1.0, 1.0)[0], [[-1, 1]], atol=0.15)


def test_probe_value_is_discounted(trunk):
    at, _ = learn(trunk, "DelayedReward", gamma=0.7)
    np.testing.assert_allclose(at(0.0, 1.0)[0], [[0.7, 1]], atol=0.1)


def test_probe_policy_finds_the_better_action(trunk):
    at, _ = learn(trunk, "RewardOfAction")
    values, policy = at(0.0)
    assert policy > 0.9 and values == pytest.approx(1, abs=0.3)


def test_probe_policy_depends_on_the_observation(trunk):
    at, _ = learn(trunk, "RewardOfBoth")
    values, policy = at(-1.0, 1.0)
    assert policy[0, 0] < 0.1 and policy[0, 1] > 0.9
    np.testing.assert_allclose(values, [[1, 1]], atol=0.3)


# the siblings' policies are the trunk's, letter by letter: two of them in the quick part are enough
FORCES = [
    x if x in ("varshare_ppo.py", "baselines/cagrad_ppo.py") else pytest.param(x, marks=pytest.mark.slow)
    for x in probes.SCRIPTS
]


@pytest.mark.parametrize("script", FORCES, indirect=True)
def test_probe_gaussian_policy_finds_the_best_force(script):
    at, _ = learn(script, "RewardOfForce")
    np.testing.assert_allclose(at(-1.0, 1.0)[1], [[-1, 1]], atol=0.25)


def test_probe_truncation_is_not_an_end(trunk):
    at, _ = learn(trunk, "Truncated", gamma=0.8)
    np.testing.assert_allclose(at(-1.0, 1.0)[0], [[-5, 5]], atol=0.5)  # 1 / (1 - gamma)


def test_probe_termination_is_an_end(trunk):
    at, _ = learn(trunk, "Terminated", gamma=0.8)
    values = np.cumsum(0.8 ** np.arange(4))[::-1]
    np.testing.assert_allclose(at(1.0, 2.0, 3.0, 4.0)[0][0], values, atol=0.4)
    np.testing.assert_allclose(at(-1.0, -2.0, -3.0, -4.0)[0][0], -values, atol=0.4)


def test_probe_two_tasks_with_opposite_actions_and_rewards_of_different_scale(script):
    at, folder = learn(script, "Opposites")
    _, policy = at(0.0)
    rows = probes.read_heartbeat(folder)
    returns = [float(row[3]) for row in rows if row[1] == "eval/episodic_return" and row[2] != "mean"]
    if script.Args.exp_name == "task_blind_ppo":  # the control, which is blind to the task and must fail
        assert policy[0] == pytest.approx(policy[1], abs=1e-6)
        assert min(returns) < 0 < max(returns)
    else:
        assert policy[0] < 0.1 and policy[1] > 0.9
        assert min(returns) > 0


# Whole runs


@pytest.mark.parametrize("norm_adv", [True, False])
def test_advantages_are_normalised_in_every_task(trunk, monkeypatch, norm_adv):
    batches, ppo_loss = [], trunk.ppo_loss

    def record(agent, W, batch, args):
        batches.append(batch)
        return ppo_loss(agent, W, batch, args)

    monkeypatch.setattr(trunk, "ppo_loss", record)
    learn(trunk, "Opposites", rollouts=1, update_epochs=1, num_minibatches=1, norm_adv=norm_adv)
    assert [len(x) for x in batches[0]] == [2] * 6
    mean, std = batches[0].advantages.mean(1), batches[0].advantages.std(1)
    if norm_adv:
        torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(std, torch.ones(2), atol=1e-3, rtol=0)
    else:
        assert std[0] < 0.1 < std[1]  # as the rewards
        torch.testing.assert_close(batches[0].advantages + batches[0].values, batches[0].returns)


@pytest.mark.parametrize("changes", [{}, {"rollout_weights": "sample"}], ids=["", "sample"])
def test_same_seed_same_run_and_another_seed_another(script, changes):
    if not all(hasattr(script.Args, name) for name in changes):
        pytest.skip("the script has no such setting")
    changes = {"total_timesteps": 12_800} | changes
    one = run(script, "one", **changes)
    torch.manual_seed(123)  # nothing may depend on the global generators, nor on what ran before
    np.random.seed(123)  # noqa: NPY002
    two = run(script, "two", checkpoint_interval=1e9, **changes)
    probes.assert_same_runs(two, one)
    other = run(script, "other", seed=2, **changes | {"total_timesteps": 2560})
    for name in ("charts/episodic_return", "losses/value_loss"):
        rows = [[x for x in probes.read_heartbeat(f) if x[:2] == ("2560", name)] for f in (other, one)]
        assert all(rows) and rows[0] != rows[1]


METRICS = {
    "charts/": {"episodic_return", "episodic_length", "SPS", "wall_time", "learning_rate"},
    "eval/": {"episodic_return", "episodic_length"},
    "losses/": {
        "policy_loss",
        "value_loss",
        "entropy",
        "old_approx_kl",
        "approx_kl",
        "clipfrac",
        "clipfrac_first_minibatch",
        "explained_variance",
    },
}


def test_files_of_a_run(either):
    folder = run(either, tasks=(4, 2), total_timesteps=5120)
    rows = probes.read_heartbeat(folder)
    names = [envs.cartpole.NAMES[4], envs.cartpole.NAMES[2]]
    metrics = {row[1] for row in rows}
    for prefix, expected in METRICS.items():
        assert {m.removeprefix(prefix) for m in metrics if m.startswith(prefix)} == expected
    assert {row[2] for row in rows} == {*names, "mean"}
    batch = 2 * 8 * 32
    assert sorted({int(row[0]) for row in rows}) == list(range(batch, 5120 + 1, batch))
    for name in (m for m in metrics if m.startswith("losses/")):
        of_last = {row[2]: float(row[3]) for row in rows if row[1] == name and row[0] == "5120"}
        assert of_last.keys() == {*names, "mean"}
        if name != "losses/explained_variance":  # of summed variances
            assert of_last["mean"] == pytest.approx(sum(map(of_last.get, names)) / 2, rel=1e-5, abs=1e-6)
    rates = [float(row[3]) for row in rows if row[1] == "charts/learning_rate"]
    np.testing.assert_allclose(rates, either.Args.learning_rate * (1 - np.arange(10) / 10))
    for name in (n for n in metrics if n.startswith(("charts/episodic", "eval/"))):
        of_last = {row[2]: float(row[3]) for row in rows if row[1] == name and row[0] == "5120"}
        if of_last.keys() == {*names, "mean"}:  # else no episode of a task ended since the log before
            assert of_last["mean"] == pytest.approx((of_last[names[0]] + of_last[names[1]]) / 2)

    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    per_task = {m for m in metrics if m.startswith(("charts/episodic", "eval/"))}
    assert set(events.Tags()["scalars"]) == metrics | {f"{m}/{name}" for m in per_task for name in names}
    for metric in metrics:
        logged = [(int(row[0]), float(row[3])) for row in rows if row[1] == metric and row[2] == "mean"]
        scalars = [(e.step, e.value) for e in events.Scalars(metric)]
        np.testing.assert_allclose(scalars, logged, rtol=1e-6)

    config = json.loads((folder / "config.json").read_text())
    assert config["args"] | {"hidden_sizes": (64, 64)} == vars(
        either.Args(**probes.SMALL | {"run_name": "run", "tasks": [4, 2], "total_timesteps": 5120})
    )
    assert (probes.ROOT / config["script"]).samefile(either.__file__)
    assert config["task_names"] == names
    assert config["task_params"] == [envs.cartpole.TASKS[4], envs.cartpole.TASKS[2]]
    assert torch.__version__.startswith(config["versions"]["torch"].split("+")[0])
    model = probes.load(folder)
    assert model["kind"] == "model" and model["task_names"] == names
    assert sorted(p.name for p in folder.iterdir() if "tfevents" not in p.name) == [
        "checkpoint.pt",
        "config.json",
        "heartbeat.csv",
        "lock",
        "model.pt",
    ]


@pytest.mark.parametrize(("rollouts", "interval"), [(50, 1), (51, 2), (104, 3)])
def test_a_run_logs_50_times_at_most_and_prints_every_third_log(trunk, capsys, rollouts, interval):
    _, folder = learn(trunk, "RewardOfAction", rollouts=rollouts, update_epochs=1, num_minibatches=1)
    batch, last = 16 * 16, rollouts * 16 * 16
    steps = {int(row[0]) for row in probes.read_heartbeat(folder)}
    assert steps == {*range(interval * batch, last + 1, interval * batch), last}
    printed = [
        int(line.split()[1].replace(",", ""))
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("step ")
    ]
    assert printed == sorted({*range(3 * interval * batch, last + 1, 3 * interval * batch), last})


def test_greedy_actions():
    space = probes.BOX
    policy = torch.tensor([[[0.5, -3.0]], [[2.0, -1.0]]])
    assert greedy(policy, space).tolist() == [[[0.5, -1.0]], [[1.0, -1.0]]]
    assert greedy(torch.tensor([[[0.1, 0.6, 0.2, 0.1]]]), probes.DISCRETE).tolist() == [[1]]


def test_final_evaluation_is_of_the_saved_model(either):
    folder = run(either)
    agent, W = probes.load_agent(either, folder)
    returns, _, _ = play_episodes(
        lambda x: agent.policy(W, x), envs.make("cartpole10", 2), spread_seeds(1, 1, 20)
    )
    rows = [row[2:] for row in probes.read_heartbeat(folder) if row[1] == "eval/episodic_return"]
    tasks = zip(envs.cartpole.NAMES, returns.mean(1).tolist(), strict=True)
    assert rows == [*((name, str(x)) for name, x in tasks), ("mean", str(returns.mean()))]


OTHERS = [(name, "Pendulum-v1") for name in probes.SCRIPTS]
OTHERS += [
    (name, env_id) for name in probes.TRUNKS for env_id in ("lunarlander20", "lunarlander20-continuous")
]


@pytest.mark.parametrize(("name", "env_id"), OTHERS)
def test_other_environments_run(name, env_id, capsys):
    script = probes.load_script(name)
    tasks = 1 if env_id == "Pendulum-v1" else 20
    size = {"num_steps": 16, "envs_per_task": 1, "num_minibatches": 2, "total_timesteps": 64 * tasks}
    folder = run(script, env_id=env_id, **size | {"norm_reward": True, "eval_episodes": 1})
    assert (folder / "model.pt").exists()
    assert capsys.readouterr().out.count("  return ") == 2 + tasks + 1  # of rollouts 3 and 4; at the end


# Adaptation


def test_evaluations_on_the_way_change_nothing_and_do_not_count_as_time(trunk, monkeypatch):
    """By steps, 10 rollouts of 2,560: after the one that passes a multiple of the interval."""
    plain, evaluate = run(trunk, "plain", total_timesteps=25_600), runs.evaluate
    seen, late, now = [], [0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + late[0])

    def slowly(agent, envs, seed):
        late[0] += 1000  # seconds
        seen.append(evaluate(agent, envs, seed))
        return seen[-1]

    monkeypatch.setattr(runs, "evaluate", slowly)
    folder = run(trunk, "evaluated", total_timesteps=25_600, eval_interval=7_000)
    rows = probes.read_heartbeat(folder)
    evaluations = [row for row in rows if row[1] == "eval/episodic_return" and row[2] == "mean"]
    assert [int(row[0]) for row in evaluations] == [7_680, 15_360, 23_040, 25_600]  # 21,000 is passed there
    assert [float(row[3]) for row in evaluations] == [played.returns.mean() for played in seen]
    assert len({row[3] for row in evaluations}) > 1
    logs = [
        [
            row
            for row in probes.read_heartbeat(f)
            if not row[1].startswith(("charts/SPS", "charts/wall", "eval/"))
        ]
        for f in (folder, plain)
    ]
    assert logs[0] == logs[1]
    for name, x in probes.load(plain)["agent"].items():
        assert torch.equal(probes.load(folder)["agent"][name], x)
    assert all(float(row[3]) < 1000 for row in rows if row[1] == "charts/wall_time")
    assert all(float(row[3]) > 100 for row in rows if row[1] == "charts/SPS")


def test_evaluations_on_the_way_have_episodes_of_their_own_number(trunk, monkeypatch, capsys):
    sizes, evaluate = [], runs.evaluate

    def record(agent, envs, seed):
        played = evaluate(agent, envs, seed)
        sizes.append((played.returns.shape, np.isnan(played.successes).any()))
        return played

    monkeypatch.setattr(runs, "evaluate", record)
    changes = {"env_id": "lunarlander20-goals", "tasks": (3, 4), "envs_per_task": 2, "num_steps": 16}
    changes |= {"total_timesteps": 256, "eval_interval": 128, "eval_episodes": 4, "eval_interval_episodes": 1}
    folder = run(trunk, **changes)
    assert sizes == [((2, 1), False), ((2, 4), False)]
    printed = [line for line in capsys.readouterr().out.splitlines() if "+-" in line]
    assert len(printed) == 3 and all(line.endswith("%") and "  success " in line for line in printed)
    rows = [row for row in probes.read_heartbeat(folder) if row[1] == "eval/success_rate"]
    assert [(row[0], row[2]) for row in rows] == [
        (step, task) for step in ("128", "256") for task in (*envs.lunarlander.GOAL_NAMES[3:5], "mean")
    ]
    monkeypatch.setattr("sys.argv", ["varshare_ppo.py", "--env-id", "lunarlander20-goals"])
    assert trunk.parse_args(trunk.Args, trunk.ENV_DEFAULTS, "").eval_interval_episodes == 5


def test_training_on_some_tasks_only(either):
    folder = run(either, tasks=(5, 1), total_timesteps=2560)
    model = probes.load(folder)
    assert model["task_names"] == [envs.cartpole.NAMES[5], envs.cartpole.NAMES[1]]
    own = [x for name, x in model["agent"].items() if name.partition(".")[0] in either.Agent.per_task]
    assert own and all(len(x) == 2 for x in own)


def test_loading_keeps_what_is_shared_and_the_known_tasks(script):
    norms = {"norm_reward": True, "norm_obs": True, "norm_value": True}
    folder = run(script, tasks=(0, 1, 2), total_timesteps=5120, **norms)
    saved = probes.load(folder)["agent"]
    tasks = (2, 5, 0)
    args = script.Args(tasks=tasks, load=str(folder), **norms)
    fresh, agent = (
        script.Agent(envs.make("cartpole10", 1, tasks), args, torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    load_agent(agent, args, [envs.cartpole.NAMES[task] for task in tasks])
    own = {name for name in saved if name.partition(".")[0] in script.Agent.per_task}
    assert {name.partition(".")[0] for name in own} == set(script.Agent.per_task)
    # the statistics of the returns, and something else, where anything is a task's own
    assert (len(script.Agent.per_task) > 2) == (script.Args.exp_name != "task_blind_ppo")
    for name, x in agent.state_dict().items():
        if name in own:
            assert torch.equal(x[[0, 2]], saved[name][[2, 0]]) and len(saved[name]) == 3
            assert torch.equal(x[1], fresh.state_dict()[name][1])
        else:
            assert torch.equal(x, saved[name])

    # a run starts there: with steps too small to move, it ends there too
    for path in (folder, folder / "model.pt"):
        changes = {"learning_rate": 1e-30, "total_timesteps": 2560}
        still = run(script, f"still-{path.name}", load=str(path), tasks=tasks, **changes, **norms)
        ended = probes.load(still)["agent"]
        for name in ("obs_norm.sums", "obs_norm.mean", "obs_norm.std"):  # which the weights are used to
            assert torch.equal(ended[name], saved[name])
        for name, x in agent.named_parameters():
            rows = [0, 2] if name in script.Agent.per_task else ...
            torch.testing.assert_close(ended[name][rows], x.detach()[rows], rtol=0, atol=1e-20)


def test_a_frozen_theta_stays_and_what_is_a_tasks_own_moves(script):
    if not hasattr(script.Args, "freeze_theta"):
        pytest.skip("the script has no shared theta")
    folder = run(script, tasks=(0, 1, 2), total_timesteps=2560)
    changes = {"freeze_theta": True, "total_timesteps": 2560, "tasks": (3,), "load": str(folder)}
    still = probes.load(run(script, "still", learning_rate=1e-30, **changes))["agent"]
    moved = probes.load(run(script, "moved", **changes))["agent"]
    assert torch.equal(moved["theta"], probes.load(folder)["agent"]["theta"])
    for name in set(script.Agent.per_task) - {"return_stats", "value_norm", "live", "h_count"}:
        assert len(moved[name]) == 1 and not torch.equal(moved[name], still[name])


def test_the_commit_is_dirty_if_code_has_changed_and_not_if_results_have(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs._git_commit() is None
    (tmp_path / "results").mkdir()
    files = [tmp_path / "results/table.md", tmp_path / "script.py"]
    for path in files:
        path.write_text("old")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{40}", runs._git_commit())
    for path, ending in zip(files, ("", "-dirty")):
        path.write_text("new")
        assert re.fullmatch(f"[0-9a-f]{{40}}{ending}", runs._git_commit())


# Failures


def test_nan_stops_the_run_and_the_last_checkpoint_stays_good(either, tmp_path):
    with pytest.raises(SystemExit) as stop:  # 16 steps a rollout: the sixth is the first with a NaN
        learn(either, "TurnsToNaN", checkpoint_interval=0.0)
    assert isinstance(stop.value.code, str)  # which Python prints, and exits with code 1
    assert "NaN" in stop.value.code and f"step {6 * 16 * 16}" in stop.value.code
    checkpoint = probes.load(tmp_path / "runs/probe", "checkpoint")
    assert checkpoint["iteration"] == 5
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())
    assert not (tmp_path / "runs/probe/model.pt").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_learns_the_same(trunk):
    at, _ = learn(trunk, "RewardOfBoth", cuda=True)
    _, policy = at(-1.0, 1.0)
    assert policy[0, 0] < 0.1 and policy[0, 1] > 0.9


# Learning

# return on cartpole10 after 204,800 steps that a script must beat; a random policy has 22
LEARNED = {"varshare_ppo": 250, "l2soft_ppo": 250}
LEARNED |= dict.fromkeys(("task_blind_ppo", "independent_ppo", "hard_sharing_ppo", "contextual_ppo"), 200)
LEARNED |= dict.fromkeys(("pcgrad_ppo", "cagrad_ppo"), 200)


def final_return(script, **changes):
    size = {"num_steps": 128, "eval_episodes": 10, "checkpoint_interval": 1e9}
    rows = probes.read_heartbeat(run(script, script.Args.exp_name, **size | changes))
    return next(float(row[3]) for row in rows if row[1:3] == ("eval/episodic_return", "mean"))


def test_learns_cartpole10(either):
    assert final_return(either, total_timesteps=204_800) > LEARNED[either.Args.exp_name]


@pytest.mark.learns
@pytest.mark.parametrize("name", [x for x in probes.SIBLINGS if "cagrad" not in x])
def test_siblings_learn_cartpole10(name):
    test_learns_cartpole10(probes.load_script(name))


@pytest.mark.learns
def test_learns_identical_tasks(trunk):
    assert final_return(trunk, env_id="cartpole-identical10", total_timesteps=256_000) > 400


def test_goals_need_task_information():
    """VarShare learns them, and a network that is not told the task cannot: the control of the suite."""
    changes = {"env_id": "cartpole-goals10", "norm_value": True, "learning_rate": 6e-3}
    varshare, shared = map(probes.load_script, ("varshare_ppo.py", "baselines/task_blind_ppo.py"))
    assert final_return(varshare, total_timesteps=204_800, **changes) > 220
    assert final_return(shared, total_timesteps=204_800, **changes) < 180


def test_target_kl_ends_the_epochs(trunk):
    """After the first epoch whose last minibatch moved the policy further; 0 never does."""
    batch_of = {}
    for target_kl in (0.0, 1e-9, 1e9):
        agent, args = probes.make_agent(trunk), probes.settings(trunk, update_epochs=3, target_kl=target_kl)
        batch = probes.random_batch(trunk, agent, args.samples_per_task)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        rng = torch.Generator().manual_seed(0)
        stats = trunk.update(agent, optimizer, batch, trunk.minibatch_gradients, args, rng)
        batch_of[target_kl] = len(stats["losses/approx_kl"])
        assert stats["losses/approx_kl"][-1].mean() > 1e-9
    n = args.num_minibatches
    assert batch_of == {0.0: 3 * n, 1e-9: n, 1e9: 3 * n}
