"""VarShare-LoRA: VarShare-PPO with residuals of low rank, whose factors have the posteriors.

Every matrix of actor and critic acts in task m as theta + B_m A_m, of rank r (Hu et al. 2022); biases have
a residual. All that is task m's own, its weights f_m, has q(f_m) = N(mu_m, sigma_m^2) and prior p = N(0, s^2)
with s^2 = sigma_prior / sqrt(r): the variance of an entry of B_m A_m is sigma_prior^2. The KL is a sum over A
and B. With N_m samples of task m in a rollout the script minimises

    sum_m [ L_PPO(theta, mu_m + sigma_m * eps_m) + beta / N_m * KL(q_m || p) ],   eps_m ~ N(0, I),

where L_PPO is a mean over samples of task m: beta = 1 is the negative ELBO, with PPO's surrogate in place of
the log-likelihood. theta and mu follow Adam. sigma follows h, a running mean of squared gradients in place of
the curvature of a sample's loss: sigma = (N_m h / beta + 1 / sigma_prior^2)^(-1/2), as in Vadam (Khan et al.
2018), which is exact for a log-likelihood at its optimum.

B starts with mean 0 and A with a draw from the prior: were both 0, neither had a gradient. A layer is
theta x + B_m (A_m x), no (task, out, in) is formed. No re-centring: the mean of residuals has not their rank.

PPO is Schulman et al. 2017 in the form of CleanRL's ppo.py; docs/ppo.md lists every deviation. All tasks are
computed at once: the weights of task m are row m of one (task, weight) matrix, and an update starts from the
gradient of every task's loss by its row. `parameter_gradients` and `learn_sigma` say what follows from it.
"""

import math
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# so that a script, or a fork of it in any folder of the project, finds the project's envs package
sys.path += [str(folder) for folder in Path(__file__).resolve().parents if (folder / "envs/runs.py").exists()]
from envs import make
from envs.normalisation import RunningNorm
from envs.rewards import scale_rewards
from envs.runs import Episodes, Run, build, check_args, fail, load_agent, parse_args, set_up_torch
from envs.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat


@dataclass
class Args:
    # the run
    env_id: str = "cartpole10"  # a suite (cartpole10, lunarlander20, ...) or any Gymnasium id
    tasks: tuple[int, ...] = ()  # train on these tasks of the suite only, e.g. --tasks 0 2 5
    seed: NonNegativeInt = 1  # seed of every random draw
    total_timesteps: PositiveInt = 1_000_000  # environment steps of the run, all tasks together
    eval_episodes: PositiveInt = 20  # episodes per task of the evaluation of the final policy
    eval_interval: NonNegativeInt = 0  # steps between evaluations on the way, 0: none
    eval_interval_episodes: PositiveInt = 20  # episodes per task of these
    load: str = ""  # start from this saved model (run folder or model.pt); new tasks start anew
    freeze_theta: bool = False  # train only what tasks do not share (needs --load)
    exp_name: str = Path(__file__).stem  # name of the experiment
    run_name: str = ""  # folder below runs/; by default {env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # continue the run of the same settings from its checkpoint; without one, start it
    checkpoint_interval: NonNegativeFloat = 30.0  # seconds between checkpoints
    num_threads: PositiveInt = 1  # CPU threads
    cuda: bool = False  # train on the GPU; meant for networks much larger than the default
    compile: bool = False  # torch.compile the update: needs a C++ compiler, starts some 20 s later
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "varshare"  # project there
    wandb_entity: str = ""  # team there, by default one's own
    capture_video: bool = False  # film every task with the final policy -> videos/ in the run's folder

    # PPO
    learning_rate: PositiveFloat = 3e-3  # step size of Adam
    anneal_lr: bool = True  # decay it linearly to 0
    envs_per_task: PositiveInt = 8  # parallel environments of each task
    num_steps: PositiveInt = 128  # steps of each environment per rollout
    gamma: UnitFloat = 0.99  # discount
    gae_lambda: UnitFloat = 0.95  # lambda of generalised advantage estimation
    num_minibatches: PositiveInt = 4  # minibatches per epoch, each with as many samples of every task
    update_epochs: PositiveInt = 4  # epochs over each rollout
    target_kl: NonNegativeFloat = 0.0  # end them where approx_kl, mean over tasks, exceeds this; 0: never
    norm_adv: bool = True  # normalise the advantages of each task in each rollout
    norm_reward: bool = False  # divide each task's rewards by the running std of its discounted return
    norm_obs: bool = False  # normalise observations by their running mean and std, of all tasks together
    norm_value: bool = False  # normalise the critic's targets by their running mean and std of each task
    norm_critic: bool = False  # layer normalisation in the critic (Ba et al. 2016)
    clip_coef: PositiveFloat = 0.2  # clip range of the ratio
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: NonNegativeFloat = 0.0  # weight of the entropy
    vf_coef: NonNegativeFloat = 0.5  # weight of the value loss
    max_grad_norm: PositiveFloat = 0.5  # largest norm of the gradient
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)  # hidden layers of actor and critic

    # VarShare
    beta: PositiveFloat = 0.001  # weight of beta * KL / N_m; 1 is the ELBO
    rank: PositiveInt = 4  # largest rank of a residual
    sigma_prior: PositiveFloat = 0.0125  # standard deviation of the prior
    sigma_init: PositiveFloat = 0.003  # standard deviation of the residuals before the first minibatch
    sigma_decay: UnitFloat = 0.99  # decay of the running mean of squared gradients, per minibatch
    rollout_weights: Literal["mean", "sample"] = "mean"  # what acts: mean weights, or one draw per rollout

    @property
    def samples_per_task(self) -> int:
        """N_m, the samples of each task in a rollout."""
        return self.num_steps * self.envs_per_task

    @property
    def factor_prior(self) -> float:
        """s, the standard deviation of the prior of A and B."""
        return math.sqrt(self.sigma_prior / math.sqrt(self.rank))


