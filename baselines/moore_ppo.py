"""MOORE-PPO: orthogonal experts shared by all tasks, which each task mixes by weights of its own.

With shared experts theta and h_m of task m, its mixing weights and output layers, in actor and critic, the
script minimises

    sum_m L_PPO(theta, h_m),

where L_PPO is a mean over samples of task m (Hendawy et al. 2024, arXiv 2311.11385). At every observation the
K experts have outputs u_k (feature,), made orthonormal by Gram and Schmidt: v_k = r_k / |r_k| with
r_k = u_k - sum_{j<k} (u_k . v_j) v_j. Output layers see tanh(sum_k w_mk v_k).

PPO is Schulman et al. 2017 in the form of CleanRL's ppo.py; docs/ppo.md lists every deviation. All tasks are
computed at once: the weights of task m are row m of one (task, weight) matrix.
"""

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
from envs.metrics import Episodes, Means, explained_variance
from envs.models import load_agent
from envs.networks import init_layers, split
from envs.normalisation import RunningNorm, scale_rewards
from envs.policies import Categorical, Gaussian, action_noise
from envs.runs import Run, keep_signals, make_envs, set_up_torch
from envs.settings import RunArgs, args_maker, check_args, fail, run_command
from envs.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat


@dataclass
class Args(RunArgs):
    env_id: str = "cartpole-goals10"  # an environment of several tasks, or any Gymnasium id
    seed: NonNegativeInt = 1  # seed of every random draw
    total_timesteps: PositiveInt = 1_000_000  # environment steps of the run, all tasks together
    load: str = ""  # start from this saved model (run folder or model.pt); new tasks start anew
    freeze_theta: bool = False  # train only what tasks do not share (needs --load)

    # PPO
    learning_rate: PositiveFloat = 3e-3  # step size of Adam
    anneal_lr: bool = True  # decay it linearly to 0
    envs_per_task: PositiveInt = 8  # parallel environments of each task
    num_steps: PositiveInt = 128  # steps of each environment per rollout
    noise_color: NonNegativeFloat = 0.0  # power of the action noise falls as 1 / f^this: 0 white, 1 pink
    gamma: UnitFloat = 0.99  # discount
    gae_lambda: UnitFloat = 0.95  # lambda of generalised advantage estimation
    num_minibatches: PositiveInt = 4  # minibatches per epoch, each with as many samples of every task
    update_epochs: PositiveInt = 4  # epochs over each rollout
    norm_reward: bool = False  # divide each task's rewards by the running std of its discounted return
    norm_obs: bool = False  # normalise observations by their running mean and std, of all tasks together
    norm_value: bool = False  # normalise the critic's targets by their running mean and std of each task
    norm_critic: bool = False  # layer normalisation in the critic (Ba et al. 2016)
    clip_coef: PositiveFloat = 0.2  # clip range of the ratio
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss
    max_grad_norm: PositiveFloat = 0.5  # largest norm of the gradient
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)  # layers of an expert, the last one its output

    # MOORE
    num_experts: PositiveInt = 4  # K, in actor and critic each

    @property
    def samples_per_task(self) -> int:
        """N_m, the samples of each task in a rollout."""
        return self.num_steps * self.envs_per_task


make_args = args_maker(Args, "ppo", {})

Weights = dict[str, Tensor]  # of every task, by name: W["actor.0.weight"] is (task, out, in)
# each (step, task, env, ...); obs has a step more; final_obs is the last observation of an episode, else 0
Rollout = namedtuple("Rollout", "obs out actions rewards terminated truncated final_obs")
Batch = namedtuple("Batch", "obs actions logprobs advantages returns")  # (task, sample, ...)


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


def mlp(x: Tensor, W: Weights, net: str, num_hidden: int, norm: bool = False) -> Tensor:
    """A network of every task, "actor" or "critic": x (task, sample, in) -> (task, sample, out)."""
    x = x.unsqueeze(1)  # for every expert
    for i in range(num_hidden):
        x = linear(x, W, f"{net}.{i}")
        if i < num_hidden - 1:
            if norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = x.relu_()
    w = W[f"{net}.w"].view(len(x), -1, 1, 1)
    mixed = (w * gram_schmidt(x)).sum(1)
    return linear(mixed.tanh(), W, f"{net}.{num_hidden}")


