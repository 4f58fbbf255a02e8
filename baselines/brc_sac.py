"""BRC: bigger, regularised networks and categorical critics, told the task by a learned embedding.

With shared weights theta, and an embedding e_m of task m, of length 1, that actor and critics find
concatenated to their inputs, the script minimises

    sum_m [ sum_i CE(P[r + gamma (z - alpha log pi(a' | s'))], q_i(s, a)) + L_actor + L_temperature ],

all of them means over samples of task m from its replay buffer (Nauman et al. 2025, arXiv 2505.23150, as in
their code). Critic i gives a distribution q_i of the return over the atoms z. At s' the distributions of both
target critics are averaged, shifted, and projected onto the atoms by P (Bellemare et al. 2017); the loss is
the cross-entropy. Rewards are scaled by the largest return that an episode of the task had, so that returns
lie among the atoms. Actor and critics are residual blocks with layer normalisation, weights decay, and only
the critics move the embeddings.

SAC is Haarnoja et al. 2018 (arXiv 1812.05905) in the form of CleanRL's sac_continuous_action.py, with one
temperature for all tasks; for discrete actions Christodoulou 2019, with expectations over actions. Deviations
are listed in docs/baselines.md and docs/sac.md. All tasks have the same weights theta.
"""

import copy
import math
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    learning_rate: PositiveFloat = 2.5e-3  # step size of AdamW, of actor, critics and temperature
    envs_per_task: PositiveInt = 1  # parallel environments of each task
    buffer_size: PositiveInt = 50_000  # transitions of each task that are kept
    learning_starts: NonNegativeInt = 200  # transitions of each task, at random, before the first update
    batch_size: PositiveInt = 128  # samples of each task in an update
    updates_per_step: PositiveFloat = 1.0  # updates per step of all environments
    gamma: UnitFloat = 0.99  # discount
    tau: UnitFloat = 0.05  # step of the target critics towards the critics
    norm_obs: bool = False  # normalise observations by their running mean and std, of all tasks together
    target_entropy: NonNegativeFloat = 0.2  # times log(actions), or times -dimensions (1 is usual)
    alpha_init: PositiveFloat = 0.05  # initial temperature

    # BRC
    actor_width: PositiveInt = 64  # units in a layer of the actor, which has one block
    critic_width: PositiveInt = 64  # units in a layer of a critic
    critic_blocks: PositiveInt = 2  # residual blocks of a critic
    num_atoms: PositiveInt = 101  # of a critic's distribution
    v_max: PositiveFloat = 10.0  # they lie from -v_max to v_max
    embedding_size: PositiveInt = 32  # numbers in the embedding of a task
    weight_decay: NonNegativeFloat = 1e-4  # of all weights, times the step size


# the method's own settings that an environment needs; what it needs for every method is in envs/settings.py
METAWORLD = dict(critic_width=1024, actor_width=256)
ENV_DEFAULTS = dict.fromkeys(("mt10", "mt10-reward-v1", "mt50"), METAWORLD)
make_args = args_maker(Args, "sac", ENV_DEFAULTS)

Weights = dict[str, Tensor]  # by name: W["actor.in.weight"] is (out, in), W["embedding"] (task, number)
# (task, sample, ...); noise (2, task, sample, action) is of continuous actions at next_obs and at obs
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated noise")


def linear(x: Tensor, W: Weights, name: str) -> Tensor:
    """A layer that all tasks share: x (..., in) -> (..., out)."""
    return F.linear(x, W[f"{name}.weight"], W[f"{name}.bias"])


def dense_norm(x: Tensor, W: Weights, name: str) -> Tensor:
    """The same with layer normalisation (Ba et al. 2016) behind it."""
    x = linear(x, W, name)
    return F.layer_norm(x, x.shape[-1:], W[f"{name}.gain"], W[f"{name}.shift"])


def bronet(x: Tensor, embedding: Tensor, W: Weights, net: str, num_blocks: int) -> Tensor:
    """A network of all tasks: x (task, sample, in), embedding (task, number) -> (task, sample, out)."""
    embedding = embedding.unsqueeze(1).expand(-1, x.shape[1], -1)
    x = torch.cat((x, embedding), -1)
    x = dense_norm(x, W, f"{net}.in").relu()
    for i in range(num_blocks):
        y = dense_norm(x, W, f"{net}.{i}.0").relu()
        x = x + dense_norm(y, W, f"{net}.{i}.1")
    return linear(x, W, f"{net}.out")