# what differs from the defaults above, per environment; flags on the command line win
LUNARLANDER = dict(total_timesteps=8_000_000, envs_per_task=4, gamma=0.999, norm_reward=True, ent_coef=0.01)
LUNARLANDER |= dict(eval_interval_episodes=5)
CARTPOLE_GOALS = dict(norm_value=True)
LUNARLANDER_GOALS = LUNARLANDER | dict(total_timesteps=2_000_000, norm_value=True)
LUNARLANDER_GOALS |= dict(beta=0.0001, sigma_prior=0.01)
METAWORLD = dict(total_timesteps=20_000_000, learning_rate=1e-3, anneal_lr=False, hidden_sizes=(128, 128))
METAWORLD |= dict(envs_per_task=4, num_steps=500, num_minibatches=8, update_epochs=8, norm_critic=True)
METAWORLD |= dict(gae_lambda=0.97, norm_obs=True, norm_value=True, eval_episodes=50, eval_interval_episodes=5)
ENV_DEFAULTS = {"lunarlander20": LUNARLANDER, "lunarlander20-continuous": LUNARLANDER}
ENV_DEFAULTS |= dict.fromkeys(("cartpole-goals10", "cartpole-goals10-sparse"), CARTPOLE_GOALS)
ENV_DEFAULTS |= {"cartpole-goals-physics10": CARTPOLE_GOALS, "lunarlander20-goals": LUNARLANDER_GOALS}
ENV_DEFAULTS |= dict.fromkeys(("mt10", "mt10-reward-v1", "mt50"), METAWORLD)

# each (step, task, env, ...); obs has a step more, out is the actor's output, final_obs the last observation
# of an episode that ended in this step, else 0
Rollout = namedtuple("Rollout", "obs out actions rewards terminated truncated final_obs")
Batch = namedtuple("Batch", "obs actions logprobs advantages returns values")  # (task, sample, ...)


def linear(x: Tensor, W: dict[str, Tensor], name: str) -> Tensor:
    """A layer of every task: x (task, sample, in) -> (task, sample, out)."""
    A, B, bias = W[f"{name}.A"], W[f"{name}.B"], W[f"{name}.bias"]
    return nn.functional.linear(x, W[f"{name}.weight"]) + torch.baddbmm(bias.unsqueeze(1), x @ A.mT, B.mT)


def mlp(x: Tensor, W: dict[str, Tensor], net: str, norm: bool = False) -> Tensor:
    """A network of every task, "actor" or "critic": x (task, sample, obs) -> (task, sample, out)."""
    *hidden, last = [name.removesuffix(".bias") for name in W if name.startswith(net) and "bias" in name]
    for name in hidden:
        x = linear(x, W, name)
        x = (F.layer_norm(x, x.shape[-1:]) if norm else x).relu_()
    return linear(x, W, last)


