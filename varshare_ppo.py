"""VarShare-PPO: one set of shared weights and one variational residual per task, trained with PPO.

Every weight of actor and critic acts in task m as W_m = theta + phi_m with q(phi_m) = N(mu_m, sigma_m^2)
and prior p = N(0, sigma_prior^2). With N_m samples of task m in a rollout the script minimises

    sum_m [ L_PPO(theta + mu_m + sigma_m * eps_m) + beta / N_m * KL(q_m || p) ],   eps_m ~ N(0, I),

L_PPO being a mean over samples of task m: beta = 1 is the negative ELBO with the PPO surrogate in the place of the
log-likelihood. After each update phase `--reptile-alpha` moves a share of the mean of the mu_m into theta.

PPO is Schulman et al. 2017 in the form of CleanRL's ppo.py; the README numbers every deviation. All tasks are
computed at once: the weights of all tasks are the rows of one (task, weight) matrix.
"""

import argparse
import csv
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# the project's root, so that a script, or a fork of it in any folder below, finds the envs package
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "envs" / "__init__.py").exists())
sys.path.append(str(ROOT))
from envs import make  # noqa: E402
from envs.evaluation import evaluate, spread_seeds  # noqa: E402


@dataclass
class Experiment:
    """What to run, and where: runs/{run_name}."""

    env_id: str = "cartpole10"  # cartpole10, cartpole-identical10, lunarlander20[-continuous] or any Gymnasium id
    tasks: tuple[int, ...] = ()  # train on these tasks of the suite only, e.g. --tasks 0 2 5
    seed: int = 1  # seed of every random draw
    total_timesteps: int = 1_000_000  # environment steps of the run, all tasks together
    eval_episodes: int = 20  # episodes per task of the final evaluation
    load: str = ""  # start from a saved model (run folder or model.pt): theta, and the residuals of tasks it knows
    freeze_theta: bool = False  # train only the residuals of the tasks (needs --load)
    exp_name: str = Path(__file__).stem  # name of the experiment
    run_name: str = ""  # folder below runs/; by default {env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # continue the run of the same settings from its checkpoint; without one, start it
    checkpoint_interval: float = 30.0  # seconds between checkpoints
    num_threads: int = 1  # CPU threads
    cuda: bool = False  # train on the GPU; at the default size the CPU is faster
    compile: bool = False  # torch.compile policy and loss: needs a C++ compiler and some 30 s at the start
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "varshare"  # project there
    wandb_entity: str | None = None  # team there


@dataclass
class PPO:
    """Proximal policy optimisation."""

    learning_rate: float = 3e-3  # step size of Adam
    anneal_lr: bool = True  # decay it linearly to 0
    envs_per_task: int = 8  # parallel environments of each task
    num_steps: int = 128  # steps of each environment per rollout
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch, each with as many samples of every task
    update_epochs: int = 4  # epochs over each rollout
    norm_adv: bool = True  # normalise the advantages of each task in each rollout
    norm_reward: bool = False  # divide each task's rewards by the running std of its discounted return
    clip_coef: float = 0.2  # clip range of the ratio
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: float = 0.01  # weight of the entropy
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of actor and critic


@dataclass
class VarShare:
    """The variational residuals."""

    beta: float = 0.1  # weight of beta * KL / N_m; 1 is the ELBO
    sigma_prior: float = 0.1  # standard deviation of the prior
    sigma_init: float = 0.01  # initial standard deviation of the residuals
    reptile_alpha: float = 0.0  # share of mean_m(mu_m) that moves into theta after each update phase
    rollout_weights: Literal["mean", "sample"] = "mean"  # which weights act: the means, or one draw per rollout


@dataclass
class Args(VarShare, PPO, Experiment):
    """All settings in one flat namespace; the three groups are those of --help."""


# what differs from the defaults above, per environment; flags on the command line win
ENV_DEFAULTS = {
    "lunarlander20": dict(total_timesteps=8_000_000, gamma=0.999, norm_reward=True),
    "lunarlander20-continuous": dict(total_timesteps=8_000_000, gamma=0.999, norm_reward=True),
}

Net = namedtuple("Net", "actor critic logstd")  # two lists of layers (W (task, out, in), b (task, out, 1)), and
#                                                 the Gaussian policy's log standard deviation (task, 1, action)
Batch = namedtuple("Batch", "obs actions logprobs advantages returns values")  # each (task, sample, ...)


