"""VarShare-SAC: shared weights and a variational residual per task, trained with soft actor-critic.

Every weight of the actor and of both critics acts in task m as W_m = theta + phi_m with
q(phi_m) = N(mu_m, sigma_m^2) and prior p = N(0, sigma_prior^2). The script minimises

    sum_m [ L_SAC(theta + mu_m + sigma_m * eps_m) + beta / N_m * KL(q_m || p) ],   eps_m ~ N(0, I),

where L_SAC, the critics' Bellman errors and the actor's and the temperature's loss, is a mean over samples of
task m from its replay buffer, and N_m is the number of transitions of task m in that buffer: beta = 1 is the
negative ELBO, with SAC's losses in place of the log-likelihood. theta and mu follow Adam. sigma follows h, a
running mean of squared gradients in place of the curvature of a sample's loss:
sigma = (N_m h / beta + 1 / sigma_prior^2)^(-1/2), as in Vadam (Khan et al. 2018), which is exact for a
log-likelihood at its optimum. The target critics average
the mean weights theta + mu_m. After every update --reptile-alpha moves a share of the mean of the mu_m into
theta, which changes no W_m and no target.

SAC is Haarnoja et al. 2018 (arXiv 1812.05905) in the form of CleanRL's sac_continuous_action.py, with a
temperature learned per task, and for discrete actions Christodoulou 2019, with expectations over actions in
place of samples; docs/sac.md lists every deviation. All tasks are computed at once: the weights of task m
are row m of one (task, weight) matrix, and an update starts from the gradient of every task's loss by its
row. `parameter_gradients` and `learn_sigma` say what follows from it.
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
from envs.replay import ReplayBuffer
from envs.runs import Episodes, Means, Run, build, check_args, fail, load_agent, parse_args, set_up_torch
from envs.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitFloat


@dataclass
class Args:
    # the run
    env_id: str = "cartpole10"  # a suite (cartpole10, lunarlander20, ...) or any Gymnasium id
    tasks: tuple[int, ...] = ()  # train on these tasks of the suite only, e.g. --tasks 0 2 5
    seed: NonNegativeInt = 1  # seed of every random draw
    total_timesteps: PositiveInt = 300_000  # environment steps of the run, all tasks together
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

    # SAC
    learning_rate: PositiveFloat = 1e-3  # step size of Adam, of actor, critics and temperatures
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
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)  # hidden layers of actor and critics

    # VarShare
    beta: PositiveFloat = 0.1  # weight of beta * KL / N_m; 1 is the ELBO
    sigma_prior: PositiveFloat = 0.01  # standard deviation of the prior
    sigma_init: PositiveFloat = 0.003  # standard deviation of the residuals before the first minibatch
    sigma_decay: UnitFloat = 0.99  # decay of the running mean of squared gradients, per minibatch
    reptile_alpha: UnitFloat = 0.0  # share of mean_m(mu_m) that moves into theta after each update
    rollout_weights: Literal["mean", "sample"] = "mean"  # what acts: mean weights, or one draw per step


# what differs from the defaults above, per environment; flags on the command line win
LUNARLANDER = dict(total_timesteps=800_000, envs_per_task=4, updates_per_step=4.0, batch_size=64)
LUNARLANDER |= dict(learning_rate=2e-3, gamma=0.995, target_entropy=1.0)
LUNARLANDER |= dict(eval_interval_episodes=5)
LUNARLANDER |= dict(beta=0.01)
DISCRETE = dict(gamma=0.99, target_entropy=0.08, critics="mean")
METAWORLD = dict(total_timesteps=20_000_000, learning_rate=3e-4, buffer_size=100_000, learning_starts=4_000)
METAWORLD |= dict(tau=0.005, reward_scale=1.0, target_entropy=1.0, alpha_init=1.0)
METAWORLD |= dict(hidden_sizes=(400, 400, 400), eval_episodes=50, eval_interval_episodes=5)
ENV_DEFAULTS = {"lunarlander20": LUNARLANDER | DISCRETE, "lunarlander20-continuous": LUNARLANDER}
ENV_DEFAULTS |= {"lunarlander20-goals": LUNARLANDER | DISCRETE}
ENV_DEFAULTS |= dict.fromkeys(("mt10", "mt10-reward-v1", "mt50"), METAWORLD)

# each (task, sample, ...); the noises are of continuous actions at next_obs and obs
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated next_noise noise")


def linear(x: Tensor, W: dict[str, Tensor], name: str) -> Tensor:
    """A layer of every task: x (task, sample, in) -> (task, sample, out)."""
    weight, bias = W[f"{name}.weight"], W[f"{name}.bias"]
    if torch.compiler.is_compiling() and weight.shape[1] < weight.shape[2]:  # the same, a tenth faster
        return torch.baddbmm(bias.unsqueeze(2), weight, x.mT).mT
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def mlp(x: Tensor, W: dict[str, Tensor], net: str) -> Tensor:
    """A network of every task, e.g. "actor": x (task, sample, in) -> (task, sample, out)."""
    *hidden, last = [name.removesuffix(".bias") for name in W if name.startswith(net) and "bias" in name]
    for name in hidden:
        x = linear(x, W, name).relu_()
    return linear(x, W, last)


class Agent(nn.Module):
    """Actor and two critics of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    Layers start orthogonal with CleanRL's gains for PPO, biases at 0. `per_task` names the tensors with a row
    per task, not inherited by a new task.
    """

    per_task = ("mu", "sigma", "live", "h_sum", "h_count", "log_alpha", "target", "value_norm")

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, rng: torch.Generator):
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.act_dim = int(space.n) if self.discrete else space.shape[0]
        init = self.init_weights(envs.single_observation_space.shape[0], args.hidden_sizes, rng)
        self.shapes = {name: x.shape for name, x in init.items()}  # in the order of the columns
        self.theta = nn.Parameter(torch.cat([x.flatten() for x in init.values()]))  # (weight,)
        self.mu = nn.Parameter(torch.zeros(envs.num_tasks, len(self.theta)))  # (task, weight)
        self.register_buffer("sigma", torch.full_like(self.mu, args.sigma_init))  # (task, weight)
        self.register_buffer("live", torch.zeros_like(self.mu, dtype=torch.bool))  # had a gradient last time
        self.register_buffer("h_sum", torch.zeros_like(self.mu))  # decaying sum of h, and of ones
        self.register_buffer("h_count", torch.zeros(envs.num_tasks, 1))
        self.log_alpha = nn.Parameter(torch.full((envs.num_tasks,), math.log(args.alpha_init)))
        # averages the mean weights, of which the actor's are not used
        self.register_buffer("target", self.weights().detach().clone())
        self.obs_norm = RunningNorm(envs.single_observation_space.shape, args.norm_obs, limit=10)
        self.value_norm = RunningNorm((envs.num_tasks, 1, 1), args.norm_value, decay=0.999)
        if self.discrete:
            self.target_entropy = args.target_entropy * math.log(self.act_dim)
        else:  # actions are bias + scale * tanh(u)
            self.target_entropy = -args.target_entropy * self.act_dim
            low, high = (torch.from_numpy(x).float() for x in (space.low, space.high))
            self.register_buffer("action_scale", (high - low) / 2, persistent=False)
            self.register_buffer("action_bias", (high + low) / 2, persistent=False)

    def init_weights(self, obs_dim: int, hidden: tuple[int, ...], rng: torch.Generator) -> dict[str, Tensor]:
        """One draw of all weights of a task, by name."""
        actor, critic = (obs_dim, self.act_dim), (obs_dim, self.act_dim)  # a logit and a Q of every action
        if not self.discrete:  # a Gaussian's mean and log standard deviation; Q of an action
            actor, critic = (obs_dim, 2 * self.act_dim), (obs_dim + self.act_dim, 1)
        nets = {"actor": actor, "critic1": critic, "critic2": critic}
        weights = {}
        for net, (in_dim, out_dim) in nets.items():
            gains = [math.sqrt(2)] * len(hidden) + [0.01 if net == "actor" else 1.0]
            for i, shape in enumerate(zip((*hidden, out_dim), (in_dim, *hidden))):
                weights[f"{net}.{i}.weight"] = nn.init.orthogonal_(
                    torch.empty(shape), gains[i], generator=rng
                )
                weights[f"{net}.{i}.bias"] = torch.zeros(shape[0])
        return weights

    def draw_noise(self, rng: torch.Generator) -> Tensor:
        """Fresh noise for `weights`, (task, weight)."""
        return torch.randn(self.mu.shape, generator=rng, device=rng.device)

    def weights(self, noise: Tensor | None = None) -> Tensor:
        """W_m = theta + mu_m + sigma_m * noise, (task, weight); without noise the mean weights."""
        mean = self.theta + self.mu
        return mean if noise is None else torch.addcmul(mean, self.sigma, noise)

    def unpack(self, weights: Tensor) -> dict[str, Tensor]:
        """Named views of a (task, weight) matrix, e.g. W["actor.0.weight"] (task, out, in)."""
        columns = weights.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: x.unflatten(1, shape) for (name, shape), x in zip(self.shapes.items(), columns)}

    def action_noise(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Noise of `act`, `random_actions` and `squash`: Gumbel or normal, (*shape, action)."""
        noise = torch.empty(*shape, self.act_dim, device=rng.device)
        return -noise.exponential_(generator=rng).log() if self.discrete else noise.normal_(generator=rng)

    def act(self, W: dict[str, Tensor], obs: Tensor, noise: Tensor) -> Tensor:
        """Draw actions (task, env) or (task, env, action) at obs (task, env, obs)."""
        out = mlp(self.obs_norm(obs), W, "actor")
        return (out + noise).argmax(-1) if self.discrete else self.squash(out, noise)[0]

    def random_actions(self, noise: Tensor) -> Tensor:
        """Uniform actions made of `action_noise`, shaped as those of `act`."""
        if self.discrete:
            return noise.argmax(-1)
        return self.action_bias + self.action_scale * torch.special.erf(noise / math.sqrt(2))

    def squash(self, out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squashed Gaussian of the actor's output: actions (task, sample, action), log-probabilities."""
        mean, logstd = out.chunk(2, -1)
        logstd = -5 + 3.5 * (logstd.tanh() + 1)  # from -5 to 2, as CleanRL's
        u = mean + logstd.exp() * noise
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.action_scale.log()  # of scale * tanh(u)
        logp = -0.5 * noise.square() - logstd - 0.5 * math.log(2 * math.pi) - log_slope
        return self.action_bias + self.action_scale * u.tanh(), logp.sum(-1)

    def policy(self, W: dict[str, Tensor], obs: Tensor) -> Tensor:
        """Action probabilities, or the mean's action, (task, sample, action): an ensemble averages these."""
        out = mlp(self.obs_norm(obs), W, "actor")
        if self.discrete:
            return out.softmax(-1)
        return self.action_bias + self.action_scale * out.chunk(2, -1)[0].tanh()


def gaussian_kl(mu: Tensor, sigma: Tensor, sigma_prior: float) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, sigma_prior^2)) in nats: (task, weight) -> sum over weights (task,)."""
    sums = (mu.square().sum(1) + sigma.square().sum(1)) / sigma_prior**2 - 2 * sigma.log().sum(1)
    return 0.5 * (sums + mu.shape[1] * (2 * math.log(sigma_prior) - 1))


def q_values(agent: Agent, W: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """Q of both critics, (critic, task, sample, action): of obs for every action, or of obs and an action."""
    x = torch.cat(inputs, -1)
    return agent.value_norm.inverse(torch.stack([mlp(x, W, net) for net in ("critic1", "critic2")]))


def of_both(q: Tensor, args: Args) -> Tensor:
    """What targets and actor take of two critics, (critic, ...) -> (...)."""
    return q.amin(0) if args.critics == "min" else q.mean(0)


def discrete_losses(agent: Agent, W: dict, target: dict, b: Batch, args: Args) -> tuple[Tensor, ...]:
    """Q of the actions taken (critic, task, sample); V of next_obs, actor's loss, entropy (task, sample)."""
    alpha = agent.log_alpha.exp().view(-1, 1, 1)
    q = q_values(agent, W, b.obs)
    q_taken = q.gather(3, b.actions.view(1, *b.actions.shape, 1).expand(2, -1, -1, -1)).squeeze(3)
    with torch.no_grad():
        logp = mlp(b.next_obs, W, "actor").log_softmax(-1)
        next_q = of_both(q_values(agent, target, b.next_obs), args)
        next_value = (logp.exp() * (next_q - alpha * logp)).sum(-1)
    logp = mlp(b.obs, W, "actor").log_softmax(-1)
    actor_loss = (logp.exp() * (alpha * logp - of_both(q.detach(), args))).sum(-1)
    return q_taken, next_value, actor_loss, -(logp.exp() * logp).sum(-1)