class Agent(nn.Module):
    """Actor and critic of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    Layers start orthogonal with CleanRL's gains, biases at 0; a Gaussian policy's log standard deviation is a
    weight like the others. `per_task` names the tensors with a row per task, not inherited by a new task.
    """

    per_task = ("mu", "sigma", "live", "h_sum", "h_count", "return_stats", "value_norm")

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, rng: torch.Generator):
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.act_dim = int(space.n) if self.discrete else space.shape[0]
        init = self.init_weights(envs.single_observation_space.shape[0], args.hidden_sizes, rng)
        self.shapes = {name: x.shape for name, x in init.items()}  # in the order of the columns
        self.theta = nn.Parameter(torch.cat([x.flatten() for x in init.values()]))  # (weight,)
        self.factors = {}  # their shapes, in the order of the columns
        for name, shape in self.shapes.items():
            rank, layer = min(args.rank, *shape), name.removesuffix(".weight")
            low = {f"{layer}.A": (rank, shape[-1]), f"{layer}.B": (shape[0], rank)}
            self.factors |= low if layer != name else {name: shape}
        self.mu = nn.Parameter(torch.zeros(envs.num_tasks, sum(map(math.prod, self.factors.values()))))
        for name, x in self.split(self.mu.detach(), self.factors).items():
            if name.endswith(".A"):
                x.normal_(std=args.factor_prior, generator=rng)
        self.register_buffer("sigma", torch.full_like(self.mu, args.sigma_init))  # (task, weight)
        self.register_buffer("live", torch.zeros_like(self.mu, dtype=torch.bool))  # had a gradient last time
        self.register_buffer("h_sum", torch.zeros_like(self.mu))  # decaying sum of h, and of ones
        self.register_buffer("h_count", torch.zeros(envs.num_tasks, 1))
        # count, sum and sum of squares of the discounted return, for --norm-reward
        self.register_buffer("return_stats", torch.zeros(envs.num_tasks, 3, dtype=torch.float64))
        self.obs_norm = RunningNorm(envs.single_observation_space.shape, args.norm_obs, limit=10)
        self.value_norm = RunningNorm((envs.num_tasks, 1), args.norm_value, decay=0.9)

    def init_weights(self, obs_dim: int, hidden: tuple[int, ...], rng: torch.Generator) -> dict[str, Tensor]:
        """One draw of all weights of a task, by name."""
        weights = {}
        for net, out_dim, gain in (("actor", self.act_dim, 0.01), ("critic", 1, 1.0)):
            gains = [math.sqrt(2)] * len(hidden) + [gain]
            for i, shape in enumerate(zip((*hidden, out_dim), (obs_dim, *hidden))):
                weights[f"{net}.{i}.weight"] = nn.init.orthogonal_(
                    torch.empty(shape), gains[i], generator=rng
                )
                weights[f"{net}.{i}.bias"] = torch.zeros(shape[0])
        return weights if self.discrete else weights | {"logstd": torch.zeros(self.act_dim)}

    def draw_noise(self, rng: torch.Generator) -> Tensor:
        """Fresh noise for `weights`, (task, weight)."""
        return torch.randn(self.mu.shape, generator=rng, device=rng.device)

    def weights(self, noise: Tensor | None = None) -> Tensor:
        """f_m = mu_m + sigma_m * noise, (task, weight); without noise the mean."""
        return self.mu if noise is None else torch.addcmul(self.mu, self.sigma, noise)

    def split(self, x: Tensor, shapes: dict) -> dict[str, Tensor]:
        """Named views of a (task, weight) matrix, or theta (1, weight), e.g. "actor.0.A" (task, rank, in)."""
        columns = x.split([math.prod(shape) for shape in shapes.values()], dim=1)
        return {name: x.unflatten(1, shape) for (name, shape), x in zip(shapes.items(), columns)}

    def unpack(self, weights: Tensor) -> dict[str, Tensor]:
        """The factors by name, theta's matrices (out, in), and biases and logstd of both together."""
        theta, W = self.split(self.theta.unsqueeze(0), self.shapes), self.split(weights, self.factors)
        return W | {name: x + W[name] if name in W else x[0] for name, x in theta.items()}

    def action_noise(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Noise of `act`: Gumbel (the argmax then draws from the softmax) or normal, (*shape, action)."""
        noise = torch.empty(*shape, self.act_dim, device=rng.device)
        return -noise.exponential_(generator=rng).log() if self.discrete else noise.normal_(generator=rng)

    def act(self, W: dict[str, Tensor], out: Tensor, noise: Tensor) -> Tensor:
        """Draw actions, (task, sample) or (task, sample, action), from the actor's output."""
        return (out + noise).argmax(-1) if self.discrete else out + W["logstd"].exp().unsqueeze(1) * noise

    def policy(self, W: dict[str, Tensor], obs: Tensor) -> Tensor:
        """Action probabilities, or the Gaussian's mean, (task, sample, action), for the evaluation."""
        out = mlp(self.obs_norm(obs), W, "actor")
        return out.softmax(-1) if self.discrete else out

    def log_prob_entropy(self, W: dict[str, Tensor], out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of actions and entropy of the policy, (task, sample), from the actor's output."""
        if self.discrete:
            logp = out.log_softmax(-1)
            return logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)
        logstd = W["logstd"].unsqueeze(1).expand_as(out)
        log_density = -0.5 * ((actions - out) / logstd.exp()).square() - logstd - 0.5 * math.log(2 * math.pi)
        return log_density.sum(-1), (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def gaussian_kl(mu: Tensor, sigma: Tensor, sigma_prior: float) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, sigma_prior^2)) in nats: (task, weight) -> sum over weights (task,)."""
    sums = (mu.square().sum(1) + sigma.square().sum(1)) / sigma_prior**2 - 2 * sigma.log().sum(1)
    return 0.5 * (sums + mu.shape[1] * (2 * math.log(sigma_prior) - 1))


def gae(rewards, values, next_values, terminated, done, args: Args) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), all tensors (step, ...).

    next_values is V of the state that followed, the last of its episode where that ended: it counts after a
    truncation, not after a termination. done = terminated or truncated ends the sum.
    """
    deltas = rewards + args.gamma * next_values * (1 - terminated) - values
    decays = args.gamma * args.gae_lambda * (1 - done)
    advantages = deltas.clone()
    for t in reversed(range(len(deltas) - 1)):
        advantages[t] += decays[t] * advantages[t + 1]
    return advantages


