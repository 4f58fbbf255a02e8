"""BRC: its projection, its losses and their gradients, the scale of its rewards, and what it learns."""

import math

import numpy as np
import probes
import pytest
import torch
from probes import BOTH, TASKS
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution

from envs.replay import ReplayBuffer

brc = probes.load_script("baselines/brc_sac.py")
SMALL = {"actor_width": 6, "critic_width": 7, "num_atoms": 5, "v_max": 3.0, "embedding_size": 4}

pytestmark = pytest.mark.usefixtures("elsewhere")


def settings(**changes):
    return probes.settings(brc, **SMALL | changes)


def make_agent(space=probes.DISCRETE, **changes):
    agent = probes.make_agent(brc, space, **SMALL | changes)
    with torch.no_grad():
        agent.theta *= 0.3  # atanh, in the log-probability of a saturated action, is rough
        agent.highest.copy_(torch.tensor([[2.0], [0.0], [7.0]]))
    return agent


# The projection


def projected(atoms, probs, support):
    """The definition: an atom of the support gets of each mass what a hat around it says, (..., atom)."""
    step = support[1] - support[0]
    inside = atoms.clamp(support[0], support[-1])
    hats = (1 - (inside.unsqueeze(-1) - support).abs() / step).clamp(min=0)
    return (hats * probs.unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("num_atoms", [2, 5, 101])
def test_projection_is_its_definition(num_atoms):
    rng = torch.Generator().manual_seed(0)
    support = torch.linspace(-3, 3, num_atoms, dtype=torch.double)
    probs = torch.rand(2, 4, 30, generator=rng).double()
    probs /= probs.sum(-1, keepdim=True)
    for spread in (1.0, 5.0):  # within the support, and beyond
        atoms = spread * (2 * torch.rand(2, 4, 30, generator=rng).double() - 1)
        mass = brc.project(atoms, probs, support)
        torch.testing.assert_close(mass, projected(atoms, probs, support))
        torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4).double())
        mean = (atoms.clamp(-3, 3) * probs).sum(-1)
        torch.testing.assert_close(mass @ support, mean)