def init_bronet(net, num_inputs, num_outputs, width, num_blocks, rng) -> Weights:
    """One draw of a network's weights: layers orthogonal, biases 0."""
    sizes = {f"{net}.in": (num_inputs, width)}
    for i in range(num_blocks):
        sizes[f"{net}.{i}.0"] = (width, width)
        sizes[f"{net}.{i}.1"] = (width, width)
    sizes[f"{net}.out"] = (width, num_outputs)
    weights = {}
    for name, size in sizes.items():
        weight, bias = init_layers(name, size, math.sqrt(2), rng).values()
        weights[f"{name}.weight"] = weight
        weights[f"{name}.bias"] = bias
        if not name.endswith("out"):
            weights[f"{name}.gain"] = torch.ones(width)
            weights[f"{name}.shift"] = torch.zeros(width)
    return weights


class Agent(nn.Module):
    """Actor and two critics of all tasks. Row m of `weights()` (task, number) is e_m, task m's own.

    `per_task` names the tensors with a row per task, which a new task does not inherit from a saved model.
    """

    per_task = ("embedding", "highest")

    def __init__(self, envs, args: Args, rng):
        super().__init__()
        self.discrete = envs.discrete
        self.act_dim = envs.act_dim
        self.num_tasks = envs.num_tasks
        self.critic_blocks = args.critic_blocks
        self.num_atoms = args.num_atoms
        init = self.init_weights(envs.obs_dim, args, rng)
        self.shapes = {name: x.shape for name, x in init.items()}  # in the order of theta
        flat = torch.cat([x.flatten() for x in init.values()])
        self.theta = nn.Parameter(flat)  # (weight,)
        embedding = torch.randn(envs.num_tasks, args.embedding_size, generator=rng)
        self.embedding = nn.Parameter(embedding / math.sqrt(args.embedding_size))  # (task, number)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_init)))  # one for all tasks
        self.register_buffer("highest", torch.zeros(envs.num_tasks, 1))  # largest |return|; 0: none yet
        self.register_buffer("atoms", torch.linspace(-args.v_max, args.v_max, args.num_atoms))
        self.obs_norm = RunningNorm((envs.obs_dim,), args.norm_obs, limit=10)
        if self.discrete:
            self.target_entropy = args.target_entropy * math.log(self.act_dim)
        else:
            self.target_entropy = -args.target_entropy * self.act_dim

    def init_weights(self, obs_dim, args: Args, rng) -> Weights:
        """One draw of all shared weights."""
        inputs = obs_dim + args.embedding_size
        if self.discrete:  # a logit, and atoms, of every action
            actor = (inputs, self.act_dim)
            critic = (inputs, self.act_dim * args.num_atoms)
        else:  # a Gaussian's mean and log standard deviation; atoms of an action
            actor = (inputs, 2 * self.act_dim)
            critic = (inputs + self.act_dim, args.num_atoms)
        weights = init_bronet("actor", *actor, args.actor_width, 1, rng)
        for net in ("critic1", "critic2"):
            weights |= init_bronet(net, *critic, args.critic_width, args.critic_blocks, rng)
        return weights

    def weights(self) -> Tensor:
        """e_m of length 1, (task, number)."""
        return F.normalize(self.embedding, dim=1)

    def unpack(self, weights: Tensor) -> Weights:
        """Shared weights by name, and the embeddings."""
        W = split(self.theta.unsqueeze(0), self.shapes)
        return {name: x[0] for name, x in W.items()} | {"embedding": weights}

    def actor(self, W: Weights, obs):
        """The policy at obs (task, sample, obs)."""
        out = bronet(obs, W["embedding"].detach(), W, "actor", 1)
        if self.discrete:
            return Categorical(out)
        return SquashedGaussian(out)

    def critics(self, W: Weights, *inputs: Tensor) -> Tensor:
        """Logits of both, (critic, task, sample, action, atom): of obs for every action, or with one."""
        x = torch.cat(inputs, -1)
        e = W["embedding"]
        q1 = bronet(x, e, W, "critic1", self.critic_blocks)
        q2 = bronet(x, e, W, "critic2", self.critic_blocks)
        both = torch.stack((q1, q2))
        return both.unflatten(-1, (-1, self.num_atoms))

    def policy(self, W: Weights, obs: Tensor) -> Tensor:
        """Action probabilities, or the mean's action, (task, sample, action), for the evaluation."""
        return self.actor(W, self.obs_norm(obs)).mean

    def random_actions(self, noise: Tensor) -> Tensor:
        """Uniform actions made of `action_noise`."""
        if self.discrete:
            return noise.argmax(-1)
        return torch.special.erf(noise / math.sqrt(2))


