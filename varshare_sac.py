"""VarShare-SAC: shared weights and a variational residual per task, trained with soft actor-critic.

Every weight of the actor and of both critics acts in task m as W_m = theta + phi_m with
q(phi_m) = N(mu_m, sigma_m^2) and prior p = N(0, sigma_prior^2). The script minimises

    sum_m [ L_SAC(theta + mu_m + sigma_m * eps_m) + beta / N_m * KL(q_m || p) ],   eps_m ~ N(0, I),

where L_SAC, the critics' Bellman errors and the actor's and the temperature's loss, is a mean over samples of
task m from its replay buffer, and N_m is the number of transitions of task m in that buffer: beta = 1 is the
negative ELBO, with SAC's losses in place of the log-likelihood. The target critics average the mean weights
theta + mu_m. After every update --reptile-alpha moves a share of the mean of the mu_m into theta, which
changes no W_m and no target.

SAC is Haarnoja et al. 2018 (arXiv 1812.05905) in the form of CleanRL's sac_continuous_action.py, with a
temperature learned per task, and for discrete actions Christodoulou 2019, with expectations over actions in
place of samples; the README numbers every deviation. All tasks are computed at once: the weights of all tasks
are the rows of one (task, weight) matrix.
"""

import math
import sys
import time
from collections import namedtuple
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
from envs.evaluation import evaluate, spread_seeds
from envs.runs import Run, build, check_memory, check_numbers, fail, load_agent, parse_args


@dataclass
class Experiment:
    """What to run, and where: runs/{run_name}."""

    env_id: str = "cartpole10"  # a suite (cartpole10, lunarlander20, ...) or any Gymnasium id
    tasks: tuple[int, ...] = ()  # train on these tasks of the suite only, e.g. --tasks 0 2 5
    seed: int = 1  # seed of every random draw
    total_timesteps: int = 300_000  # environment steps of the run, all tasks together
    eval_episodes: int = 20  # episodes per task of the final evaluation
    load: str = ""  # start from this saved model (run folder or model.pt); new tasks start anew
    freeze_theta: bool = False  # train only what tasks do not share (needs --load)
    exp_name: str = Path(__file__).stem  # name of the experiment
    run_name: str = ""  # folder below runs/; by default {env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # continue the run of the same settings from its checkpoint; without one, start it
    checkpoint_interval: float = 30.0  # seconds between checkpoints
    num_threads: int = 1  # CPU threads
    cuda: bool = False  # train on the GPU; meant for networks much larger than the default
    compile: bool = False  # torch.compile the loss: needs a C++ compiler, starts some 20 s later
    track: bool = False  # log to Weights & Biases too


@dataclass
class SAC:
    """Soft actor-critic."""

    learning_rate: float = 1e-3  # step size of Adam, of actor, critics and temperatures
    envs_per_task: int = 1  # parallel environments of each task
    buffer_size: int = 50_000  # transitions of each task that are kept
    learning_starts: int = 200  # transitions of each task, by random actions, before the first update
    batch_size: int = 128  # samples of each task in an update
    updates_per_step: float = 1.0  # updates per step of all environments
    gamma: float = 0.99  # discount
    tau: float = 0.05  # step of the target critics towards the critics
    reward_scale: float = 0.1  # factor of the rewards
    target_entropy: float = 0.2  # times log(actions); continuous: times -dimensions, where 1 is usual
    alpha_init: float = 0.2  # initial temperature
    critics: Literal["min", "mean"] = "min"  # of both critics' values, what targets and actor take
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of actor and critics


@dataclass
class VarShare:
    """The variational residuals."""

    beta: float = 0.1  # weight of beta * KL / N_m; 1 is the ELBO
    sigma_prior: float = 0.01  # standard deviation of the prior
    sigma_init: float = 0.003  # initial standard deviation of the residuals
    reptile_alpha: float = 0.0  # share of mean_m(mu_m) that moves into theta after each update
    rollout_weights: Literal["mean", "sample"] = "mean"  # what acts: mean weights, or one draw per step