def test_what_lies_on_an_atom_stays_there_and_what_lies_beyond_goes_to_the_ends():
    support = torch.linspace(-10, 10, 101)
    probs = torch.rand(101, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(brc.project(support, probs, support), probs, rtol=0, atol=2e-4)
    beyond, probs = torch.tensor([[-50.0, 10.0, 11.0, -math.inf], [0.1, 0.2, 0.4, 0.3]])
    mass = brc.project(beyond, probs, support)
    assert mass[0].item() == pytest.approx(0.4) and mass[-1].item() == pytest.approx(0.6)
    assert mass[1:-1].abs().max() == 0


# The objective


def network(W, net, x, num_blocks):
    """Output of a network at one input, by its formula."""

    def dense(name, x):
        return W[f"{name}.weight"] @ x + W[f"{name}.bias"]

    def dense_norm(name, x):
        x = dense(name, x)
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return W[f"{name}.gain"] * x + W[f"{name}.shift"]

    x = dense_norm(f"{net}.in", x).relu()
    for i in range(num_blocks):
        x = x + dense_norm(f"{net}.{i}.1", dense_norm(f"{net}.{i}.0", x).relu())
    return dense(f"{net}.out", x)


def named(agent):
    """Shared weights by name, from theta."""
    sizes = [math.prod(shape) for shape in agent.shapes.values()]
    parts = zip(agent.shapes.items(), agent.theta.split(sizes))
    return {name: x.view(shape) for (name, shape), x in parts}


def losses_by_hand(agent, target, b, args):
    """Critics', actor's and temperature's loss of each task, (task,) each, by sample and by action."""
    W, slow = named(agent), named(target)
    fixed = {name: x.detach() for name, x in W.items()}
    alpha, found = agent.log_alpha.detach().exp(), []
    ours, theirs = (x.embedding / x.embedding.square().sum(1, True).sqrt() for x in (agent, target))
    bonus = alpha * abs(agent.target_entropy) / (2 * (1 - args.gamma))
    for m in range(TASKS):
        e, known = ours[m], agent.highest[m, 0]
        scale = args.v_max / (known + bonus) if known > 0 else 0.0

        def dists(W, e, *inputs):
            """Of both critics (2, action, atom)."""
            x = torch.cat((*inputs, e))
            out = [network(W, f"critic{k}", x, args.critic_blocks) for k in (1, 2)]
            return torch.stack(out).view(2, -1, args.num_atoms).softmax(-1)

        def policy(obs, e=e):
            out = network(W, "actor", torch.cat((obs, e.detach())), 1)
            if agent.discrete:
                return Categorical(logits=out)
            mean, logstd = out.chunk(2)
            base = Normal(mean, (-5 + 3.5 * (logstd.tanh() + 1)).exp())
            return Independent(TransformedDistribution(base, [TanhTransform()]), 1), base

        for i in range(len(b.obs[m])):
            obs, next_obs = b.obs[m, i], b.next_obs[m, i]
            r, discount = scale * b.rewards[m, i], args.gamma * (1 - b.terminated[m, i])
            if agent.discrete:
                now, after = policy(obs), policy(next_obs)
                p_next = dists(slow, theirs[m], next_obs).mean(0)
                logs = after.logits
                taken = dists(W, e, obs)[:, b.actions[m, i]]
                q = dists(fixed, e.detach(), obs).mean(0) @ agent.atoms
                actor = (now.probs * (alpha * now.logits - q)).sum()
                entropy, weights = now.entropy(), after.probs
            else:
                (after, base), (now, base_now) = policy(next_obs), policy(obs)
                action = (base.mean + base.stddev * b.noise[0][m, i]).tanh()
                p_next = dists(slow, theirs[m], next_obs, action).mean(0)
                logs, weights = after.log_prob(action).view(1), torch.ones(1).double()
                taken = dists(W, e, obs, b.actions[m, i])[:, 0]
                action = (base_now.mean + base_now.stddev * b.noise[1][m, i]).tanh()
                q = dists(fixed, e.detach(), obs, action).mean(0) @ agent.atoms
                actor = (alpha * now.log_prob(action) - q).sum()
                entropy = -now.log_prob(action)
            y = sum(
                weights[a] * projected(r + discount * (agent.atoms - alpha * logs[a]), p_next[a], agent.atoms)
                for a in range(len(p_next))
            )
            critics = -(y.detach() * taken.log()).sum()
            temperature = agent.log_alpha.exp() * (entropy.detach() - agent.target_entropy)
            found.append(torch.stack((critics, actor, temperature)))
    return torch.stack(found).view(TASKS, -1, 3).mean(1).unbind(1)


@BOTH
def test_gradients_are_those_of_the_objective(space):
    agent, args = make_agent(space), settings(gamma=0.8)
    target, b = probes.target_of(agent), probes.random_transitions(brc, agent, 8)
    losses = losses_by_hand(agent, target, b, args)
    names, parameters = zip(*agent.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(sum(x.sum() for x in losses), parameters)))
    grads, stats = probes.gradients(brc, agent, target, b, args)
    torch.testing.assert_close(grads, expected)
    for name, x in zip(("qf_loss", "actor_loss", "alpha_loss"), losses):
        torch.testing.assert_close(stats[f"losses/{name}"], x.detach())
    assert not any(x.requires_grad for x in stats.values())


def test_only_the_critics_move_the_embeddings():
    agent, args = make_agent(), settings(gamma=0.8)
    target, b = probes.target_of(agent), probes.random_transitions(brc, agent, 8)
    before, _ = probes.gradients(brc, agent, target, b, args)
    critics = sum(math.prod(x) for name, x in agent.shapes.items() if "critic" in name)
    with torch.no_grad():
        agent.theta[:-critics] += 0.1
    b_end = b._replace(terminated=torch.ones_like(b.terminated))  # else the targets follow the actor
    moved, _ = probes.gradients(brc, agent, target, b_end, args)
    with torch.no_grad():
        agent.theta[:-critics] -= 0.1
    unmoved, _ = probes.gradients(brc, agent, target, b_end, args)
    assert before["embedding"].abs().min() > 0
    torch.testing.assert_close(moved["embedding"], unmoved["embedding"])
    assert not torch.allclose(moved["theta"][:-critics], unmoved["theta"][:-critics])


# The scale of the rewards