class Agent(nn.Module):
    """Actor and critic of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    A Gaussian policy's log standard deviation is a weight like the others. `per_task` names the tensors with
    a row per task, which a new task does not inherit from a saved model.
    """

    per_task = ("heads", "return_stats", "value_norm")

    def __init__(self, envs, args: Args, rng):
        super().__init__()
        self.discrete = envs.discrete
        self.act_dim = envs.act_dim
        self.num_hidden = len(args.hidden_sizes)
        self.num_experts = args.num_experts
        self.norm_critic = args.norm_critic
        init = [self.init_weights(envs.obs_dim, args.hidden_sizes, rng) for _ in range(envs.num_tasks)]
        first = init[0]
        last = f".{self.num_hidden}."
        own = [name for name in first if last in name or name in ("actor.w", "critic.w", "logstd")]
        shared = [name for name in first if name not in own]  # hidden layers of actor, then of critic
        self.shapes = {name: first[name].shape for name in shared + own}  # in the order of the columns
        theta = [first[name].flatten() for name in shared]
        heads = []
        for weights in init:
            head = [weights[name].flatten() for name in own]
            heads.append(torch.cat(head))
        self.theta = nn.Parameter(torch.cat(theta))  # (weight,)
        self.heads = nn.Parameter(torch.stack(heads))  # (task, weight)
        self.register_buffer("return_stats", torch.zeros(envs.num_tasks, 3).double())  # for --norm-reward
        self.obs_norm = RunningNorm((envs.obs_dim,), args.norm_obs, limit=10)
        self.value_norm = RunningNorm((envs.num_tasks, 1), args.norm_value, decay=0.9)

    def init_weights(self, obs_dim, hidden, rng) -> Weights:
        """One draw of all weights of a task, hidden layers (expert, ...) and w (expert,)."""
        weights = {}
        for net, num_outputs, gain in (("actor", self.act_dim, 0.01), ("critic", 1, 1.0)):
            sizes = (obs_dim, *hidden, num_outputs)
            draws = [init_layers(net, sizes, gain, rng) for _ in range(self.num_experts)]
            for name, x in draws[0].items():
                experts = torch.stack([draw[name] for draw in draws])
                weights[name] = x if f".{self.num_hidden}." in name else experts
            for i, fan_in in enumerate(sizes[:-2]):  # with 0 directions near obs = 0 would turn too fast
                weights[f"{net}.{i}.bias"].uniform_(-1, 1, generator=rng).div_(math.sqrt(fan_in))
            w = torch.randn(self.num_experts, generator=rng)
            weights[f"{net}.w"] = w / math.sqrt(self.num_experts)
        if not self.discrete:
            weights["logstd"] = torch.zeros(self.act_dim)
        return weights

    def weights(self) -> Tensor:
        """W_m, theta and what is task m's own, (task, weight)."""
        theta = self.theta.expand(len(self.heads), -1)
        return torch.cat((theta, self.heads), dim=1)

    def unpack(self, weights: Tensor) -> Weights:
        """Named views of a (task, weight) matrix."""
        return split(weights, self.shapes)

    def actor(self, W: Weights, obs: Tensor) -> Tensor:
        """Logits of the actions, or their Gaussian's mean: (task, sample, obs) -> (task, sample, action)."""
        return mlp(obs, W, "actor", self.num_hidden)

    def critic(self, W: Weights, obs: Tensor) -> Tensor:
        """Values, normalised if --norm-value: (task, sample, obs) -> (task, sample)."""
        out = mlp(obs, W, "critic", self.num_hidden, self.norm_critic)
        return out.squeeze(-1)

    def distribution(self, W: Weights, out: Tensor):
        """The policy at the actor's output."""
        if self.discrete:
            return Categorical(out)
        return Gaussian(out, W["logstd"].unsqueeze(1))

    def policy(self, W: Weights, obs: Tensor) -> Tensor:
        """Action probabilities, or the Gaussian's mean, (task, sample, action), for the evaluation."""
        out = self.actor(W, self.obs_norm(obs))
        return self.distribution(W, out).mean