@dataclass
class Args(VarShare, SAC, Experiment):
    """All settings in one flat namespace; its groups are those of --help."""


# what differs from the defaults above, per environment; flags on the command line win
LUNARLANDER = dict(total_timesteps=800_000, envs_per_task=4, updates_per_step=4.0, batch_size=64)
LUNARLANDER |= dict(learning_rate=2e-3, gamma=0.995, target_entropy=1.0)
LUNARLANDER |= dict(beta=0.01, sigma_init=0.01)
DISCRETE = dict(gamma=0.99, target_entropy=0.08, critics="mean")
ENV_DEFAULTS = {"lunarlander20": LUNARLANDER | DISCRETE, "lunarlander20-continuous": LUNARLANDER}

# layers are lists of (W (network, out, in), b (network, out, 1)); critics has both critics of every task
Net = namedtuple("Net", "actor critics")
# each (task, sample, ...); noise is of continuous actions at next_obs and obs, (2, task, sample, action)
Batch = namedtuple("Batch", "obs next_obs actions rewards terminated noise")


def mlp(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Forward pass of all networks at once: x (network, sample, in) -> (network, sample, out)."""
    *hidden, (w_out, b_out) = layers
    if x.shape[1] < 32:  # a rollout step: few samples make the CPU's matmul twice as fast this way round
        for w, b in hidden:
            x = torch.baddbmm(b.mT, x, w.mT).relu_()
        return torch.baddbmm(b_out.mT, x, w_out.mT)
    x = x.mT.contiguous()  # with many samples narrow layers are up to six times as fast that way round
    for w, b in hidden:
        x = torch.baddbmm(b, w, x).relu_()
    return torch.baddbmm(b_out, w_out, x).mT


class Agent(nn.Module):
    """Actor and two critics of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    Layers start orthogonal with CleanRL's gains for PPO, biases at 0. `per_task` names the tensors with a row
    per task, not inherited by a new task.
    """

    per_task = ("mu", "logvar", "log_alpha", "target")

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, rng: torch.Generator):
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.act_dim = int(space.n) if self.discrete else space.shape[0]
        n_obs, hidden = envs.single_observation_space.shape[0], args.hidden_sizes
        if self.discrete:  # a logit and a Q of every action
            ends = {net: (n_obs, self.act_dim) for net in ("actor", "critic1", "critic2")}
        else:  # a Gaussian's mean and log standard deviation; Q of an action
            critic = n_obs + self.act_dim, 1
            ends = {"actor": (n_obs, 2 * self.act_dim), "critic1": critic, "critic2": critic}
        self.shapes = {}  # layer -> (out, in), in the order of the columns of `weights()`
        for net, (n_in, _) in ends.items():
            self.shapes |= {f"{net}_{i}": x for i, x in enumerate(zip(hidden, (n_in, *hidden)))}
        self.shapes |= {f"{net}_{len(hidden)}": (n_out, hidden[-1]) for net, (_, n_out) in ends.items()}
        self.sizes = [n_out * (n_in + 1) for n_out, n_in in self.shapes.values()]
        self.theta = nn.Parameter(self.init_weights(rng), requires_grad=not args.freeze_theta)  # (weight,)
        self.mu = nn.Parameter(torch.zeros(envs.num_tasks, sum(self.sizes)))  # (task, weight)
        self.logvar = nn.Parameter(torch.full_like(self.mu, 2 * math.log(args.sigma_init)))  # (task, weight)
        self.log_alpha = nn.Parameter(torch.full((envs.num_tasks,), math.log(args.alpha_init)))
        self.register_buffer(
            "target", self.weights().detach().clone()
        )  # averages the mean weights; actor's unused
        if self.discrete:
            self.target_entropy = args.target_entropy * math.log(self.act_dim)
        else:  # actions are bias + scale * tanh(u)
            self.target_entropy = -args.target_entropy * self.act_dim
            low, high = (torch.from_numpy(x).float() for x in (space.low, space.high))
            self.register_buffer("action_scale", (high - low) / 2, persistent=False)
            self.register_buffer("action_bias", (high + low) / 2, persistent=False)

    def init_weights(self, rng: torch.Generator) -> Tensor:
        """One draw of all weights, (weight,)."""
        last, parts = len(self.shapes) // 3 - 1, []
        for name, (n_out, n_in) in self.shapes.items():
            output_gain = 0.01 if name.startswith("actor") else 1.0
            gain = output_gain if name.endswith(f"_{last}") else math.sqrt(2)
            w = nn.init.orthogonal_(torch.empty(n_out, n_in), gain, generator=rng)
            parts += [w.flatten(), torch.zeros(n_out)]
        return torch.cat(parts)

    def draw_noise(self, rng: torch.Generator) -> Tensor:
        """Fresh noise for `weights`, (task, weight)."""
        return torch.randn(self.mu.shape, generator=rng, device=rng.device)

    def weights(self, noise: Tensor | None = None) -> Tensor:
        """W_m = theta + mu_m + sigma_m * noise, (task, weight); without noise the mean weights."""
        mean = self.theta + self.mu
        return mean if noise is None else torch.addcmul(mean, torch.exp(0.5 * self.logvar), noise)

    def unpack(self, weights: Tensor) -> Net:
        """(task, weight) -> the layers; the columns are in the order of `shapes`."""
        nets = {"actor": [], "critic1": [], "critic2": []}
        for (name, (n_out, n_in)), x in zip(self.shapes.items(), weights.split(self.sizes, 1), strict=True):
            layer = x[:, : n_out * n_in].view(-1, n_out, n_in), x[:, n_out * n_in :].unsqueeze(2)
            nets[name.rpartition("_")[0]].append(layer)
        critics = [  # as if every critic were a task: one batched product for all
            tuple(torch.stack(pair, 1).flatten(0, 1) for pair in zip(*layers))
            for layers in zip(nets["critic1"], nets["critic2"])
        ]
        return Net(nets["actor"], critics)

    def action_noise(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Noise of `act` and `sample`: Gumbel (the argmax then draws from the softmax) or normal."""
        noise = torch.empty(*shape, self.act_dim, device=rng.device)
        return -noise.exponential_(generator=rng).log() if self.discrete else noise.normal_(generator=rng)

    def act(self, net: Net, obs: Tensor, noise: Tensor) -> Tensor:
        """Draw actions (task, env) or (task, env, action) at obs (task, env, obs)."""
        return (mlp(net.actor, obs) + noise).argmax(-1) if self.discrete else self.sample(net, obs, noise)[0]

    def random_actions(self, noise: Tensor) -> Tensor:
        """Uniform actions made of `action_noise`, shaped as those of `act`."""
        if self.discrete:
            return noise.argmax(-1)
        return self.action_bias + self.action_scale * torch.special.erf(noise / math.sqrt(2))

    def sample(self, net: Net, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squashed Gaussian: actions (task, sample, action) and their log-probabilities (task, sample)."""
        mean, logstd = mlp(net.actor, obs).chunk(2, -1)
        logstd = -5 + 3.5 * (logstd.tanh() + 1)  # from -5 to 2, as CleanRL's
        u = mean + logstd.exp() * noise
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
        logp = -0.5 * noise.square() - logstd - 0.5 * math.log(2 * math.pi) - squash - self.action_scale.log()
        return self.action_bias + self.action_scale * u.tanh(), logp.sum(-1)

    def policy(self, net: Net, obs: Tensor) -> Tensor:
        """What an ensemble averages: action probabilities or mean before tanh, (task, env, action)."""
        out = mlp(net.actor, obs)
        return out.softmax(-1) if self.discrete else out.chunk(2, -1)[0]

    def greedy(self, policy: Tensor) -> Tensor:
        """The deterministic action of a `policy`."""
        return policy.argmax(-1) if self.discrete else self.action_bias + self.action_scale * policy.tanh()

    def q(self, critics: list[tuple[Tensor, Tensor]], obs: Tensor, actions: Tensor | None = None) -> Tensor:
        """Q of both critics at obs (task, sample, obs), (task, critic, sample, action); 1 for Box actions."""
        x = obs if self.discrete else torch.cat((obs, actions), -1)
        x = x.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1)
        return mlp(critics, x).unflatten(0, (-1, 2))


def gaussian_kl(mu: Tensor, logvar: Tensor, sigma_prior: float) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, sigma_prior^2)) in nats: (task, weight) -> sum over weights (task,)."""
    sums = (mu.square().sum(1) + logvar.exp().sum(1)) / sigma_prior**2 - logvar.sum(1)
    return 0.5 * (sums + mu.shape[1] * (2 * math.log(sigma_prior) - 1))


STATS = ("qf1_values", "qf2_values", "qf_loss", "actor_loss", "entropy", "alpha_loss")


def sac_loss(agent: Agent, net: Net, target: Net, b: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Bellman errors of both critics, actor's and temperature's loss: of each task (task,), and STATS."""
    alpha = agent.log_alpha.exp().unsqueeze(1)
    alpha_now = alpha.detach()  # which only the temperature's loss changes
    of_both = torch.amin if args.critics == "min" else torch.mean
    with torch.no_grad():
        if agent.discrete:
            logp = mlp(net.actor, b.next_obs).log_softmax(-1)
            q = of_both(agent.q(target.critics, b.next_obs), 1)
            next_value = (logp.exp() * (q - alpha_now.unsqueeze(2) * logp)).sum(-1)
        else:
            next_actions, logp = agent.sample(net, b.next_obs, b.noise[0])
            q = of_both(agent.q(target.critics, b.next_obs, next_actions), 1)
            next_value = q.squeeze(-1) - alpha_now * logp
        target_q = args.reward_scale * b.rewards + args.gamma * (1 - b.terminated) * next_value
    if agent.discrete:
        q = agent.q(net.critics, b.obs)
        q_taken = q.gather(3, b.actions.long().unsqueeze(1).expand(-1, 2, -1, -1)).squeeze(3)
        logp = mlp(net.actor, b.obs).log_softmax(-1)
        p = logp.exp()
        actor_loss = (p * (alpha_now.unsqueeze(2) * logp - of_both(q.detach(), 1))).sum(-1)
        entropy = -(p * logp).sum(-1)
    else:
        q_taken = agent.q(net.critics, b.obs, b.actions).squeeze(3)
        actions, logp = agent.sample(net, b.obs, b.noise[1])
        critics = [(w.detach(), bias.detach()) for w, bias in net.critics]
        actor_loss = alpha_now * logp - of_both(agent.q(critics, b.obs, actions), 1).squeeze(-1)
        entropy = -logp
    qf_loss = 0.5 * (q_taken - target_q.unsqueeze(1)).square().sum(1)
    alpha_loss = alpha * (entropy.detach() - agent.target_entropy)
    loss = (qf_loss + actor_loss + alpha_loss).mean(1)
    with torch.no_grad():
        stats = (q_taken[:, 0], q_taken[:, 1], qf_loss, actor_loss, entropy, alpha_loss)
        return loss, torch.stack(stats).mean((1, 2))


def objective(agent: Agent, noise: Tensor, b: Batch, num_stored: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """The objective at the top, (), and STATS; num_stored () is N_m, the same in all tasks."""
    loss, stats = sac_loss(agent, agent.unpack(agent.weights(noise)), agent.unpack(agent.target), b, args)
    kl = gaussian_kl(agent.mu, agent.logvar, args.sigma_prior)
    return (loss + args.beta / num_stored * kl).sum(), stats


@torch.no_grad()
def recentre(agent: Agent, alpha: float) -> None:
    """theta += delta and every mu_m -= delta with delta = alpha * mean_m(mu_m): no W_m changes."""
    delta = alpha * agent.mu.mean(0)
    agent.theta += delta
    agent.mu -= delta


@torch.no_grad()
def method_metrics(agent: Agent, num_stored: int, args: Args) -> dict[str, tuple[Tensor, Tensor]]:
    """What to log of the method: metric -> values of the tasks (task,), value for all ()."""
    kl = gaussian_kl(agent.mu, agent.logvar, args.sigma_prior)
    sigma = torch.exp(0.5 * agent.logvar).median(1).values
    per_task = {
        "kl": kl,
        "kl_loss": kl * args.beta / num_stored,
        "sigma": sigma,
        "sigma_over_theta": sigma / agent.theta.abs().median(),
        "mu_norm": agent.mu.norm(dim=1),
        "theta_norm": agent.theta.norm().expand(len(kl)),
    }
    metrics = {f"varshare/{name}": (x, x.mean()) for name, x in per_task.items()}
    for name, theta, mu in zip(agent.shapes, agent.theta.split(agent.sizes), agent.mu.split(agent.sizes, 1)):
        theta2, mu2 = theta.square().sum(), mu.square().sum(1)
        metrics[f"varshare/sharing_ratio/{name}"] = (theta2 / (theta2 + mu2), theta2 / (theta2 + mu2.mean()))
    return metrics


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    may_be_0 = "seed checkpoint_interval learning_starts gamma target_entropy beta reptile_alpha"
    check_numbers(args, may_be_0.split(), at_most_1=["gamma", "tau", "reptile_alpha"])
    if args.buffer_size < max(args.batch_size, args.learning_starts):
        fail("--buffer-size must be at least --batch-size and --learning-starts")
    if not args.hidden_sizes:
        fail("--hidden-sizes: at least one")
    if args.freeze_theta and not args.load:
        fail("--freeze-theta needs a theta from --load")
    if args.freeze_theta and args.reptile_alpha:
        fail("--freeze-theta goes without --reptile-alpha, which moves theta")
    if args.run_name in (".", "..") or Path(args.run_name).name != args.run_name:
        fail(f"--run-name is the name of a folder below runs/, not {args.run_name!r}")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: PyTorch finds no CUDA device")


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    envs = build(make, args.env_id, args.envs_per_task, args.tasks or None)
    eval_envs = build(make, args.env_id, args.eval_episodes, args.tasks or None)
    num_tasks, num_envs = envs.num_tasks, args.envs_per_task
    num_steps = args.total_timesteps // envs.num_envs  # of all environments
    starts = math.ceil(args.learning_starts / num_envs)  # steps of random actions
    if num_steps < max(starts, 1):
        least = max(starts, 1) * envs.num_envs
        fail(f"--total-timesteps must be at least {least}: one step, and --learning-starts, of all tasks")
    capacity = min(math.ceil(args.buffer_size / num_envs), num_steps)  # steps that the buffer holds
    n_obs, action_shape = envs.single_observation_space.shape[0], envs.single_action_space.shape
    widths = [n_obs, n_obs, math.prod(action_shape), 1, 1]  # of a Batch
    memory = check_memory(4 * num_tasks * capacity * num_envs * sum(widths), args.cuda)
    run = Run(args, __file__, envs)
    if run.finished:
        print(f"{run.folder} is finished")
        return run.folder

    # seeded set-up
    torch.set_num_threads(args.num_threads)
    torch.empty(8_000_000)  # having freed 32 MB, glibc no longer returns every large block to the system
    device = torch.device("cuda" if args.cuda else "cpu")
    rng = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(envs, args, torch.Generator().manual_seed(args.seed))
    if args.load and not run.checkpoint:
        load_agent(agent, Path(args.load), envs.task_names)
        agent.target.copy_(agent.weights().detach())
    agent.to(device)
    params = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, fused=True)
    loss_fn = torch.compile(objective) if args.compile else objective
    next_obs, _ = envs.reset(seed=spread_seeds(args.seed, 0, envs.num_envs))
    # a ring, (task, step % capacity, env, features of a Batch side by side)
    buffer = torch.zeros(num_tasks, capacity, num_envs, sum(widths), device=device)
    task = torch.arange(num_tasks, device=device).unsqueeze(1)
    episodes = np.zeros((3, num_tasks))  # since the last log: sum of returns, sum of lengths, count
    recent = np.full((2, num_tasks), np.nan)  # mean return and length at the last log that had an episode
    stats, num_updates = torch.zeros(len(STATS), device=device), 0  # sums since the last log
    step, due, seconds = 0, 0.0, 0.0
    if saved := run.checkpoint:
        step, due, seconds = saved["step"], saved["due"], saved["seconds"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.set_state(saved["rng"])
        stored = saved.pop("buffer")  # popped, as the checkpoint stays in memory
        buffer[:, : stored.shape[1]] = stored.to(device)
        del stored
        episodes, recent = saved["episodes"].numpy(), saved["recent"].numpy()
        stats, num_updates = saved["stats"].to(device), saved["num_updates"]
        if saved["envs"] is None:  # these cannot be saved: new episodes
            next_obs, _ = envs.reset(seed=spread_seeds(args.seed, 1 + step, envs.num_envs))
        else:
            envs.set_state(saved["envs"])
            next_obs = saved["next_obs"].numpy()
    print(f"replay buffer: {capacity * num_envs:,} transitions of each task, {memory}")
    run.start(step * envs.num_envs, num_steps * envs.num_envs)

    start_time, last_save = time.perf_counter(), time.perf_counter()
    clock_step, clock_time = step * envs.num_envs, start_time
    first_update = max(step, starts) + math.ceil(1 / args.updates_per_step)  # by then there was one
    while step < num_steps:
        # one step of all environments
        with torch.no_grad():
            obs = torch.from_numpy(next_obs).view(num_tasks, num_envs, n_obs).to(device)
            noise = agent.draw_noise(rng) if args.rollout_weights == "sample" else None
            action_noise = agent.action_noise((num_tasks, num_envs), rng)
            if step >= starts:
                actions = agent.act(agent.unpack(agent.weights(noise)), obs, action_noise)
            else:
                actions = agent.random_actions(action_noise)
            next_obs, rewards, terminated, _, infos = envs.step(actions.flatten(0, 1).cpu().numpy())
            final_obs = torch.from_numpy(infos.get("final_obs", next_obs)).view(obs.shape)
            parts = obs, final_obs, actions, torch.from_numpy(rewards), torch.from_numpy(terminated)
            parts = [x.reshape(num_tasks, num_envs, -1).to(device, torch.float32) for x in parts]
            buffer[:, step % capacity] = torch.cat(parts, 2)
            if "final_info" in infos:
                ended, episode = infos["_final_info"], infos["final_info"]["episode"]
                sums = [np.where(ended, x, 0) for x in (episode["r"], episode["l"], 1)]
                episodes += np.reshape(sums, (3, num_tasks, num_envs)).sum(2)
        step += 1

        # updates
        num_stored = min(step, capacity) * num_envs  # of each task
        due += args.updates_per_step if step >= starts else 0
        while due >= 1:
            due -= 1
            inds = torch.randint(num_stored, (num_tasks, args.batch_size), generator=rng, device=device)
            parts = buffer.flatten(1, 2)[task, inds].split(widths, 2)
            noise = agent.draw_noise(rng)
            action_noise = None if agent.discrete else agent.action_noise((2, *inds.shape), rng)
            batch = Batch(*parts[:3], *(x.squeeze(2) for x in parts[3:]), action_noise)
            size = torch.tensor(float(num_stored))  # a number would be compiled anew whenever it changes
            loss, update_stats = loss_fn(agent, noise, batch, size, args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.reptile_alpha:
                recentre(agent, args.reptile_alpha)
            with torch.no_grad():
                agent.target.lerp_(agent.weights(), args.tau)
            stats += update_stats
            num_updates += 1

        # log a hundred times, print twenty times, save every checkpoint_interval seconds
        now, global_step, last = time.perf_counter(), step * envs.num_envs, step == num_steps
        if step == first_update:  # the clock of SPS starts after the first update, which compiles
            clock_step, clock_time = global_step, now
        run.bar.update(envs.num_envs)
        log = step % max(1, num_steps // 100) == 0 or last
        save = run.stop or last or now - last_save >= args.checkpoint_interval
        if (log or save) and not all(x.isfinite().all() for x in (stats, buffer, *params)):
            run.close()
            sys.exit(f"{run.folder}: NaN or infinite loss at step {global_step}; earlier checkpoints stay")
        if log:
            new = episodes[2] > 0
            recent[:, new] = episodes[:2, new] / episodes[2, new]
            for name, x in zip(("charts/episodic_return", "charts/episodic_length"), recent, strict=True):
                run.log(global_step, name, x.mean(), np.where(new, x, np.nan))
            episodes[:] = 0
            run.log(global_step, "charts/SPS", (global_step - clock_step) / max(now - clock_time, 1e-9))
            run.log(global_step, "charts/wall_time", seconds + now - start_time)
            run.log(global_step, "charts/learning_rate", args.learning_rate)
            if num_updates:
                for name, x in zip(STATS, (stats / num_updates).tolist(), strict=True):
                    run.log(global_step, f"losses/{name}", x)
            alpha = agent.log_alpha.detach().exp()
            run.log(global_step, "losses/alpha", alpha.mean().item(), alpha.tolist())
            stats, num_updates = torch.zeros_like(stats), 0
            for name, (per_task, overall) in method_metrics(agent, num_stored, args).items():
                run.log(global_step, name, overall.item(), per_task.tolist())
        if step % max(1, num_steps // 20) == 0 or last:
            run.show(global_step, recent[0])
        if save:
            run.save(
                "checkpoint",
                step=step,
                due=due,
                seconds=seconds + now - start_time,
                agent=agent.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
                # of a view all would be saved; a finished run needs none
                buffer=buffer[:, : 0 if last else min(step, capacity)].clone(),
                stats=stats,
                num_updates=num_updates,
                envs=envs.get_state(),
                next_obs=torch.from_numpy(next_obs),
                episodes=torch.from_numpy(episodes),
                recent=torch.from_numpy(recent),
            )
            last_save = now
        if run.stop and save:  # else the signal came after the line above, and the next step saves
            run.close()
            print(f"stopped at step {global_step}: continue with --resume --run-name {run.folder.name}")
            sys.exit(128 + run.stop[0])

    # final evaluation: deterministic actions, environments of their own
    net = agent.unpack(agent.weights())
    seeds = spread_seeds(args.seed, 1, eval_envs.num_envs)
    returns, lengths = evaluate(lambda x: agent.greedy(agent.policy(net, x.to(device))), eval_envs, seeds)
    run.log(step * envs.num_envs, "eval/episodic_return", returns.mean(), returns.mean(1))
    run.log(step * envs.num_envs, "eval/episodic_length", lengths.mean(), lengths.mean(1))
    run.save("model", agent=agent.state_dict())
    run.finish(returns)
    return run.folder


if __name__ == "__main__":
    train(parse_args(Args, ENV_DEFAULTS, __doc__))