def test_the_largest_return_of_hand_made_episodes():
    """Two tasks of two environments each, whose episodes end at different steps; a ring of six steps."""
    agent, args = make_agent(), settings(gamma=0.5, envs_per_task=2)
    buffer = ReplayBuffer(probes.spaces(num_tasks=2), 6, torch.device("cpu"))
    agent.highest = torch.zeros(2, 1)

    def step(rewards, terminated=(), truncated=()):
        """Of environments 0 and 1 of one task, 2 and 3 of the other; ends are {environment: length}."""
        x, ends = torch.zeros(2, 2, probes.OBS), dict(terminated) | dict(truncated)
        ended = torch.tensor([float(i in dict(terminated)) for i in range(4)]).view(2, 2)
        buffer.add(x, x, torch.zeros(2, 2), torch.tensor(rewards).view(2, 2), ended)
        mask = np.isin(range(4), list(ends))
        lengths = {"episode": {"l": np.array([ends.get(i, 0) for i in range(4)])}}
        brc.see_returns(agent, buffer, {"final_info": lengths, "_final_info": mask} if ends else {}, args)
        return agent.highest.flatten().tolist()

    assert step([1.0, 0.0, 1.0, 0.0]) == [0.0, 0.0]
    assert step([-8.0, 0.0, 1.0, 0.0]) == [0.0, 0.0]
    # returns -2.5, -7, 2: terminated, nothing follows
    assert step([2.0, 0.0, 1.0, 0.0], terminated={0: 3}) == [7.0, 0.0]
    # truncated, its mean reward 1 for ever, 1 / (1 - 0.5); the other environment of the task had zeros only
    assert step([0.0, 0.0, 1.0, 0.0], terminated={3: 4}, truncated={2: 4}) == [7.0, 2.0]
    step([4.0, 0.0, 0.0, 0.0])
    # mean 7/3, 14/3 afterwards: 5 1/3, 6 2/3, 3 1/3
    assert step([3.0, 0.0, 0.0, -9.0], terminated={3: 2}, truncated={0: 3}) == [7.0, 9.0]
    step([0.0, 9.0, 0.0, 0.0])
    # the ring has come round
    assert step([0.0, 9.0, 0.0, 0.0], terminated={1: 2}) == [13.5, 9.0]
    buffer.steps = 0
    # begun before the buffer: what it has of it
    assert step([0.0, 20.0, 0.0, 0.0], terminated={1: 5}) == [20.0, 9.0]


def test_returns_lie_among_the_atoms_and_none_counts_before_one_is_known():
    agent, args = make_agent(), settings(gamma=0.8)
    alpha, bonus = torch.tensor(0.4), 0.4 * abs(agent.target_entropy) / 0.4
    scale = brc.reward_scale(agent, alpha, args).flatten().tolist()
    assert scale == pytest.approx([3 / (2 + bonus), 0.0, 3 / (7 + bonus)])


# Runs


def test_a_run_keeps_the_largest_returns_and_decays_weights_only(monkeypatch):
    made, optimizer = [], torch.optim.AdamW

    def record(groups, **options):
        made.append((groups, options))
        return optimizer(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", record)
    folder = probes.run(brc, weight_decay=0.3)
    ((weights, temperature), _), agent = made[0], probes.load(folder)["agent"]
    assert weights["weight_decay"] == 0.3 and temperature["weight_decay"] == 0
    assert temperature["betas"] == (0.5, 0.999) and weights["betas"] == (0.9, 0.999)
    assert [x.shape for x in temperature["params"]] == [torch.Size()]
    assert [x.ndim for x in weights["params"]] == [1, 2] and len(weights["params"][1]) == 10
    assert agent["highest"].min() >= 1 and agent["highest"].max() < 100
    rows = [row for row in probes.read_heartbeat(folder) if row[1] == "varshare/reward_scale"]
    assert {row[2] for row in rows} > {"mean"} and float(rows[-1][3]) > 0


def test_a_loaded_model_keeps_its_atoms_and_the_scale_that_belongs_to_them():
    folder = probes.run(brc, "first", v_max=5.0)
    again = probes.load(probes.run(brc, "again", v_max=20.0, load=str(folder), learning_rate=1e-30))["agent"]
    assert again["atoms"][-1] == 5
    agent = make_agent(v_max=5.0)
    scales = [brc.reward_scale(agent, torch.tensor(0.4), settings(gamma=0.8, v_max=x)) for x in (5.0, 20.0)]
    assert torch.equal(*scales)


def test_nan_stops_the_run():
    with pytest.raises(SystemExit, match="NaN or infinite"):
        probes.learn(brc, "TurnsToNaN", checkpoint_interval=0.0)


@pytest.mark.parametrize(
    ("changes", "message"), [({"gamma": 1.0}, "--gamma"), ({"num_atoms": 1}, "--num-atoms")]
)
def test_returns_without_bound_and_one_atom_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        probes.run(brc, **changes)