def by_task(x: Tensor) -> Tensor:
    """(step, task, env, ...) -> (task, sample, ...)."""
    return x.transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def rollout(agent, W: Weights, envs, next_obs, episodes, args, rng) -> Rollout:
    """Act for --num-steps steps from next_obs (task * env, obs)."""
    size = (envs.num_tasks, args.envs_per_task)
    shape = (args.num_steps, *size, agent.act_dim)
    noise = action_noise(agent.discrete, shape, rng, args.noise_color)

    def to_torch(x, dim):  # (..., task * env, ...) -> (..., task, env, ...)
        return torch.from_numpy(x).to(rng.device).unflatten(dim, size)

    obs, out, actions, outcomes = [], [], [], []
    for t in range(args.num_steps):
        obs.append(to_torch(next_obs, 0))
        out.append(agent.actor(W, agent.obs_norm(obs[t])))
        policy = agent.distribution(W, out[t])
        actions.append(policy.sample(noise[t]))
        flat = actions[t].flatten(0, 1).cpu().numpy()
        next_obs, rewards, terminated, truncated, infos = envs.step(flat)
        final_obs = infos.get("final_obs", np.zeros_like(next_obs))
        outcomes.append((rewards, terminated, truncated, final_obs))
        episodes.add(infos)
    obs.append(to_torch(next_obs, 0))
    outcomes = [to_torch(np.stack(x, dtype=np.float32), 1) for x in zip(*outcomes)]
    tensors = [torch.stack(x) for x in (obs, out, actions)]
    return Rollout(*tensors, *outcomes)


@torch.no_grad()
def predict_values(agent, W: Weights, data: Rollout) -> tuple[Tensor, Tensor]:
    """V of every state, and of the state that followed it, (step, task, env) each.

    What followed the end of an episode is its last observation, not the first of the next episode.
    """

    def predict(obs):  # (step, task, env, obs) -> (step, task, env)
        x = by_task(agent.obs_norm(obs))
        values = agent.value_norm.inverse(agent.critic(W, x))
        values = values.unflatten(1, (len(obs), -1))
        return values.transpose(0, 1)

    values = predict(data.obs)
    next_values = values[1:].clone()
    steps = data.truncated.any(2).any(1)  # at which an episode was truncated
    if steps.any():
        truncated = data.truncated[steps] > 0
        final_values = predict(data.final_obs[steps])
        next_values[steps] = torch.where(truncated, final_values, next_values[steps])
    return values[:-1], next_values


def gae(rewards, values, next_values, terminated, done, args) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), all tensors (step, ...).

    next_values is V of the state that followed, the last of its episode if that ended: it counts after a
    truncation, not after a termination. done = terminated or truncated ends the sum.
    """
    deltas = rewards + args.gamma * next_values * (1 - terminated) - values
    decays = args.gamma * args.gae_lambda * (1 - done)
    advantages = deltas.clone()
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] += decays[t] * advantages[t + 1]
    return advantages


@torch.no_grad()
def make_batch(agent, W: Weights, data: Rollout, values, advantages, args) -> Batch:
    """What `ppo_loss` is a function of, normalised by task; running statistics take in the rollout."""
    actions, advantages = by_task(data.actions), by_task(advantages)
    policy = agent.distribution(W, by_task(data.out))
    logprobs, _ = policy.log_prob_entropy(actions)
    returns = advantages + by_task(values)
    agent.value_norm.see(returns)
    returns = agent.value_norm(returns)
    advantages = advantages - advantages.mean(1, keepdim=True)
    advantages /= advantages.std(1, keepdim=True) + 1e-8
    obs = by_task(data.obs[:-1])
    normalised = agent.obs_norm(obs)
    if not args.load:  # else the loaded weights are used to the loaded statistics
        agent.obs_norm.see(obs)
    return Batch(normalised, actions, logprobs, advantages, returns)


def ppo_loss(agent, W: Weights, mb: Batch, args) -> tuple[Tensor, dict]:
    """Clipped surrogate, value loss and entropy bonus: each task's loss, and what to log, (task,) each."""
    out = agent.actor(W, mb.obs)
    policy = agent.distribution(W, out)
    newlogprob, entropy = policy.log_prob_entropy(mb.actions)
    logratio = newlogprob - mb.logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    gain = torch.min(mb.advantages * ratio, mb.advantages * clipped_ratio)
    pg_loss = -gain.mean(1)
    newvalue = agent.critic(W, mb.obs)
    v_loss = 0.5 * (newvalue - mb.returns).square().mean(1)
    entropy = entropy.mean(1)
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    clipped = (ratio - 1).abs() > args.clip_coef
    stats = {
        "losses/policy_loss": pg_loss,
        "losses/value_loss": v_loss,
        "losses/entropy": entropy,
        "losses/old_approx_kl": -logratio.mean(1),
        "losses/approx_kl": (ratio - 1 - logratio).mean(1),
        "losses/clipfrac": clipped.float().mean(1),
    }
    return loss, stats