def mlp(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Forward pass of all tasks at once: x (task, sample, in) -> (task, sample, out)."""
    *hidden, (w_out, b_out) = layers
    if x.shape[1] < 32:  # a rollout step: with few samples a CPU's batched matmul is twice as fast this way round
        for w, b in hidden:
            x = torch.baddbmm(b.mT, x, w.mT).relu_()
        return torch.baddbmm(b_out.mT, x, w_out.mT)
    x = x.mT.contiguous()  # with many samples it is up to six times as fast that way round, in narrow layers
    for w, b in hidden:
        x = torch.baddbmm(b, w, x).relu_()
    return torch.baddbmm(b_out, w_out, x).mT


class Agent(nn.Module):
    """Actor and critic of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    Layers start orthogonal with CleanRL's gains, biases at 0; the Gaussian policy's log standard deviation is a
    weight like any other. `per_task` names the tensors with one row per task: what a new task does not inherit.
    """

    per_task = ("mu", "logvar", "return_stats")

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, rng: torch.Generator):
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.act_dim = int(space.n) if self.discrete else space.shape[0]
        widths = [envs.single_observation_space.shape[0], *args.hidden_sizes]
        self.shapes = {  # layer -> (out, in), in the order of the columns of `weights()`
            f"{net}_{i}": shape
            for net, out in (("actor", self.act_dim), ("critic", 1))
            for i, shape in enumerate(zip([*widths[1:], out], widths, strict=True))
        }
        self.sizes = [n_out * (n_in + 1) for n_out, n_in in self.shapes.values()]
        self.sizes.append(0 if self.discrete else self.act_dim)  # logstd
        self.theta = nn.Parameter(self.init_weights(rng), requires_grad=not args.freeze_theta)  # (weight,)
        self.mu = nn.Parameter(torch.zeros(envs.num_tasks, sum(self.sizes)))  # (task, weight)
        self.logvar = nn.Parameter(torch.full_like(self.mu, 2 * math.log(args.sigma_init)))  # (task, weight)
        # count, sum and sum of squares of the discounted return, for --norm-reward
        self.register_buffer("return_stats", torch.zeros(envs.num_tasks, 3, dtype=torch.float64))

    def init_weights(self, rng: torch.Generator) -> Tensor:
        """One draw of all weights, (weight,)."""
        depth, parts = len(self.shapes) // 2, []
        for name, (n_out, n_in) in self.shapes.items():
            gain = {f"actor_{depth - 1}": 0.01, f"critic_{depth - 1}": 1.0}.get(name, math.sqrt(2))
            w = nn.init.orthogonal_(torch.empty(n_out, n_in), gain, generator=rng)
            parts += [w.flatten(), torch.zeros(n_out)]
        return torch.cat([*parts, torch.zeros(self.sizes[-1])])

    def weights(self, noise: Tensor | None = None) -> Tensor:
        """W_m = theta + mu_m + sigma_m * noise, (task, weight); without noise the mean weights."""
        mean = self.theta + self.mu
        return mean if noise is None else torch.addcmul(mean, torch.exp(0.5 * self.logvar), noise)

    def unpack(self, weights: Tensor) -> Net:
        """(task, weight) -> the layers of actor and critic."""
        *parts, logstd = weights.split([n for o, i in self.shapes.values() for n in (o * i, o)] + self.sizes[-1:], 1)
        layers = zip(parts[::2], parts[1::2], self.shapes.values(), strict=True)
        layers = [(w.view(-1, *shape), b.unsqueeze(2)) for w, b, shape in layers]
        return Net(layers[: len(layers) // 2], layers[len(layers) // 2 :], logstd.unsqueeze(1))

    def action_noise(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Noise of `act`: Gumbel (the argmax then draws from the softmax) or normal, (*shape, action)."""
        noise = torch.empty(*shape, self.act_dim, device=rng.device)
        return -noise.exponential_(generator=rng).log() if self.discrete else noise.normal_(generator=rng)

    def act(self, net: Net, obs: Tensor, noise: Tensor) -> Tensor:
        """Draw actions (task, env) or (task, env, action) at obs (task, env, obs)."""
        out = mlp(net.actor, obs)
        return (out + noise).argmax(-1) if self.discrete else out + net.logstd.exp() * noise

    def policy(self, net: Net, obs: Tensor) -> Tensor:
        """What an ensemble averages: action probabilities, or the Gaussian's mean, (task, env, action)."""
        out = mlp(net.actor, obs)
        return out.softmax(-1) if self.discrete else out

    def greedy(self, policy: Tensor) -> Tensor:
        """The deterministic action of a `policy`."""
        return policy.argmax(-1) if self.discrete else policy

    def log_prob_entropy(self, net: Net, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the actions and entropy of the policy, each (task, sample), in nats."""
        out = mlp(net.actor, obs)
        if self.discrete:
            logp = out.mT.log_softmax(1)
            return logp.gather(1, actions.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(1)
        z = (actions - out) * torch.exp(-net.logstd)
        const = net.logstd + 0.5 * math.log(2 * math.pi)
        return -(0.5 * z.square() + const).sum(-1), (const + 0.5).sum(-1).expand(z.shape[:-1])

    def value(self, net: Net, obs: Tensor) -> Tensor:
        """V(obs), (task, sample)."""
        return mlp(net.critic, obs).squeeze(-1)


def gaussian_kl(mu: Tensor, logvar: Tensor, sigma_prior: float) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, sigma_prior^2)) summed over weights: (task, weight) -> (task,), in nats."""
    sums = (mu.square().sum(1) + logvar.exp().sum(1)) / sigma_prior**2 - logvar.sum(1)
    return 0.5 * (sums + mu.shape[1] * (2 * math.log(sigma_prior) - 1))


def gae(rewards, values, next_values, terminated, done, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016); tensors are (step, ...).

    next_values is V of the state that followed, the last of its episode where that ended: it counts after a
    truncation, not after a termination. done = terminated or truncated ends the sum.
    """
    deltas = (rewards + gamma * next_values * (1 - terminated) - values).unbind()
    decays = (gamma * lam * (1 - done)).unbind()
    advantages = [deltas[-1]]
    for t in reversed(range(len(deltas) - 1)):
        advantages.append(torch.addcmul(deltas[t], decays[t], advantages[-1]))
    return torch.stack(advantages[::-1])


STATS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")


def ppo_loss(agent: Agent, net: Net, b: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, value loss and entropy bonus: the loss of each task (task,), and STATS."""
    newlogprob, entropy = agent.log_prob_entropy(net, b.obs, b.actions)
    newvalue = agent.value(net, b.obs)
    logratio = newlogprob - b.logprobs
    ratio = logratio.exp()
    pg_loss = -torch.min(b.advantages * ratio, b.advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    v_loss = (newvalue - b.returns).square()
    if args.clip_vloss:
        v_clipped = b.values + (newvalue - b.values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - b.returns).square())
    loss = (pg_loss - args.ent_coef * entropy + args.vf_coef * 0.5 * v_loss).mean(1)
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > args.clip_coef).float()
        stats = torch.stack((pg_loss, 0.5 * v_loss, entropy, -logratio, (ratio - 1) - logratio, clipped))
    return loss, stats.mean((1, 2))


def varshare_loss(agent: Agent, noise: Tensor, b: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """The objective at the top, (), and STATS."""
    loss, stats = ppo_loss(agent, agent.unpack(agent.weights(noise)), b, args)
    kl = gaussian_kl(agent.mu, agent.logvar, args.sigma_prior)
    return (loss + args.beta / (args.num_steps * args.envs_per_task) * kl).sum(), stats


@torch.no_grad()
def recentre(agent: Agent, alpha: float) -> None:
    """theta += delta and every mu_m -= delta with delta = alpha * mean_m(mu_m): no W_m changes."""
    delta = alpha * agent.mu.mean(0)
    agent.theta += delta
    agent.mu -= delta


@torch.no_grad()
def method_metrics(agent: Agent, args: Args) -> dict[str, tuple[Tensor, Tensor]]:
    """What to log of the method: metric -> values of the tasks (task,), value for all ()."""
    kl, sigma = gaussian_kl(agent.mu, agent.logvar, args.sigma_prior), torch.exp(0.5 * agent.logvar).median(1).values
    per_task = {
        "kl": kl,
        "kl_loss": kl * args.beta / (args.num_steps * args.envs_per_task),
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


@torch.no_grad()
def scale_rewards(agent: Agent, rewards: Tensor, done: Tensor, returns: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Divide rewards (step, task, env) by the running standard deviation of their task's discounted return.

    `returns` (task, env), that return so far, is continued and handed back. As Gymnasium's NormalizeReward, with
    one estimate for all environments of a task.
    """
    seen = torch.empty_like(rewards)
    for t in range(len(rewards)):
        seen[t] = returns = returns * gamma + rewards[t]
        returns = returns * (1 - done[t])
    seen = seen.transpose(0, 1).flatten(1).double()
    agent.return_stats += torch.stack((torch.ones_like(seen), seen, seen.square())).sum(2).T
    count, total, squares = agent.return_stats.T
    std = (squares / count - (total / count).square() + 1e-8).sqrt()
    return rewards / std.float().unsqueeze(1), returns


def fail(message: str) -> NoReturn:
    """Bad input: one line, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    positive = """total_timesteps eval_episodes num_threads learning_rate envs_per_task num_steps num_minibatches
                  update_epochs max_grad_norm clip_coef sigma_prior sigma_init"""
    for names, ok, wanted in (
        (positive, lambda x: 0 < x < math.inf, "positive and finite"),
        ("seed checkpoint_interval ent_coef vf_coef beta", lambda x: 0 <= x < math.inf, "finite and not negative"),
        ("gamma gae_lambda reptile_alpha", lambda x: 0 <= x <= 1, "between 0 and 1"),
        ("hidden_sizes", lambda x: x and min(x) > 0, "one or more positive widths"),
        ("run_name", lambda x: x in ("", Path(x).name) and x != "..", "the name of a folder below runs/"),
        ("cuda", lambda x: not x or torch.cuda.is_available(), "left out where PyTorch finds no CUDA device"),
    ):
        for name in names.split():
            if not ok(getattr(args, name)):
                fail(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(args, name)!r}")
    if args.envs_per_task * args.num_steps % args.num_minibatches:
        fail(f"{args.envs_per_task} envs x {args.num_steps} steps do not divide into {args.num_minibatches} minibatches")
    if args.freeze_theta and (not args.load or args.reptile_alpha):
        fail("--freeze-theta needs a theta from --load, and goes without --reptile-alpha, which moves it")


def save(path: Path, content: dict) -> None:
    """Write a file whole or not at all."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def read(path: Path, kind: str) -> dict:
    """Load a "model" or a "checkpoint" that `save` wrote; anything else is bad input."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["kind"] != kind:
            raise ValueError(f"it is a {content['kind']}")
    except Exception as error:  # a file of another origin can fail in any way
        fail(f"{path} is not a {kind} of VarShare ({type(error).__name__}: {str(error).split(chr(10))[0][:100]})")
    return content


@torch.no_grad()
def load_agent(agent: Agent, path: Path, task_names: list[str]) -> None:
    """Copy a saved model into agent: every shared tensor, and the rows of tasks that the model knows by name."""
    path = path / "model.pt" if path.is_dir() else path
    saved = read(path, "model")
    for name, value in agent.state_dict().items():
        old, rows = saved["agent"].get(name, torch.empty(0)), name in agent.per_task
        if old.shape[rows:] != value.shape[rows:]:
            fail(f"{path} does not fit: its {name} is {tuple(old.shape)}, this run's {tuple(value.shape)}")
        if not rows:
            value.copy_(old)
        for m, task in enumerate(task_names):
            if rows and task in saved["task_names"]:
                value[m] = old[saved["task_names"].index(task)]


def run_folder(args: Args) -> Path:
    """Where the run is; to resume without --run-name, the newest folder of the same experiment and seed."""
    stem = f"{args.env_id}__{args.exp_name}__{args.seed}".replace("/", "-")
    earlier = sorted(Path("runs").glob(f"{stem}__*/config.json"), key=lambda p: p.stat().st_mtime)
    if args.resume and earlier and not args.run_name:
        return earlier[-1].parent
    return Path("runs", args.run_name or f"{stem}__{int(time.time())}")


def describe(args: Args, envs: gym.vector.VectorEnv) -> dict:
    """The config.json of a run."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((x.split(": ")[1] for x in cpuinfo.split("\n") if x.startswith("model name")), platform.processor())
    return {
        "script": os.path.relpath(__file__, ROOT),
        "args": asdict(args),
        "tasks": dict(zip(envs.task_names, envs.task_params, strict=True)),
        "versions": {p: version(p) for p in ("torch", "gymnasium", "numpy")} | {"python": platform.python_version()},
        "git_commit": git.stdout.decode().strip() or None,
        "hardware": f"{torch.cuda.get_device_name() if args.cuda else cpu}, {os.cpu_count()} cores",
    }


class Log:
    """TensorBoard events and heartbeat.csv (global_step, metric, task, value) of a run."""

    def __init__(self, folder: Path, task_names: list[str], step: int, offset: int):
        """Continue after `step`, when heartbeat.csv had `offset` bytes: what was logged later is dropped."""
        self.task_names, self.writer = task_names, SummaryWriter(str(folder), purge_step=step + 1)
        self.file = open(folder / "heartbeat.csv", "a", newline="")
        self.file.truncate(offset)
        if not offset:
            csv.writer(self.file).writerow(("global_step", "metric", "task", "value"))

    def __call__(self, step: int, metric: str, overall: float, per_task=()) -> None:
        """Log the value for all tasks, and those of the tasks where given (NaN: none yet)."""
        rows = [(task, float(x)) for task, x in zip(self.task_names, per_task) if not math.isnan(x)]
        csv.writer(self.file).writerows((step, metric, task, x) for task, x in [*rows, ("mean", float(overall))])
        self.writer.add_scalar(metric, overall, step)
        for task, x in rows if metric.startswith(("charts/", "eval/")) else ():  # the rest is in heartbeat.csv
            self.writer.add_scalar(f"{metric}/{task}", x, step)

    def flush(self) -> None:
        """Bring everything to disk."""
        self.file.flush()
        self.writer.flush()


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    try:
        envs = make(args.env_id, args.envs_per_task, args.tasks or None)
        eval_envs = make(args.env_id, args.eval_episodes, args.tasks or None)
    except ValueError as error:
        fail(str(error))
    num_tasks, num_envs, num_steps = envs.num_tasks, args.envs_per_task, args.num_steps
    batch_size = num_tasks * num_envs * num_steps
    num_iterations = args.total_timesteps // batch_size
    if not num_iterations:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {batch_size}")
    folder, config, state = run_folder(args), describe(args, envs), None
    if folder.exists() and not args.resume:
        fail(f"{folder} exists: continue it with --resume, or choose another --run-name")
    if (folder / "config.json").exists():
        earlier, now = json.loads((folder / "config.json").read_text())["args"], json.loads(json.dumps(asdict(args)))
        for name in now.keys() - {"run_name", "resume", "checkpoint_interval", "track", "wandb_project_name", "wandb_entity"}:
            if now[name] != earlier.get(name):
                fail(f"{folder} cannot be resumed: its {name} is {earlier.get(name)}, not {now[name]}")
        if (folder / "model.pt").exists():
            print(f"{folder} is finished")
            return folder
        if (folder / "checkpoint.pt").exists():
            state = read(folder / "checkpoint.pt", "checkpoint")

    # seeded set-up
    torch.set_num_threads(args.num_threads)
    torch.empty(8_000_000)  # having freed 32 MB once, glibc keeps large blocks instead of returning them every time
    device = torch.device("cuda" if args.cuda else "cpu")
    rng = torch.Generator(device).manual_seed(args.seed)
    agent = Agent(envs, args, torch.Generator().manual_seed(args.seed))
    if args.load and not state:
        load_agent(agent, Path(args.load), envs.task_names)
    agent.to(device)
    params = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, eps=1e-5, fused=True)
    act, loss_fn = (torch.compile(f) if args.compile else f for f in (agent.act, varshare_loss))
    next_obs, _ = envs.reset(seed=spread_seeds(args.seed, 0, envs.num_envs))
    discounted = torch.zeros(num_tasks, num_envs, device=device)  # return so far, for --norm-reward
    episodes = np.zeros((3, num_tasks))  # since the last log: sum of returns, sum of lengths, count
    recent = np.full((2, num_tasks), np.nan)  # mean return and length at the last log that had an episode
    iteration, seconds, offset = 0, 0.0, 0
    if state:
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        iteration, seconds, offset = state["iteration"], state["seconds"], state["offset"]
        episodes, recent = state["episodes"].numpy(), state["recent"].numpy()
        if state["envs"] is None:  # these cannot be saved: new episodes
            next_obs, _ = envs.reset(seed=spread_seeds(args.seed, 2 + iteration, envs.num_envs))
        else:
            envs.set_state(state["envs"])
            next_obs, discounted = state["next_obs"].numpy(), state["discounted"].to(device)
    folder.mkdir(parents=True, exist_ok=args.resume)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, id=folder.name, resume="allow",
                   name=folder.name, config=config, dir=folder, sync_tensorboard=True)  # fmt: skip
    log = Log(folder, envs.task_names, iteration * batch_size, offset)
    bar = tqdm(total=num_iterations * batch_size, initial=iteration * batch_size, unit="step", unit_scale=True,
               disable=not sys.stderr.isatty())  # fmt: skip
    stop = []  # signals received: the first lets the iteration end and saves it, the second ends the run at once
    handlers = {s: signal.signal(s, lambda s, _: sys.exit(128 + s) if stop else stop.append(s)) for s in (2, 15)}

    # storage, (step, task, env, ...)
    obs = torch.zeros(num_steps, num_tasks, num_envs, next_obs.shape[-1], device=device)
    final_obs = torch.zeros_like(obs)  # the state that followed, the last one of its episode where that ended
    action_space = envs.single_action_space
    actions = torch.zeros(obs.shape[:3] + action_space.shape, device=device, dtype=torch.long if agent.discrete else None)
    rewards, terminated, done = (np.zeros((num_steps, envs.num_envs), np.float32) for _ in range(3))

    def by_task(x):  # (step, task, env, ...) -> (task, sample, ...)
        return x.transpose(0, 1).flatten(1, 2)

    def by_step(x):  # (task, sample) -> (step, task, env)
        return x.view(num_tasks, num_steps, num_envs).transpose(0, 1)

    def draw_noise():
        return torch.randn(agent.mu.shape, generator=rng, device=device)

    start_iteration, start_time, last_save, global_step = iteration, *[time.perf_counter()] * 2, iteration * batch_size
    while iteration < num_iterations:
        iteration += 1
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations)

        # rollout with one set of weights
        with torch.no_grad():
            net = agent.unpack(agent.weights(draw_noise() if args.rollout_weights == "sample" else None))
            action_noise = agent.action_noise(obs.shape[:3], rng)
            for t in range(num_steps):
                obs[t] = torch.from_numpy(next_obs).view(num_tasks, num_envs, -1)
                actions[t] = act(net, obs[t], action_noise[t])
                env_actions = actions[t].flatten(0, 1).cpu().numpy()
                next_obs, rewards[t], terminated[t], truncated, infos = envs.step(env_actions)
                done[t] = np.maximum(terminated[t], truncated)
                final_obs[t] = torch.from_numpy(infos.get("final_obs", next_obs)).view(num_tasks, num_envs, -1)
                if "final_info" in infos:
                    ended, episode = infos["_final_info"], infos["final_info"]["episode"]
                    sums = [np.where(ended, x, 0) for x in (episode["r"], episode["l"], 1)]
                    episodes += np.reshape(sums, (3, num_tasks, num_envs)).sum(2)

        # advantages, and everything the update needs as (task, sample, ...)
        with torch.no_grad():
            r, term, end = (torch.from_numpy(x).to(device).view(obs.shape[:3]) for x in (rewards, terminated, done))
            if args.norm_reward:
                r, discounted = scale_rewards(agent, r, end, discounted, args.gamma)
            values, next_values = (agent.value(net, by_task(x)) for x in (obs, final_obs))
            advantages = gae(r, by_step(values), by_step(next_values), term, end, args.gamma, args.gae_lambda)
            advantages = by_task(advantages)
            returns = advantages + values
            if args.norm_adv:
                advantages = (advantages - advantages.mean(1, True)) / (advantages.std(1, keepdim=True) + 1e-8)
            logprobs, _ = agent.log_prob_entropy(net, by_task(obs), by_task(actions))
            batch = Batch(by_task(obs), by_task(actions), logprobs, advantages, returns, values)

        # update
        stats = []
        for _ in range(args.update_epochs):
            order = torch.randperm(num_steps * num_envs, generator=rng, device=device)
            for mb_inds in order.chunk(args.num_minibatches):
                loss, mb_stats = loss_fn(agent, draw_noise(), Batch(*(x.index_select(1, mb_inds) for x in batch)), args)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(params, args.max_grad_norm)
                optimizer.step()
                stats.append(mb_stats)
        if args.reptile_alpha:
            recentre(agent, args.reptile_alpha)

        # log about a hundred times, print about twenty times, save every checkpoint_interval seconds
        now, global_step = time.perf_counter(), iteration * batch_size
        stats = torch.stack(stats)
        if not (stats.isfinite().all() and all(p.isfinite().all() for p in params)):
            sys.exit(f"{folder}: NaN or infinite loss before step {global_step}; the last checkpoint is good")
        if iteration == start_iteration + 1:  # the clock of SPS starts after the first iteration, which compiles
            first_step, first_time = global_step, now
        bar.update(batch_size)
        last = iteration == num_iterations
        if iteration % max(1, num_iterations // 100) == 0 or last:
            new = episodes[2] > 0
            recent[:, new] = episodes[:2, new] / episodes[2, new]
            for name, x in zip(("charts/episodic_return", "charts/episodic_length"), recent):
                log(global_step, name, x.mean(), np.where(new, x, np.nan))
            episodes[:] = 0
            log(global_step, "charts/SPS", (global_step - first_step) / max(now - first_time, 1e-9))
            log(global_step, "charts/wall_time", seconds + now - start_time)
            log(global_step, "charts/learning_rate", optimizer.param_groups[0]["lr"])
            for name, x in zip(STATS, stats.mean(0).tolist(), strict=True):
                log(global_step, f"losses/{name}", x)
            log(global_step, "losses/clipfrac_first_minibatch", stats[0, -1].item())
            explained = 1 - (returns - values).var(1) / returns.var(1)
            log(global_step, "losses/explained_variance", explained.mean().item(), explained.tolist())
            for name, (per_task, overall) in method_metrics(agent, args).items():
                log(global_step, name, overall.item(), per_task.tolist())
        if iteration % max(1, num_iterations // 20) == 0 or last:
            bar.write(f"step {global_step:>9,}  return {recent[0].mean():7.1f}  tasks " + " ".join(f"{x:.0f}" for x in recent[0]))
        if stop or last or now - last_save >= args.checkpoint_interval:
            log.flush()
            save(folder / "checkpoint.pt", {
                "kind": "checkpoint", "iteration": iteration, "seconds": seconds + now - start_time,
                "offset": log.file.tell(), "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
                "rng": rng.get_state(), "envs": envs.get_state(), "next_obs": torch.from_numpy(next_obs),
                "discounted": discounted, "episodes": torch.from_numpy(episodes), "recent": torch.from_numpy(recent),
            })  # fmt: skip
            last_save = now
        if stop:
            bar.close()
            print(f"stopped at step {global_step}; continue with the same command and --resume --run-name {folder.name}")
            sys.exit(128 + stop[0])
    bar.close()

    # final evaluation: mean weights, deterministic actions, environments of their own
    net = agent.unpack(agent.weights())
    returns, lengths = evaluate(lambda x: agent.greedy(agent.policy(net, x.to(device))), eval_envs, args.seed)
    log(global_step, "eval/episodic_return", returns.mean(), returns.mean(1))
    log(global_step, "eval/episodic_length", lengths.mean(), lengths.mean(1))
    log.flush()
    save(folder / "model.pt", {"kind": "model", "task_names": envs.task_names, "agent": agent.state_dict(), **config})
    for task, x in zip([*envs.task_names, "mean"], [*returns, returns.mean(1)]):
        print(f"{task:>24}  return {x.mean():8.1f} +- {x.std():.1f}")
    print(f"saved  {folder}\nplots  python report.py {folder}\nuse    python enjoy.py {folder}")
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return folder


def parse_args() -> Args:
    """The command line, over the defaults of its environment."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env-id", "--env_id", default=Args.env_id)
    env_id = peek.parse_known_args()[0].env_id
    defaults = asdict(Args(**{"env_id": env_id} | ENV_DEFAULTS.get(env_id, {})))
    groups = (Experiment, PPO, VarShare)
    defaults = tuple(group(**{f.name: defaults[f.name] for f in fields(group)}) for group in groups)
    parsed = tyro.cli(tuple[groups], default=defaults, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    return Args(**{name: value for group in parsed for name, value in vars(group).items()})


if __name__ == "__main__":
    train(parse_args())