def project(atoms: Tensor, probs: Tensor, support: Tensor) -> Tensor:
    """Mass at atoms (..., number) dealt out to the two neighbours on the support (atom,): (..., atom)."""
    last = len(support) - 1
    place = (atoms - support[0]) / (support[1] - support[0])
    place = place.clamp(0, last)
    lower = place.floor().clamp(max=last - 1)
    upper_part = probs * (place - lower)
    index = lower.nan_to_num().long()  # so that NaN comes out as NaN, and stops the run
    mass = torch.zeros(*atoms.shape[:-1], len(support), dtype=probs.dtype, device=probs.device)
    mass.scatter_add_(-1, index, probs - upper_part)
    return mass.scatter_add_(-1, index + 1, upper_part)


def discrete_terms(agent, W: Weights, target: Weights, b: Batch):
    """What `brc_loss` is made of, with expectations over actions.

    Logits of the actions taken, (critic, task, sample, atom); the targets' distributions at next_obs, with
    log-probabilities and probabilities of the actions, (task, sample, action, ...) each; and the policy's Q,
    by the critics, and entropy at obs, (task, sample) each. Only the actor gets the gradient of the last two.
    """
    logits = agent.critics(W, b.obs)
    index = b.actions[None, :, :, None, None]
    index = index.expand(2, -1, -1, 1, agent.num_atoms)
    taken = logits.gather(3, index).squeeze(3)
    with torch.no_grad():
        next_dist = agent.critics(target, b.next_obs).softmax(-1).mean(0)
        next_logp = agent.actor(W, b.next_obs).logits.log_softmax(-1)
        q = logits.softmax(-1).mean(0) @ agent.atoms
    logp = agent.actor(W, b.obs).logits.log_softmax(-1)
    p = logp.exp()
    now = (p * q).sum(-1), -(p * logp).sum(-1)
    return taken, (next_dist, next_logp, next_logp.exp()), now


def continuous_terms(agent, W: Weights, target: Weights, b: Batch):
    """The same, with one action drawn at next_obs and one at obs."""
    next_noise, noise = b.noise
    taken = agent.critics(W, b.obs, b.actions).squeeze(3)
    with torch.no_grad():
        next_actions, next_logp = agent.actor(W, b.next_obs).sample_log_prob(next_noise)
        next_dist = agent.critics(target, b.next_obs, next_actions).softmax(-1).mean(0)
        next_logp = next_logp.unsqueeze(-1)
    actions, logp = agent.actor(W, b.obs).sample_log_prob(noise)
    fixed = {name: x.detach() for name, x in W.items()}
    dist = agent.critics(fixed, b.obs, actions).softmax(-1).mean(0)
    q = (dist @ agent.atoms).squeeze(2)
    return taken, (next_dist, next_logp, torch.ones_like(next_logp)), (q, -logp)


def reward_scale(agent, alpha: Tensor, args) -> Tensor:
    """Factor of the rewards, (task, 1): the largest return stays among the atoms; 0 before one is known."""
    bonus = alpha * abs(agent.target_entropy) / (2 * (1 - args.gamma))  # of entropy, in all later steps
    v_max = agent.atoms[-1]  # which a loaded model brings with it
    return torch.where(agent.highest > 0, v_max / (agent.highest + bonus), 0)