def minibatch_backward(agent, mb: Batch, args) -> dict:
    """Gradients of the objective at the top, clipped, and what to log, (task,) each."""
    W = agent.unpack(agent.weights())
    losses, stats = ppo_loss(agent, W, mb, args)
    losses.sum().backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    return {name: x.detach() for name, x in stats.items()}


def update(agent, optimizer, batch: Batch, backward, args, rng) -> dict:
    """The epochs over one rollout; returns what to log, means over minibatches, (task,) each."""
    means = Means()
    for _ in range(args.update_epochs):
        order = torch.randperm(args.samples_per_task, generator=rng, device=rng.device)
        for inds in order.chunk(args.num_minibatches):
            mb = Batch(*(x.index_select(1, inds) for x in batch))
            optimizer.zero_grad()
            means.add(backward(agent, mb, args))
            optimizer.step()
    first = means.first["losses/clipfrac"]
    return means.pop() | {"losses/clipfrac_first_minibatch": first}


@torch.no_grad()
def log_method(run, agent, args):
    """Log what is the method's own."""
    run.log("varshare/theta_norm", agent.theta.norm())
    run.log("varshare/head_norm", agent.heads.norm(dim=1))


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    check_args(args)
    if not args.hidden_sizes:
        fail("--hidden-sizes must have a layer: without one, tasks share nothing")
    if args.samples_per_task < 2 or args.samples_per_task % args.num_minibatches:
        fail("--envs-per-task times --num-steps must be 2 or more and divide into --num-minibatches")
    if args.num_experts > args.hidden_sizes[-1]:
        fail("--num-experts must be at most the last of --hidden-sizes: so many directions are orthogonal")


@keep_signals
def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    envs = make_envs(args, args.envs_per_task)
    batch_size = envs.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    run = Run(args, __file__, envs)
    if run.finished:
        return run.folder

    device = set_up_torch(args)
    rng = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(envs, args, torch.Generator().manual_seed(args.seed))
    if args.load and not run.resumes:
        load_agent(agent, args, envs.task_names)
    agent.to(device).theta.requires_grad_(not args.freeze_theta)
    params = agent.parameters()
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, eps=1e-5, fused=True)
    backward = minibatch_backward
    if args.compile:
        backward = torch.compile(backward, fullgraph=True)
    episodes = Episodes(envs, device)
    state = dict(agent=agent, optimizer=optimizer, rng=rng, episodes=episodes)
    next_obs = run.start_or_resume(envs, num_iterations, batch_size, **state)

    for iteration in range(run.first_iteration, num_iterations + 1):
        if args.anneal_lr:
            left = 1 - (iteration - 1) / num_iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * left
        W = agent.unpack(agent.weights().detach())
        data = rollout(agent, W, envs, next_obs, episodes, args, rng)
        next_obs = data.obs[-1].flatten(0, 1).cpu().numpy()

        rewards = data.rewards
        done = torch.maximum(data.terminated, data.truncated)
        if args.norm_reward:
            rewards = scale_rewards(agent.return_stats, rewards, done, episodes, args.gamma)
        values, next_values = predict_values(agent, W, data)
        advantages = gae(rewards, values, next_values, data.terminated, done, args)
        batch = make_batch(agent, W, data, values, advantages, args)
        stats = update(agent, optimizer, batch, backward, args, rng)

        if run.log_due:
            run.log_charts(episodes, optimizer.param_groups[0]["lr"])
            run.log_all(stats)
            explained = explained_variance(by_task(values), by_task(advantages))
            run.log_all({"losses/explained_variance": explained})
            log_method(run, agent, args)
        if run.eval_due:
            run.evaluate(args.eval_interval_episodes)
        run.end_iteration()

    return run.finish()


if __name__ == "__main__":
    run_command(train, make_args, __doc__)