def ppo_loss(agent: Agent, W: dict[str, Tensor], mb: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, value loss and entropy bonus: each task's loss, and what to log, (task,) each."""
    newlogprob, entropy = agent.log_prob_entropy(W, mlp(mb.obs, W, "actor"), mb.actions)
    newvalue = mlp(mb.obs, W, "critic", args.norm_critic).squeeze(-1)
    logratio = newlogprob - mb.logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = -torch.min(mb.advantages * ratio, mb.advantages * clipped_ratio).mean(1)
    v_loss = (newvalue - mb.returns).square()
    if args.clip_vloss:
        v_clipped = mb.values + (newvalue - mb.values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb.returns).square())
    v_loss = 0.5 * v_loss.mean(1)
    entropy = entropy.mean(1)
    with torch.no_grad():
        stats = {
            "losses/policy_loss": pg_loss.detach(),
            "losses/value_loss": v_loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/old_approx_kl": -logratio.mean(1),
            "losses/approx_kl": (ratio - 1 - logratio).mean(1),
            "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(1),
        }
    return pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss, stats


def parameter_gradients(agent: Agent, theta: Tensor, G: Tensor, args: Args) -> dict[str, Tensor]:
    """Gradients of the objective at the top by theta, given, and mu, from G = dL_m / df_m (task, weight)."""
    kl_weight = args.beta / args.samples_per_task
    grads = {"mu": G + kl_weight / args.factor_prior**2 * agent.mu}
    return grads if args.freeze_theta else {"theta": theta, **grads}