def brc_loss(agent, W: Weights, target: Weights, b: Batch, args) -> tuple[Tensor, dict]:
    """Critics', actor's and temperature's loss in one sum, and what to log, (task,) each.

    One backward() gives each of the three its own gradient: the critics' targets have none, the actor's loss
    sees detached critics and temperature, and the temperature's a detached entropy.
    """
    terms = discrete_terms if agent.discrete else continuous_terms
    taken, (next_dist, next_logp, next_p), (q, entropy) = terms(agent, W, target, b)
    alpha = agent.log_alpha.exp().detach()
    next_value = agent.atoms - alpha * next_logp.unsqueeze(-1)  # (task, sample, action, atom)
    discount = args.gamma * (1 - b.terminated[:, :, None, None])
    scale = reward_scale(agent, alpha, args)
    rewards = scale * b.rewards
    atoms = rewards[:, :, None, None] + discount * next_value
    probs = next_p.unsqueeze(-1) * next_dist
    target_dist = project(atoms.flatten(2), probs.flatten(2), agent.atoms)
    cross_entropy = -(target_dist * taken.log_softmax(-1)).sum(-1)
    qf_loss = cross_entropy.sum(0).mean(1)
    actor_loss = -(q + alpha * entropy).mean(1)
    entropy = entropy.detach().mean(1)
    alpha_loss = agent.log_alpha.exp() * (entropy - agent.target_entropy)
    dists = taken.detach().softmax(-1)
    qf_values = (dists @ agent.atoms).mean(2)
    stats = {
        "losses/qf1_values": qf_values[0],
        "losses/qf2_values": qf_values[1],
        "losses/qf_loss": qf_loss,
        "losses/actor_loss": actor_loss,
        "losses/alpha_loss": alpha_loss,
        "losses/entropy": entropy,
    }
    loss = qf_loss + actor_loss + alpha_loss
    return loss, stats


def minibatch_backward(agent, target, b: Batch, args) -> dict:
    """Gradients of the objective at the top, and what to log, (task,) each."""
    W = agent.unpack(agent.weights())
    slow = target.unpack(target.weights())
    losses, stats = brc_loss(agent, W, slow, b, args)
    losses.sum().backward()
    return {name: x.detach() for name, x in stats.items()}


def see_returns(agent, buffer, infos, args):
    """Keep the largest |return| of each task, from any step of an episode that ended in this step.

    The rewards are in the buffer, the last two numbers of a transition are reward and termination. After a
    truncation the episode counts as if it went on with its mean reward.
    """
    if "final_info" not in infos:
        return
    lengths = infos["final_info"]["episode"]["l"]
    for i in np.flatnonzero(infos["_final_info"]):
        task, env = divmod(int(i), args.envs_per_task)
        length = min(int(lengths[i]), buffer.capacity, buffer.steps)
        steps = torch.arange(buffer.steps - length, buffer.steps) % buffer.capacity
        transitions = buffer.data[task, steps, env]
        rewards = transitions[:, -2].tolist()
        terminated = transitions[-1, -1].item()
        mean = sum(rewards) / length
        value = 0.0 if terminated else mean / (1 - args.gamma)
        highest = agent.highest[task].item()
        for reward in reversed(rewards):
            value = reward + args.gamma * value
            highest = max(highest, abs(value))
        agent.highest[task] = highest


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
    see_returns(agent, buffer, infos, args)
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
    stats = backward(agent, target, batch, args)
    optimizer.step()
    with torch.no_grad():
        for average, x in zip(target.parameters(), agent.parameters()):
            average.lerp_(x, args.tau)
    return stats


@torch.no_grad()
def log_method(run, agent, args):
    """Log what is the method's own."""
    run.log("varshare/theta_norm", agent.theta.norm())
    run.log("varshare/reward_scale", reward_scale(agent, agent.log_alpha.exp(), args).squeeze(1))


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    check_args(args)
    if args.buffer_size < max(args.batch_size, args.learning_starts):
        fail("--buffer-size must be at least --batch-size and --learning-starts")
    if args.gamma == 1 or args.num_atoms == 1:
        fail("--gamma must be below 1 and --num-atoms above: returns are finite, and lie between atoms")


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
    agent.log_alpha.requires_grad_(not args.freeze_theta)  # of all tasks, too
    target = copy.deepcopy(agent).requires_grad_(False)  # of it the critics are used, with mean weights
    weights = dict(params=[agent.theta, agent.embedding], weight_decay=args.weight_decay)
    temperature = dict(params=[agent.log_alpha], weight_decay=0.0, betas=(0.5, 0.999))
    optimizer = torch.optim.AdamW([weights, temperature], lr=args.learning_rate, fused=True)
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
            run.log("losses/alpha", agent.log_alpha.detach().exp())
            log_method(run, agent, args)
        if run.eval_due:
            run.evaluate(args.eval_interval_episodes)
        if step == num_iterations:
            buffer.clear()  # a finished run has no use for it
        run.end_iteration()

    return run.finish()


if __name__ == "__main__":
    run_command(train, make_args, __doc__)
