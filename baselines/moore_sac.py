"""MOORE-SAC: orthogonal experts shared by all tasks, which each task mixes by weights of its own.

With shared experts theta and h_m of task m, its mixing weights and output layers, in the actor and both
critics, the script minimises

    sum_m L_SAC(theta, h_m),

where L_SAC, the sum of the critics', the actor's and the temperature's loss, is a mean over samples of task m
from its replay buffer (Hendawy et al. 2024, arXiv 2311.11385). At every input the K experts have outputs u_k
(feature,), made orthonormal by Gram and Schmidt: v_k = r_k / |r_k| with
r_k = u_k - sum_{j<k} (u_k . v_j) v_j. Output layers see tanh(sum_k w_mk v_k).

SAC is Haarnoja et al. 2018 (arXiv 1812.05905) in the form of CleanRL's sac_continuous_action.py, with a
temperature learned per task; for discrete actions Christodoulou 2019, with expectations over actions;
docs/sac.md lists every deviation. The weights of task m are row m of one (task, weight) matrix.
"""

import copy
import math
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# so that a script, or a fork of it in any folder of the project, finds the project's envs package
sys.path += [str(folder) for folder in Path(__file__).resolve().parents if (folder / "envs/runs.py").exists()]
from envs.metrics import Episodes, Means
from envs.models import load_agent
from envs.networks import init_layers, split
from envs.normalisation import RunningNorm
from envs.policies import Categorical, SquashedGaussian, action_noise
from envs.replay import ReplayBuffer
from envs.runs import Run, keep_signals, make_envs, set_up_torch
from envs.settings import RunArgs, args_maker, check_args, fail, run_command
from envs.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat


@dataclass
class Args(RunArgs):
    env_id: str = "cartpole-goals10"  # an environment of several tasks, or any Gymnasium id
    seed: NonNegativeInt = 1  # seed of every random draw
    total_timesteps: PositiveInt = 300_000  # environment steps of the run, all tasks together
    load: str = ""  # start from this saved model (run folder or model.pt); new tasks start anew
    freeze_theta: bool = False  # train only what tasks do not share (needs --load)

    # SAC
    learning_rate: PositiveFloat = 2.5e-3  # step size of Adam, of actor, critics and temperatures
    envs_per_task: PositiveInt = 1  # parallel environments of each task
    buffer_size: PositiveInt = 50_000  # transitions of each task that are kept
    learning_starts: NonNegativeInt = 200  # transitions of each task, at random, before the first update
    batch_size: PositiveInt = 128  # samples of each task in an update
    updates_per_step: PositiveFloat = 1.0  # updates per step of all environments
    gamma: UnitFloat = 0.99  # discount
    tau: UnitFloat = 0.05  # step of the target critics towards the critics
    reward_scale: PositiveFloat = 0.1  # factor of the rewards
    norm_obs: bool = False  # normalise observations by their running mean and std, of all tasks together
    norm_value: bool = False  # normalise the critic's targets by their running mean and std of each task
    target_entropy: NonNegativeFloat = 0.2  # times log(actions), or times -dimensions (1 is usual)
    alpha_init: PositiveFloat = 0.2  # initial temperature
    critics: Literal["min", "mean"] = "min"  # of both critics' values, what targets and actor take
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)  # layers of an expert, the last one its output

    # MOORE
    num_experts: PositiveInt = 4  # K, in actor and critics each


make_args = args_maker(Args, "sac", {})

Weights = dict[str, Tensor]  # of every task, by name: W["actor.0.weight"] is (task, out, in)
# (task, sample, ...); noise (2, task, sample, action) is of continuous actions at next_obs and at obs
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated noise")


def linear(x: Tensor, W: Weights, name: str) -> Tensor:
    """A layer of every task: x (task, ..., sample, in) -> (task, ..., sample, out)."""
    weight = W[f"{name}.weight"]
    bias = W[f"{name}.bias"].unsqueeze(-2)
    return x @ weight.mT + bias


def gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal vectors that span what u (task, expert, sample, feature) do, in the order of experts."""
    v = []
    for r in u.unbind(1):
        for other in v:
            r = r - (r * other).sum(-1, keepdim=True) * other
        v.append(F.normalize(r, dim=-1, eps=1e-8))
    return torch.stack(v, 1)


def mlp(x: Tensor, W: Weights, net: str, num_hidden: int) -> Tensor:
    """A network of every task, e.g. "actor": x (task, sample, in) -> (task, sample, out)."""
    x = x.unsqueeze(1)  # for every expert
    for i in range(num_hidden):
        x = linear(x, W, f"{net}.{i}")
        if i < num_hidden - 1:
            x = x.relu_()
    w = W[f"{net}.w"].view(len(x), -1, 1, 1)
    mixed = (w * gram_schmidt(x)).sum(1)
    return linear(mixed.tanh(), W, f"{net}.{num_hidden}")


class Agent(nn.Module):
    """Actor and two critics of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    `per_task` names the tensors with a row per task, which a new task does not inherit from a saved model.
    """

    per_task = ("heads", "log_alpha", "value_norm")

    def __init__(self, envs, args: Args, rng):
        super().__init__()
        self.discrete = envs.discrete
        self.act_dim = envs.act_dim
        self.num_tasks = envs.num_tasks
        self.num_hidden = len(args.hidden_sizes)
        self.num_experts = args.num_experts
        init = [self.init_weights(envs.obs_dim, args.hidden_sizes, rng) for _ in range(envs.num_tasks)]
        first = init[0]
        own = [name for name in first if f".{self.num_hidden}." in name or name.endswith(".w")]
        shared = [name for name in first if name not in own]  # hidden layers of actor, then of the critics
        self.shapes = {name: first[name].shape for name in shared + own}  # in the order of the columns
        theta = [first[name].flatten() for name in shared]
        heads = []
        for weights in init:
            head = [weights[name].flatten() for name in own]
            heads.append(torch.cat(head))
        self.theta = nn.Parameter(torch.cat(theta))  # (weight,)
        self.heads = nn.Parameter(torch.stack(heads))  # (task, weight)
        log_alpha = torch.full((envs.num_tasks, 1), math.log(args.alpha_init))
        self.log_alpha = nn.Parameter(log_alpha)
        self.obs_norm = RunningNorm((envs.obs_dim,), args.norm_obs, limit=10)
        self.value_norm = RunningNorm((envs.num_tasks, 1), args.norm_value, decay=0.999)
        if self.discrete:
            self.target_entropy = args.target_entropy * math.log(self.act_dim)
        else:
            self.target_entropy = -args.target_entropy * self.act_dim

    def init_weights(self, obs_dim, hidden, rng) -> Weights:
        """One draw of all weights of a task, hidden layers (expert, ...) and w (expert,)."""
        if self.discrete:  # a logit, and a Q, of every action
            actor = critic = (obs_dim, *hidden, self.act_dim)
        else:  # a Gaussian's mean and log standard deviation; Q of an action
            actor = (obs_dim, *hidden, 2 * self.act_dim)
            critic = (obs_dim + self.act_dim, *hidden, 1)
        weights = {}
        for net, sizes, gain in (("actor", actor, 0.01), ("critic1", critic, 1.0), ("critic2", critic, 1.0)):
            draws = [init_layers(net, sizes, gain, rng) for _ in range(self.num_experts)]
            for name, x in draws[0].items():
                experts = torch.stack([draw[name] for draw in draws])
                weights[name] = x if f".{self.num_hidden}." in name else experts
            for i, fan_in in enumerate(sizes[:-2]):  # with 0 directions near obs = 0 would turn too fast
                weights[f"{net}.{i}.bias"].uniform_(-1, 1, generator=rng).div_(math.sqrt(fan_in))
            w = torch.randn(self.num_experts, generator=rng)
            weights[f"{net}.w"] = w / math.sqrt(self.num_experts)
        return weights

    def weights(self) -> Tensor:
        """W_m, theta and what is task m's own, (task, weight)."""
        theta = self.theta.expand(len(self.heads), -1)
        return torch.cat((theta, self.heads), dim=1)

    def unpack(self, weights: Tensor) -> Weights:
        """Named views of a (task, weight) matrix."""
        return split(weights, self.shapes)

    def actor(self, W: Weights, obs):
        """The policy at obs (task, sample, obs)."""
        out = mlp(obs, W, "actor", self.num_hidden)
        if self.discrete:
            return Categorical(out)
        return SquashedGaussian(out)

    def critics(self, W: Weights, *inputs: Tensor) -> Tensor:
        """Q of both, (critic, task, sample, action): of obs for every action, or of obs and an action."""
        x = torch.cat(inputs, -1)
        q1 = mlp(x, W, "critic1", self.num_hidden)
        q2 = mlp(x, W, "critic2", self.num_hidden)
        q = torch.stack((q1, q2))
        return self.value_norm.inverse(q.flatten(2)).view_as(q)

    def policy(self, W: Weights, obs: Tensor) -> Tensor:
        """Action probabilities, or the mean's action, (task, sample, action), for the evaluation."""
        return self.actor(W, self.obs_norm(obs)).mean

    def random_actions(self, noise: Tensor) -> Tensor:
        """Uniform actions made of `action_noise`."""
        if self.discrete:
            return noise.argmax(-1)
        return torch.special.erf(noise / math.sqrt(2))


