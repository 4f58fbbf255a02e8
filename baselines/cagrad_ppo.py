"""CAGrad with PPO: Hard sharing whose step helps the task that it helps least.

With shared hidden layers theta and output layers h_m of task m, in actor and critic, Hard sharing minimises

    sum_m L_PPO(theta, h_m),

where L_PPO is a mean over samples of task m. In place of the sum of the M tasks' gradients theta here follows
M times what `cagrad` makes of them (Liu et al. 2021, Alg. 1), actor and critic apart: c = 0 is Hard sharing.
There is no other rescaling. The heads keep their gradients.

PPO is Schulman et al. 2017 in the form of CleanRL's ppo.py; the README numbers every deviation. All tasks are
computed at once: the weights of all tasks are the rows of one (task, weight) matrix.
"""

import math
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from scipy.optimize import brentq, nnls
from torch import Tensor, nn

# so that a script, or a fork of it in any folder of the project, finds the project's envs package
sys.path += [str(folder) for folder in Path(__file__).resolve().parents if (folder / "envs/runs.py").exists()]
from envs import make
from envs.evaluation import evaluate, spread_seeds
from envs.rewards import scale_rewards
from envs.runs import Run, build, check_numbers, fail, load_agent, parse_args


@dataclass
class Experiment:
    """What to run, and where: runs/{run_name}."""

    env_id: str = "cartpole10"  # a suite (cartpole10, lunarlander20, ...) or any Gymnasium id
    tasks: tuple[int, ...] = ()  # train on these tasks of the suite only, e.g. --tasks 0 2 5
    seed: int = 1  # seed of every random draw
    total_timesteps: int = 1_000_000  # environment steps of the run, all tasks together
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
    ent_coef: float = 0.0  # weight of the entropy
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of actor and critic


@dataclass
class CAGrad:
    """Conflict-averse gradient descent."""

    cagrad_c: float = 0.5  # c, size of the deviation from the mean gradient in units of its norm


@dataclass
class Args(CAGrad, PPO, Experiment):
    """All settings in one flat namespace; its groups are those of --help."""


# what differs from the defaults above, per environment; flags on the command line win
LUNARLANDER = dict(total_timesteps=8_000_000, envs_per_task=4, gamma=0.999, norm_reward=True, ent_coef=0.01)
ENV_DEFAULTS = {"lunarlander20": LUNARLANDER, "lunarlander20-continuous": LUNARLANDER}

# layers are lists of (W (task, out, in), b (task, out, 1)); a Gaussian policy's logstd is (task, 1, action)
Net = namedtuple("Net", "actor critic logstd")
Batch = namedtuple("Batch", "obs actions logprobs advantages returns values")  # each (task, sample, ...)