def continuous_losses(agent: Agent, W: dict, target: dict, b: Batch, args: Args) -> tuple[Tensor, ...]:
    """The same, from one action drawn at next_obs and one at obs."""
    alpha = agent.log_alpha.exp().view(-1, 1)
    q_taken = q_values(agent, W, b.obs, b.actions).squeeze(3)
    with torch.no_grad():
        next_actions, logp = agent.squash(mlp(b.next_obs, W, "actor"), b.next_noise)
        next_q = of_both(q_values(agent, target, b.next_obs, next_actions), args)
        next_value = next_q.squeeze(2) - alpha * logp
    actions, logp = agent.squash(mlp(b.obs, W, "actor"), b.noise)
    fixed = {name: x.detach() for name, x in W.items()}  # so that the critics do not follow the actor's loss
    actor_loss = alpha * logp - of_both(q_values(agent, fixed, b.obs, actions), args).squeeze(2)
    return q_taken, next_value, actor_loss, -logp


def sac_loss(agent: Agent, W: dict, target: dict, b: Batch, args: Args) -> tuple[Tensor, dict, Tensor]:
    """Bellman errors of both critics and actor's loss: each task's loss, what to log (task,), and targets."""
    losses = discrete_losses if agent.discrete else continuous_losses
    q_taken, next_value, actor_loss, entropy = losses(agent, W, target, b, args)
    target_q = args.reward_scale * b.rewards + args.gamma * (1 - b.terminated) * next_value
    td_error = (q_taken - target_q) / agent.value_norm.std.squeeze(2)
    qf_loss = 0.5 * td_error.square().sum(0).mean(1)
    actor_loss = actor_loss.mean(1)
    stats = {
        "losses/qf1_values": q_taken[0].detach().mean(1),
        "losses/qf2_values": q_taken[1].detach().mean(1),
        "losses/qf_loss": qf_loss.detach(),
        "losses/actor_loss": actor_loss.detach(),
        "losses/entropy": entropy.detach().mean(1),
    }
    return qf_loss + actor_loss, stats, target_q