def take(q, args) -> Tensor:
    """What targets and actor take of two critics, (critic, ...) -> (...)."""
    return q.amin(0) if args.critics == "min" else q.mean(0)


def discrete_terms(agent, W: Weights, target: Weights, b: Batch, args):
    """What `sac_loss` is made of, with expectations over actions.

    Q of the actions taken, (critic, task, sample); the policy's Q by the target critics, and its entropy, at
    next_obs, (task, sample) each; and the same at obs, by the critics. Only the actor gets their gradient.
    """

    def expect(policy, q):
        logp = policy.logits.log_softmax(-1)
        p = logp.exp()
        return (p * q).sum(-1), -(p * logp).sum(-1)

    q = agent.critics(W, b.obs)
    index = b.actions.unsqueeze(-1).expand(2, -1, -1, 1)
    q_taken = q.gather(3, index).squeeze(3)
    with torch.no_grad():
        next_q = agent.critics(target, b.next_obs)
        after = expect(agent.actor(W, b.next_obs), take(next_q, args))
    now = expect(agent.actor(W, b.obs), take(q.detach(), args))
    return q_taken, after, now


def continuous_terms(agent, W: Weights, target: Weights, b: Batch, args):
    """The same, with one action drawn at next_obs and one at obs."""

    def draw(policy, critics, obs, noise):
        actions, logp = policy.sample_log_prob(noise)
        q = agent.critics(critics, obs, actions)
        return take(q, args).squeeze(2), -logp

    next_noise, noise = b.noise
    q_taken = agent.critics(W, b.obs, b.actions).squeeze(3)
    with torch.no_grad():
        after = draw(agent.actor(W, b.next_obs), target, b.next_obs, next_noise)
    fixed = {name: x.detach() for name, x in W.items()}
    now = draw(agent.actor(W, b.obs), fixed, b.obs, noise)
    return q_taken, after, now


def sac_loss(agent, W: Weights, target: Weights, b: Batch, args) -> tuple[Tensor, dict, Tensor]:
    """Critics', actor's and temperature's loss in one sum; what to log, (task,) each; and the targets.

    One backward() gives each of the three its own gradient: the critics' targets have none, the actor's loss
    sees detached critics and temperature, and the temperature's a detached entropy.
    """
    terms = discrete_terms if agent.discrete else continuous_terms
    q_taken, (next_q, next_entropy), (q, entropy) = terms(agent, W, target, b, args)
    alpha = agent.log_alpha.exp().detach()  # (task, 1)
    next_value = next_q + alpha * next_entropy
    discount = args.gamma * (1 - b.terminated)
    target_q = args.reward_scale * b.rewards + discount * next_value
    td_error = (q_taken - target_q) / agent.value_norm.std
    qf_loss = 0.5 * td_error.square().sum(0).mean(1)
    actor_loss = -(q + alpha * entropy).mean(1)
    entropy = entropy.detach().mean(1)
    excess = entropy - agent.target_entropy
    alpha_loss = agent.log_alpha.exp().squeeze(1) * excess
    stats = {
        "losses/qf1_values": q_taken[0].mean(1),
        "losses/qf2_values": q_taken[1].mean(1),
        "losses/qf_loss": qf_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
        "losses/entropy": entropy,
    }
    loss = qf_loss + actor_loss + alpha_loss
    return loss, stats, target_q


def minibatch_backward(agent, target, b: Batch, args) -> tuple[dict, Tensor]:
    """Gradients of the objective at the top, what to log (task,), and Q's targets."""
    W = agent.unpack(agent.weights())
    slow = target.unpack(target.weights())
    losses, stats, target_q = sac_loss(agent, W, slow, b, args)
    losses.sum().backward()
    return {name: x.detach() for name, x in stats.items()}, target_q