@torch.no_grad()
def learn_sigma(agent: Agent, G: Tensor, args: Args) -> None:
    """sigma_m = (N_m h / beta + 1 / s^2)^(-1/2), with h from the squares of G (task, weight).

    The mean gradient of a minibatch of B samples varies by h / B: less as they are drawn without replacement
    from N_m, and more as the weights are sampled (exactly so for a diagonal curvature). At most twice B G^2
    counts, as a single minibatch does not vary. Where G stays 0 sigma is the prior's.
    """
    N, B = args.samples_per_task, args.samples_per_task // args.num_minibatches
    scale = B / max(1 - (1 - args.beta) * B / N, 0.5)
    agent.h_sum.mul_(args.sigma_decay).addcmul_(G, G, value=scale)
    agent.h_count.mul_(args.sigma_decay).add_(1)
    h = agent.h_sum / agent.h_count
    agent.sigma.copy_((N / args.beta * h + 1 / args.factor_prior**2).rsqrt())


@torch.no_grad()
def minibatch_gradients(agent: Agent, mb: Batch, noise: Tensor, args: Args) -> tuple[dict, Tensor, dict]:
    """Clipped gradients of the objective by the parameters, from one minibatch; G; and what to log."""
    weights = agent.weights(noise).detach().requires_grad_()
    with torch.enable_grad():
        losses, stats = ppo_loss(agent, agent.unpack(weights), mb, args)
        theta, G = torch.autograd.grad(losses.sum(), (agent.theta, weights))
    grads = parameter_gradients(agent, theta, G, args)
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    clip = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
    return {name: clip * g for name, g in grads.items()}, G, stats


@torch.no_grad()
def rollout(agent, W, envs, next_obs: np.ndarray, episodes: Episodes, args: Args, rng) -> Rollout:
    """Act for --num-steps steps from next_obs (task * env, obs)."""
    device, size = rng.device, (envs.num_tasks, args.envs_per_task)
    noise = agent.action_noise((args.num_steps, *size), rng)
    obs = np.zeros((args.num_steps + 1, *next_obs.shape), np.float32)
    final_obs, out, actions = np.zeros_like(obs[1:]), [], []
    rewards, terminated, truncated = np.zeros((3, *final_obs.shape[:2]), np.float32)
    obs[0] = next_obs
    for t in range(args.num_steps):
        x = agent.obs_norm(torch.from_numpy(obs[t]).to(device).unflatten(0, size))
        out.append(mlp(x, W, "actor"))
        actions.append(agent.act(W, out[t], noise[t]))
        step = envs.step(actions[t].flatten(0, 1).cpu().numpy())
        obs[t + 1], rewards[t], terminated[t], truncated[t], infos = step
        if "final_obs" in infos:
            final_obs[t] = infos["final_obs"]
            episodes.add(infos)
    arrays = (obs, rewards, terminated, truncated, final_obs)
    obs, *others = (torch.from_numpy(x).to(device).unflatten(1, size) for x in arrays)
    return Rollout(obs, torch.stack(out), torch.stack(actions), *others)


def by_task(x: Tensor) -> Tensor:
    """(step, task, env, ...) -> (task, sample, ...)."""
    return x.transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def make_batch(W: dict[str, Tensor], data: Rollout, agent: Agent, discounted: Tensor, args: Args) -> Batch:
    """Values, advantages and returns; discounted (task, env) is for `scale_rewards`."""

    def value(obs: Tensor) -> Tensor:  # (step, task, env, obs) -> (step, task, env)
        values = mlp(by_task(agent.obs_norm(obs)), W, "critic", args.norm_critic).squeeze(-1)
        return agent.value_norm.inverse(values).unflatten(1, (len(obs), -1)).transpose(0, 1)

    values = value(data.obs)
    values, next_values = values[:-1], values[1:].clone()
    truncated_at = data.truncated.any(2).any(1)  # steps at which an episode was truncated
    if truncated_at.any():
        next_values[truncated_at] = torch.where(
            data.truncated[truncated_at] > 0, value(data.final_obs[truncated_at]), next_values[truncated_at]
        )
    rewards, done = data.rewards, torch.maximum(data.terminated, data.truncated)
    if args.norm_reward:
        rewards = scale_rewards(agent.return_stats, rewards, done, discounted, args.gamma)
    advantages = gae(rewards, values, next_values, data.terminated, done, args)
    logprobs, _ = agent.log_prob_entropy(W, by_task(data.out), by_task(data.actions))
    advantages, values = by_task(advantages), by_task(values)
    returns = advantages + values
    agent.value_norm.see(returns.T.unsqueeze(-1))
    values, returns = agent.value_norm(values), agent.value_norm(returns)
    if args.norm_adv:
        advantages = advantages - advantages.mean(1, keepdim=True)
        advantages /= advantages.std(1, keepdim=True) + 1e-8
    obs = agent.obs_norm(by_task(data.obs[:-1]))
    if not args.load:  # else theirs are the statistics that the loaded weights are used to
        agent.obs_norm.see(data.obs[:-1])
    return Batch(obs, by_task(data.actions), logprobs, advantages, returns, values)