def parameter_gradients(agent: Agent, G: Tensor, num_stored: Tensor, args: Args) -> dict[str, Tensor]:
    """Gradients of the objective at the top by theta and mu, from G = dL_m / dW_m (task, weight)."""
    kl_weight = args.beta / num_stored
    grads = {"mu": G + kl_weight / args.sigma_prior**2 * agent.mu}
    return grads if args.freeze_theta else {"theta": G.sum(0), **grads}


@torch.no_grad()
def learn_sigma(agent: Agent, G: Tensor, num_stored: Tensor, args: Args) -> None:
    """sigma_m = (N_m h / beta + 1 / sigma_prior^2)^(-1/2), with h from the squares of G (task, weight).

    The mean gradient of a minibatch of B samples, drawn with replacement from N_m, varies by h / B, and more
    as the weights are sampled (exactly so for a diagonal curvature). Where G stays 0 sigma is the prior's.
    """
    N, B = num_stored, args.batch_size
    scale = B / (1 + args.beta * B / N)
    agent.live.copy_(G != 0)
    agent.h_sum.mul_(args.sigma_decay).add_(scale * G.square())
    agent.h_count.mul_(args.sigma_decay).add_(1)
    h = agent.h_sum / agent.h_count
    agent.sigma.copy_((N / args.beta * h + 1 / args.sigma_prior**2).rsqrt())