@torch.no_grad()
def environment_step(agent, buffer, envs, obs, episodes, at_random, args, rng):
    """A step of all environments, from obs (task * env, obs), into the buffer; returns the next obs."""
    size = (envs.num_tasks, args.envs_per_task)

    def to_torch(x):  # (task * env, ...) -> (task, env, ...)
        return torch.from_numpy(x).to(rng.device).unflatten(0, size)

    W = agent.unpack(agent.weights())
    noise = action_noise(agent.discrete, (*size, agent.act_dim), rng)
    x = to_torch(obs)
    if not args.load:  # else the loaded weights are used to the loaded statistics
        agent.obs_norm.see(x)
    if at_random:
        actions = agent.random_actions(noise)
    else:
        policy = agent.actor(W, agent.obs_norm(x))
        actions = policy.sample(noise)
    flat = actions.flatten(0, 1).cpu().numpy()
    next_obs, rewards, terminated, _, infos = envs.step(flat)
    episodes.add(infos)
    final_obs = to_torch(infos.get("final_obs", next_obs))
    buffer.add(x, final_obs, actions, to_torch(rewards), to_torch(terminated))
    return next_obs


def update(agent, target, optimizer, buffer, backward, args, rng) -> dict:
    """One step of Adam, and of the target; returns what to log, (task,) each."""
    draws = 0 if agent.discrete else 2  # an expectation over actions needs none
    shape = (draws, agent.num_tasks, args.batch_size, agent.act_dim)
    noise = action_noise(agent.discrete, shape, rng)
    sample = buffer.sample(args.batch_size, rng)
    obs = agent.obs_norm(sample.pop("obs"))
    next_obs = agent.obs_norm(sample.pop("next_obs"))
    batch = Batch(obs, next_obs, **sample, noise=noise)
    optimizer.zero_grad()
    stats, target_q = backward(agent, target, batch, args)
    optimizer.step()
    with torch.no_grad():
        for average, x in zip(target.parameters(), agent.parameters()):
            average.lerp_(x, args.tau)
    agent.value_norm.see(target_q)
    return stats


@torch.no_grad()
def log_method(run, agent):
    """Log what is the method's own."""
    run.log("varshare/theta_norm", agent.theta.norm())
    run.log("varshare/head_norm", agent.heads.norm(dim=1))


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    check_args(args)
    if not args.hidden_sizes:
        fail("--hidden-sizes must have a layer: without one, tasks share nothing")
    if args.buffer_size < max(args.batch_size, args.learning_starts):
        fail("--buffer-size must be at least --batch-size and --learning-starts")
    if args.num_experts > args.hidden_sizes[-1]:
        fail("--num-experts must be at most the last of --hidden-sizes: so many directions are orthogonal")


@keep_signals
def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    envs = make_envs(args, args.envs_per_task)
    num_iterations = args.total_timesteps // envs.num_envs  # a step of all environments each
    random_steps = math.ceil(args.learning_starts / args.envs_per_task)
    starts = max(1, random_steps)  # step of the first update
    if num_iterations < starts:
        least = starts * envs.num_envs
        fail(f"--total-timesteps must be at least {least}: one step, and --learning-starts, of all tasks")
    run = Run(args, __file__, envs)
    if run.finished:
        return run.folder

    device = set_up_torch(args)
    rng = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(envs, args, torch.Generator().manual_seed(args.seed))
    if args.load and not run.resumes:
        load_agent(agent, args, envs.task_names)
    agent.to(device).theta.requires_grad_(not args.freeze_theta)
    target = copy.deepcopy(agent).requires_grad_(False)  # of it the critics are used, with mean weights
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    backward = minibatch_backward
    if args.compile:
        backward = torch.compile(backward, fullgraph=True)
    capacity = math.ceil(args.buffer_size / args.envs_per_task)
    buffer = ReplayBuffer(envs, min(capacity, num_iterations), device)
    episodes, means = Episodes(envs), Means()
    state = dict(agent=agent, target=target, optimizer=optimizer, rng=rng, episodes=episodes)
    state |= dict(buffer=buffer, means=means)
    obs = run.start_or_resume(envs, num_iterations, envs.num_envs, **state)

    for step in range(run.first_iteration, num_iterations + 1):
        obs = environment_step(agent, buffer, envs, obs, episodes, step <= random_steps, args, rng)
        if step >= starts:
            before = int((step - starts) * args.updates_per_step)
            after = int((step - starts + 1) * args.updates_per_step)
            for _ in range(after - before):
                means.add(update(agent, target, optimizer, buffer, backward, args, rng))
        if step == starts:
            run.start_clock()  # after the first update, which compiles

        if run.log_due:
            run.log_charts(episodes, args.learning_rate)
            run.log_all(means.pop())
            run.log("losses/alpha", agent.log_alpha.detach().exp().squeeze(1))
            log_method(run, agent)
        if run.eval_due:
            run.evaluate(args.eval_interval_episodes)
        if step == num_iterations:
            buffer.clear()  # a finished run has no use for it
        run.end_iteration()

    return run.finish()


if __name__ == "__main__":
    run_command(train, make_args, __doc__)