def update(agent, optimizer, batch: Batch, gradients: Callable, args: Args, rng) -> dict[str, Tensor]:
    """The epochs over one rollout; returns what to log, (minibatch, task) each."""
    stats, seen = [], torch.zeros_like(agent.mu)
    for _ in range(args.update_epochs):
        order = torch.randperm(args.samples_per_task, generator=rng, device=rng.device)
        for inds in order.chunk(args.num_minibatches):
            mb = Batch(*(x.index_select(1, inds) for x in batch))
            grads, G, mb_stats = gradients(agent, mb, agent.draw_noise(rng), args)
            learn_sigma(agent, G, args)
            seen.addcmul_(G, G)
            for name, grad in grads.items():
                getattr(agent, name).grad = grad
            optimizer.step()
            stats.append(mb_stats)
        if args.target_kl and mb_stats["losses/approx_kl"].mean() > args.target_kl:
            break
    agent.live.copy_(seen > 0)
    return {name: torch.stack([x[name] for x in stats]) for name in stats[0]}


@torch.no_grad()
def log_method(run: Run, agent: Agent, args: Args) -> None:
    """Log what is the method's own."""
    kl = gaussian_kl(agent.mu, agent.sigma, args.factor_prior)
    kl_weight = args.beta / args.samples_per_task
    run.log_tasks("varshare/kl", kl)
    run.log_tasks("varshare/kl_loss", kl_weight * kl)
    run.log("varshare/kl_weight", kl_weight)
    theta, mu = agent.split(agent.theta.unsqueeze(0), agent.shapes), agent.split(agent.mu, agent.factors)
    run.log_sharing(theta, mu)
    run.log_sigma(theta, *(agent.split(x, agent.factors) for x in (agent.sigma, agent.live)))


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    check_args(args)
    if args.samples_per_task < 2 or args.samples_per_task % args.num_minibatches:
        fail("--envs-per-task times --num-steps must be 2 or more and divide into --num-minibatches")


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    envs = build(make, args.env_id, args.envs_per_task, args.tasks or None)
    batch_size = envs.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    if not num_iterations:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {batch_size} steps")
    run = Run(args, __file__, envs)
    if run.finished:
        return run.folder

    device = set_up_torch(args)
    rng = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(envs, args, torch.Generator().manual_seed(args.seed))
    if args.load and not run.checkpoint:
        load_agent(agent, args, envs.task_names)
    optimizer = torch.optim.Adam(agent.to(device).parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    gradients = torch.compile(minibatch_gradients, fullgraph=True) if args.compile else minibatch_gradients
    episodes = Episodes(envs)
    discounted = torch.zeros(envs.num_tasks, args.envs_per_task, device=device)  # returns of running episodes
    run.keep(agent=agent, optimizer=optimizer, rng=rng, episodes=episodes, discounted=discounted)
    next_obs = run.reset(envs, discounted)

    for iteration in run.iterations(num_iterations, batch_size):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations)
        noise = agent.draw_noise(rng) if args.rollout_weights == "sample" else None
        W = agent.unpack(agent.weights(noise).detach())
        data = rollout(agent, W, envs, next_obs, episodes, args, rng)
        next_obs = data.obs[-1].flatten(0, 1).cpu().numpy()
        batch = make_batch(W, data, agent, discounted, args)
        stats = update(agent, optimizer, batch, gradients, args, rng)

        if run.log_due:
            run.log_charts(episodes, optimizer.param_groups[0]["lr"])
            for name, x in stats.items():
                run.log_tasks(name, x.mean(0))
            run.log_tasks("losses/clipfrac_first_minibatch", stats["losses/clipfrac"][0])
            run.log_explained_variance(batch.values, batch.returns)
            log_method(run, agent, args)
        if run.eval_due:
            run.evaluate(args.eval_interval_episodes)

    return run.finish()


if __name__ == "__main__":
    train(parse_args(Args, ENV_DEFAULTS, __doc__))