@torch.no_grad()
def minibatch_gradients(agent: Agent, b: Batch, noise: Tensor, num_stored: Tensor, args: Args) -> tuple:
    """Gradients of the objective by the parameters, from one minibatch; G; what to log; and Q's targets."""
    weights = agent.weights(noise).detach().requires_grad_()
    with torch.enable_grad():
        losses, stats, target_q = sac_loss(agent, agent.unpack(weights), agent.unpack(agent.target), b, args)
        (G,) = torch.autograd.grad(losses.sum(), weights)
    grads = parameter_gradients(agent, G, num_stored, args)
    # alpha (entropy - target entropy), which is its own derivative by log alpha
    alpha_loss = agent.log_alpha.exp() * (stats["losses/entropy"] - agent.target_entropy)
    return grads | {"log_alpha": alpha_loss}, G, stats | {"losses/alpha_loss": alpha_loss}, target_q


@torch.no_grad()
def recentre(agent: Agent, alpha: float) -> None:
    """theta += delta and every mu_m -= delta with delta = alpha * mean_m(mu_m): no W_m changes."""
    delta = alpha * agent.mu.mean(0)
    agent.theta += delta
    agent.mu -= delta


@torch.no_grad()
def step_all(agent, buffer: ReplayBuffer, envs, obs, episodes, at_random: bool, args, rng) -> np.ndarray:
    """A step of all environments, from obs (n, obs), into the buffer; returns the next obs."""
    size, device = (envs.num_tasks, args.envs_per_task), rng.device
    noise = agent.draw_noise(rng) if args.rollout_weights == "sample" else None
    action_noise = agent.action_noise(size, rng)
    x = torch.from_numpy(obs).to(device).unflatten(0, size)
    if not args.load:  # else theirs are the statistics that the loaded weights are used to
        agent.obs_norm.see(x)
    if at_random:
        actions = agent.random_actions(action_noise)
    else:
        actions = agent.act(agent.unpack(agent.weights(noise)), x, action_noise)
    next_obs, rewards, terminated, _, infos = envs.step(actions.flatten(0, 1).cpu().numpy())
    episodes.add(infos)
    seen = (infos.get("final_obs", next_obs), rewards, terminated)
    final_obs, rewards, terminated = (torch.from_numpy(y).to(device).unflatten(0, size) for y in seen)
    buffer.add(x, final_obs, actions, rewards, terminated)
    return next_obs