def mlp(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Forward pass of all tasks at once: x (task, sample, in) -> (task, sample, out)."""
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
    """Actor and critic of all tasks. Row m of `weights()` (task, weight) holds every weight of task m.

    Layers start orthogonal with CleanRL's gains, biases at 0; a Gaussian policy's log standard deviation is a
    weight like the others. `per_task` names the tensors with a row per task, not inherited by a new task.
    """

    per_task = ("heads", "return_stats")

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, rng: torch.Generator):
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.act_dim = int(space.n) if self.discrete else space.shape[0]
        widths = [envs.single_observation_space.shape[0], *args.hidden_sizes]
        hidden, last = list(zip(widths[1:], widths)), len(widths) - 1
        self.shapes = {f"{net}_{i}": shape for net in ("actor", "critic") for i, shape in enumerate(hidden)}
        self.shapes |= {f"actor_{last}": (self.act_dim, widths[-1]), f"critic_{last}": (1, widths[-1])}
        self.sizes = [n_out * (n_in + 1) for n_out, n_in in self.shapes.values()]
        self.sizes.append(0 if self.discrete else self.act_dim)  # logstd
        rows = torch.stack([self.init_weights(rng) for _ in range(envs.num_tasks)])
        shared = sum(self.sizes[:-3])  # the hidden layers, of actor and critic one half each
        self.theta = nn.Parameter(rows[0, :shared].clone(), requires_grad=not args.freeze_theta)  # (weight,)
        self.heads = nn.Parameter(rows[:, shared:].clone())  # output layers and logstd, (task, weight)
        # count, sum and sum of squares of the discounted return, for --norm-reward
        self.register_buffer("return_stats", torch.zeros(envs.num_tasks, 3, dtype=torch.float64))

    def init_weights(self, rng: torch.Generator) -> Tensor:
        """One draw of all weights, (weight,)."""
        last, parts = len(self.shapes) // 2 - 1, []
        for name, (n_out, n_in) in self.shapes.items():
            gain = {f"actor_{last}": 0.01, f"critic_{last}": 1.0}.get(name, math.sqrt(2))
            w = nn.init.orthogonal_(torch.empty(n_out, n_in), gain, generator=rng)
            parts += [w.flatten(), torch.zeros(n_out)]
        return torch.cat([*parts, torch.zeros(self.sizes[-1])])

    def weights(self) -> Tensor:
        """theta and the heads of task m, (task, weight)."""
        return torch.cat([self.theta.expand(len(self.heads), -1), self.heads], 1)

    def unpack(self, weights: Tensor) -> Net:
        """(task, weight) -> the layers of actor and critic; the columns are in the order of `shapes`."""
        *parts, logstd = weights.split(
            [n for o, i in self.shapes.values() for n in (o * i, o)] + self.sizes[-1:], 1
        )
        layers = zip(parts[::2], parts[1::2], self.shapes.values(), strict=True)
        layers = [(w.view(-1, *shape), b.unsqueeze(2)) for w, b, shape in layers]
        hidden = len(layers) // 2 - 1
        return Net([*layers[:hidden], layers[-2]], [*layers[hidden:-2], layers[-1]], logstd.unsqueeze(1))

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
    ratio, eps = logratio.exp(), args.clip_coef
    pg_loss = -torch.min(b.advantages * ratio, b.advantages * ratio.clamp(1 - eps, 1 + eps))
    v_loss = (newvalue - b.returns).square()
    if args.clip_vloss:
        v_loss = torch.max(v_loss, (b.values + (newvalue - b.values).clamp(-eps, eps) - b.returns).square())
    loss = (pg_loss - args.ent_coef * entropy + args.vf_coef * 0.5 * v_loss).mean(1)
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > eps).float()
        stats = torch.stack((pg_loss, 0.5 * v_loss, entropy, -logratio, (ratio - 1) - logratio, clipped))
    return loss, stats.mean((1, 2))


def cagrad(grads: Tensor, c: float) -> Tensor:
    """Conflict-averse gradient (Liu et al. 2021, Alg. 1): (task, weight) -> d (weight,).

    d maximises min_m g_m . d within c |g0| of the mean gradient g0: d = g0 + c |g0| g_w / |g_w|, where
    g_w = sum_m w_m g_m minimises g_w . g0 + c |g0| |g_w| over the simplex. For s = |g_w| / (c |g0|) this g_w
    also minimises |g_w + s g0|, and d = (g_w + s g0) / s. So here: the shortest vector of the hull of all
    g_m + s g0 by non-negative least squares (Lawson & Hanson 1974, ch. 23), and s by bracketing, as |g_w| / s
    falls with s. A task without gradient has no say but in g0. If the best g_w is 0, as where no direction
    helps all tasks, s -> 0 and d lies inside the ball. Solved on the CPU.
    """
    g = grads.double()
    norms, radius = g.norm(dim=1), c * g.mean(0).norm().item()
    active = norms > 0
    if not 0 < radius < math.inf:  # 0, or NaN, which the run is to stop at
        return grads.mean(0)
    x = torch.linalg.qr(g[active].T, mode="r").R.T.cpu().numpy()  # the g_m, in no more dimensions than tasks
    x0 = x.sum(0) / len(grads)

    def shortest(log_s: float) -> np.ndarray:  # w of the shortest vector of the hull of all g_m + s g0
        points = x + math.exp(log_s) * x0
        size = np.linalg.norm(points, axis=1) + 1e-300
        target = np.append(np.zeros(x.shape[1]), 1.0)
        w, _ = nnls(np.vstack([points.T, np.full(len(x), size.min())]) / size, target)
        return w / size / (w / size).sum()

    def excess(log_s: float) -> float:  # log of |g_w| / s, over the radius
        return math.log(np.linalg.norm(shortest(log_s) @ x) / radius + 1e-300) - log_s

    sizes = (norms[active] / radius).log()
    log_s = sizes.min().item() - 20  # s -> 0, as far as rounding allows
    if excess(log_s) > 0:
        log_s = brentq(excess, log_s, sizes.max().item() + 1, xtol=1e-6)
    w = torch.full_like(norms, 1 / len(grads))
    w[active] += torch.from_numpy(shortest(log_s)).to(w) / math.exp(log_s)
    return (w @ g).to(grads.dtype)


def objective(agent: Agent, weights: Tensor, b: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """The sum over tasks at the top, (), and STATS."""
    loss, stats = ppo_loss(agent, agent.unpack(weights), b, args)
    return loss.sum(), stats


@torch.no_grad()
def method_metrics(agent: Agent, grads: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What to log of the method: metric -> values of the tasks (task,), value for all ()."""
    per_task = {
        "head_norm": agent.heads.norm(dim=1),
        "theta_norm": agent.theta.norm().expand(len(agent.heads)),
    }
    metrics = {f"varshare/{name}": (x, x.mean()) for name, x in per_task.items()}
    for net, g in zip(("actor", "critic"), grads[:, : len(agent.theta)].chunk(2, 1)):
        conflicts = (g @ g.T < 0).float().sum(1) / max(1, len(g) - 1)
        metrics[f"varshare/conflicts/{net}"] = (conflicts, conflicts.mean())
    return metrics


def check(args: Args) -> None:
    """Refuse settings that make no sense, before anything is written."""
    may_be_0 = "seed checkpoint_interval gamma gae_lambda ent_coef vf_coef cagrad_c"
    check_numbers(args, may_be_0.split(), at_most_1=["gamma", "gae_lambda", "cagrad_c"])
    if args.envs_per_task * args.num_steps % args.num_minibatches:
        fail("--envs-per-task times --num-steps must divide into --num-minibatches")
    if args.envs_per_task * args.num_steps < 2:
        fail("--num-steps 1 with --envs-per-task 1 leaves one sample, which cannot be normalised")
    if args.freeze_theta and not args.load:
        fail("--freeze-theta needs a theta from --load")
    if args.run_name in (".", "..") or Path(args.run_name).name != args.run_name:
        fail(f"--run-name is the name of a folder below runs/, not {args.run_name!r}")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: PyTorch finds no CUDA device")


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run's folder."""
    check(args)
    envs = build(make, args.env_id, args.envs_per_task, args.tasks or None)
    eval_envs = build(make, args.env_id, args.eval_episodes, args.tasks or None)
    num_tasks, num_envs, num_steps = envs.num_tasks, args.envs_per_task, args.num_steps
    batch_size = num_tasks * num_envs * num_steps
    num_iterations = args.total_timesteps // batch_size
    if not num_iterations:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {batch_size} steps")
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
    agent.to(device)
    params = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, eps=1e-5, fused=True)
    loss_fn = torch.compile(objective) if args.compile else objective
    next_obs, _ = envs.reset(seed=spread_seeds(args.seed, 0, envs.num_envs))
    discounted = torch.zeros(num_tasks, num_envs, device=device)  # return so far, for --norm-reward
    episodes = np.zeros((3, num_tasks))  # since the last log: sum of returns, sum of lengths, count
    recent = np.full((2, num_tasks), np.nan)  # mean return and length at the last log that had an episode
    iteration, seconds = 0, 0.0
    if saved := run.checkpoint:
        iteration, seconds = saved["iteration"], saved["seconds"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.set_state(saved["rng"])
        episodes, recent = saved["episodes"].numpy(), saved["recent"].numpy()
        if saved["envs"] is None:  # these cannot be saved: new episodes
            next_obs, _ = envs.reset(seed=spread_seeds(args.seed, 1 + iteration, envs.num_envs))
        else:
            envs.set_state(saved["envs"])
            next_obs, discounted = saved["next_obs"].numpy(), saved["discounted"].to(device)
    run.start(iteration * batch_size, num_iterations * batch_size)

    # storage, (step, task, env, ...)
    obs = torch.zeros(num_steps, num_tasks, num_envs, next_obs.shape[-1], device=device)
    final_obs = torch.zeros_like(obs)  # the state that followed, the last one of its episode where that ended
    action_shape, dtype = envs.single_action_space.shape, torch.int64 if agent.discrete else torch.float32
    actions = torch.zeros(*obs.shape[:3], *action_shape, dtype=dtype, device=device)
    rewards, terminated, done = (np.zeros((num_steps, envs.num_envs), np.float32) for _ in range(3))

    def by_task(x: Tensor) -> Tensor:  # (step, task, env, ...) -> (task, sample, ...)
        return x.transpose(0, 1).flatten(1, 2)

    def by_step(x: Tensor) -> Tensor:  # (task, sample) -> (step, task, env)
        return x.view(num_tasks, num_steps, num_envs).transpose(0, 1)

    first_iteration, start_time, last_save = iteration + 1, time.perf_counter(), time.perf_counter()
    while iteration < num_iterations:
        iteration += 1
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations)

        # rollout with one set of weights
        with torch.no_grad():
            net = agent.unpack(agent.weights())
            action_noise = agent.action_noise(obs.shape[:3], rng)
            for t in range(num_steps):
                obs[t] = torch.from_numpy(next_obs).view(obs[t].shape)
                actions[t] = agent.act(net, obs[t], action_noise[t])
                step = envs.step(actions[t].flatten(0, 1).cpu().numpy())
                next_obs, rewards[t], terminated[t], truncated, infos = step
                done[t] = np.maximum(terminated[t], truncated)
                final_obs[t] = torch.from_numpy(infos.get("final_obs", next_obs)).view(obs[t].shape)
                if "final_info" in infos:
                    ended, episode = infos["_final_info"], infos["final_info"]["episode"]
                    sums = [np.where(ended, x, 0) for x in (episode["r"], episode["l"], 1)]
                    episodes += np.reshape(sums, (3, num_tasks, num_envs)).sum(2)

        # advantages and values of the rollout
        with torch.no_grad():
            r, term, end = (torch.from_numpy(x).to(device) for x in (rewards, terminated, done))
            r, term, end = (x.view(obs.shape[:3]) for x in (r, term, end))
            if args.norm_reward:
                r, discounted = scale_rewards(agent.return_stats, r, end, discounted, args.gamma)
            values, next_values = (agent.value(net, by_task(x)) for x in (obs, final_obs))
            steps = r, by_step(values), by_step(next_values), term, end
            advantages = by_task(gae(*steps, args.gamma, args.gae_lambda))
            returns = advantages + values
            if args.norm_adv:
                advantages = advantages - advantages.mean(1, keepdim=True)
                advantages /= advantages.std(1, keepdim=True) + 1e-8
            logprobs, _ = agent.log_prob_entropy(net, by_task(obs), by_task(actions))
            batch = Batch(by_task(obs), by_task(actions), logprobs, advantages, returns, values)

        # update
        stats = []
        for _ in range(args.update_epochs):
            order = torch.randperm(num_steps * num_envs, generator=rng, device=device)
            for inds in order.chunk(args.num_minibatches):
                minibatch = Batch(*(x.index_select(1, inds) for x in batch))
                weights = agent.weights()
                weights.retain_grad()  # (task, weight): the gradient of every task, in one backward pass
                loss, minibatch_stats = loss_fn(agent, weights, minibatch, args)
                optimizer.zero_grad()
                loss.backward()
                actor_and_critic = weights.grad[:, : len(agent.theta)].chunk(2, 1)
                agent.theta.grad = num_tasks * torch.cat([cagrad(g, args.cagrad_c) for g in actor_and_critic])
                nn.utils.clip_grad_norm_(params, args.max_grad_norm)
                optimizer.step()
                stats.append(minibatch_stats)

        # log a hundred times, print twenty times, save every checkpoint_interval seconds
        now, global_step, last = time.perf_counter(), iteration * batch_size, iteration == num_iterations
        stats = torch.stack(stats)
        if not all(x.isfinite().all() for x in (stats, *params)):
            run.close()
            sys.exit(f"{run.folder}: NaN or infinite loss at step {global_step}; earlier checkpoints stay")
        if iteration == first_iteration:  # the clock of SPS starts after the first iteration, which compiles
            clock_step, clock_time = global_step, now
        run.bar.update(batch_size)
        if iteration % max(1, num_iterations // 100) == 0 or last:
            new = episodes[2] > 0
            recent[:, new] = episodes[:2, new] / episodes[2, new]
            for name, x in zip(("charts/episodic_return", "charts/episodic_length"), recent, strict=True):
                run.log(global_step, name, x.mean(), np.where(new, x, np.nan))
            episodes[:] = 0
            run.log(global_step, "charts/SPS", (global_step - clock_step) / max(now - clock_time, 1e-9))
            run.log(global_step, "charts/wall_time", seconds + now - start_time)
            run.log(global_step, "charts/learning_rate", optimizer.param_groups[0]["lr"])
            for name, x in zip(STATS, stats.mean(0).tolist(), strict=True):
                run.log(global_step, f"losses/{name}", x)
            run.log(global_step, "losses/clipfrac_first_minibatch", stats[0, -1].item())
            unexplained, variance = (returns - values).var(1), returns.var(1)
            explained = (1 - unexplained.sum() / variance.sum(), (1 - unexplained / variance).tolist())
            run.log(global_step, "losses/explained_variance", *explained)
            for name, (per_task, overall) in method_metrics(agent, weights.grad).items():
                run.log(global_step, name, overall.item(), per_task.tolist())
        if iteration % max(1, num_iterations // 20) == 0 or last:
            run.show(global_step, recent[0])
        if run.stop or last or now - last_save >= args.checkpoint_interval:
            run.save(
                "checkpoint",
                iteration=iteration,
                seconds=seconds + now - start_time,
                agent=agent.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng.get_state(),
                envs=envs.get_state(),
                next_obs=torch.from_numpy(next_obs),
                discounted=discounted,
                episodes=torch.from_numpy(episodes),
                recent=torch.from_numpy(recent),
            )
            last_save = now
        if run.stop:
            run.close()
            print(f"stopped at step {global_step}: continue with --resume --run-name {run.folder.name}")
            sys.exit(128 + run.stop[0])

    # final evaluation: deterministic actions, environments of their own
    net = agent.unpack(agent.weights())
    seeds = spread_seeds(args.seed, 1, eval_envs.num_envs)
    returns, lengths = evaluate(lambda x: agent.greedy(agent.policy(net, x.to(device))), eval_envs, seeds)
    run.log(iteration * batch_size, "eval/episodic_return", returns.mean(), returns.mean(1))
    run.log(iteration * batch_size, "eval/episodic_length", lengths.mean(), lengths.mean(1))
    run.save("model", agent=agent.state_dict())
    run.finish(returns)
    return run.folder


if __name__ == "__main__":
    train(parse_args(Args, ENV_DEFAULTS, __doc__))