@torch.no_grad()
def update(agent, optimizer, buffer: ReplayBuffer, gradients: Callable, args: Args, rng) -> dict[str, Tensor]:
    """One step of Adam, and of the targets; returns what to log, (task,) each."""
    noises = {"next_noise": None, "noise": None}  # of continuous actions
    if not agent.discrete:
        noises = {x: agent.action_noise((len(agent.mu), args.batch_size), rng) for x in noises}
    batch = Batch(**buffer.sample(args.batch_size, rng), **noises)
    batch = batch._replace(obs=agent.obs_norm(batch.obs), next_obs=agent.obs_norm(batch.next_obs))
    num_stored = torch.tensor(float(buffer.num_stored()), device=rng.device)  # a number would be compiled in
    grads, G, stats, target_q = gradients(agent, batch, agent.draw_noise(rng), num_stored, args)
    learn_sigma(agent, G, num_stored, args)
    for name, grad in grads.items():
        getattr(agent, name).grad = grad
    optimizer.step()
    if args.reptile_alpha:
        recentre(agent, args.reptile_alpha)
    agent.target.lerp_(agent.weights(), args.tau)
    agent.value_norm.see(target_q.T.unflatten(1, (-1, 1, 1)))
    return stats


@torch.no_grad()
def log_method(run: Run, agent: Agent, num_stored: int, args: Args) -> None:
    """Log what is the method's own."""
    kl = gaussian_kl(agent.mu, agent.sigma, args.sigma_prior)
    kl_weight = args.beta / num_stored
    run.log_tasks("varshare/kl", kl)
    run.log_tasks("varshare/kl_loss", kl_weight * kl)
    run.log("varshare/kl_weight", kl_weight)
    run.log("varshare/lambda", kl_weight / (2 * args.sigma_prior**2))  # times |mu_m|^2, as L2Soft's
    theta = agent.unpack(agent.theta.unsqueeze(0))
    run.log_sharing(theta, agent.unpack(agent.mu))
    run.log_sigma(theta, agent.unpack(agent.sigma), agent.unpack(agent.live))


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    check_args(args)
    if args.buffer_size < max(args.batch_size, args.learning_starts):
        fail("--buffer-size must be at least --batch-size and --learning-starts")
    if not args.hidden_sizes:
        fail("--hidden-sizes: at least one")


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    envs = build(make, args.env_id, args.envs_per_task, args.tasks or None)
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
    if args.load and not run.checkpoint:
        load_agent(agent, args, envs.task_names)
        agent.target.copy_(agent.weights().detach())
    optimizer = torch.optim.Adam(agent.to(device).parameters(), lr=args.learning_rate, fused=True)
    gradients = torch.compile(minibatch_gradients, fullgraph=True) if args.compile else minibatch_gradients
    buffer = ReplayBuffer(envs, min(math.ceil(args.buffer_size / args.envs_per_task), num_iterations), device)
    episodes, means = Episodes(envs), Means()
    run.keep(agent=agent, optimizer=optimizer, rng=rng, buffer=buffer, episodes=episodes, means=means)
    obs = run.reset(envs)

    def updates_until(step: int) -> int:
        return int(max(0, step - starts + 1) * args.updates_per_step)

    for step in run.iterations(num_iterations, envs.num_envs):
        obs = step_all(agent, buffer, envs, obs, episodes, step <= random_steps, args, rng)
        before, after = updates_until(step - 1), updates_until(step)
        for _ in range(after - before):
            means.add(update(agent, optimizer, buffer, gradients, args, rng))
        if before == 0 < after:
            run.start_clock()  # after the first update, which compiles

        if run.log_due:
            run.log_charts(episodes, args.learning_rate)
            for name, x in means.pop().items():
                run.log_tasks(name, x)
            run.log_tasks("losses/alpha", agent.log_alpha.detach().exp())
            log_method(run, agent, buffer.num_stored(), args)
        if run.eval_due:
            run.evaluate(args.eval_interval_episodes)
        if step == num_iterations:
            buffer.clear()  # a finished run has no use for it

    return run.finish()


if __name__ == "__main__":
    train(parse_args(Args, ENV_DEFAULTS, __doc__))
