"""What the tests of the scripts share; tiny environments with a known answer, after Andy Jones' probes."""

import copy
import csv
import importlib.util
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from matplotlib.figure import Figure
from torch.distributions import Categorical, Independent, Normal

import envs
from envs.settings import parse_args

ROOT = Path(__file__).resolve().parents[1]


def _scripts(*patterns):
    """Paths below ROOT."""
    return tuple(str(path.relative_to(ROOT)) for x in patterns for path in sorted(ROOT.glob(x)))


TRUNKS, SAC_SCRIPTS = ("varshare_ppo.py",), ("varshare_sac.py",)
SIBLINGS, SAC_SIBLINGS = _scripts("baselines/*_ppo.py"), _scripts("baselines/*_sac.py")
SCRIPTS = TRUNKS + SIBLINGS
VARIANTS = _scripts("variants/*_ppo.py", "studies/*/*_ppo.py")
SAC_VARIANTS = _scripts("variants/*_sac.py", "studies/*/*_sac.py")
VMPO_SCRIPTS = _scripts("variants/*_vmpo.py", "baselines/*_vmpo.py")
ALL_SCRIPTS = SCRIPTS + SAC_SCRIPTS + SAC_SIBLINGS + VARIANTS + SAC_VARIANTS + VMPO_SCRIPTS

LONG = ("baselines/soft_modularization_ppo.py", "baselines/moore_ppo.py")  # twice as long as the others
QUICK = tuple(x for x in SCRIPTS + SAC_SCRIPTS if x not in LONG)


def slow_but(quick, names):
    """Parameters of a test, of which those that are not quick run in .ci/run alone."""
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in names]


# Processes of their own fork from one that has the slow imports behind it
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["gymnasium", "torch._dynamo", "torch.utils.tensorboard", "tyro"])

# A run of ten iterations on cartpole10 that takes less than a second
SMALL = {
    "env_id": "cartpole10",
    "total_timesteps": 25_600,
    "num_steps": 32,
    "hidden_sizes": (16,),
    "eval_episodes": 2,
    "checkpoint_interval": 1e9,
    "run_name": "small",
}
# A run on cartpole10 whose buffer is full, and came round
SMALL_SAC = {
    "env_id": "cartpole10",
    "total_timesteps": 2_000,
    "learning_starts": 20,
    "hidden_sizes": (16,),
    "actor_width": 16,
    "critic_width": 16,
    "num_atoms": 21,
    "batch_size": 16,
    "buffer_size": 40,
    "eval_episodes": 2,
    "checkpoint_interval": 1e9,
    "run_name": "small",
}


def load_script(name):
    """Import a script by its path below the project's root, or by its file's name without "varshare_"."""
    path = ROOT / name
    if not path.exists():
        (path,) = [ROOT / x for x in ALL_SCRIPTS if Path(x).stem == f"varshare_{name}"]
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def stem(script):
    """ "varshare_ppo"."""
    return Path(script.__file__).stem


def is_sac(script):
    """Whether its base algorithm is SAC."""
    return stem(script).endswith("_sac")


def parse(script, *argv):
    """What `python script.py *argv` reads as its settings."""
    sys.argv = [script.__file__, *argv]
    return parse_args(script.make_args, script.__doc__)


def main(script, *argv):
    """What `python script.py *argv` does, in this process."""
    sys.argv = [script.__file__, *argv]
    return script.run_command(script.train, script.make_args, script.__doc__)


def flags(settings):
    """Settings as command line arguments, all in one form: --name=value for numbers and names."""
    argv = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{option}" if value else f"--no-{option}")
        else:
            argv += [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return argv


# Agents and batches

TASKS, OBS, HIDDEN = 3, 5, (7, 6)
DISCRETE, BOX = gym.spaces.Discrete(4), gym.spaces.Box(-1.0, 1.0, (2,))
BOTH = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["Discrete", "Box"])


def settings(script, **changes):
    """Settings of a small agent."""
    size = {"hidden_sizes": HIDDEN, "num_steps": 9, "envs_per_task": 2, "sigma_prior": 0.3}
    return script.Args(**{k: v for k, v in size.items() if hasattr(script.Args, k)} | changes)


def spaces(space=DISCRETE, num_tasks=TASKS, obs_dim=OBS):
    """What an agent wants to know of an environment."""
    discrete = isinstance(space, gym.spaces.Discrete)
    return SimpleNamespace(
        num_tasks=num_tasks,
        envs_per_task=2,
        discrete=discrete,
        obs_dim=obs_dim,
        act_dim=int(space.n) if discrete else space.shape[0],
        single_observation_space=gym.spaces.Box(-1.0, 1.0, (obs_dim,)),
        single_action_space=space,
    )


def make_agent(script, space=DISCRETE, dtype=torch.float64, **changes):
    """An agent whose weights are all different from 0 and from each other."""
    rng = torch.Generator().manual_seed(1)
    agent = script.Agent(spaces(space), settings(script, **changes), rng).to(dtype)
    with torch.no_grad():
        for x in agent.parameters():
            x += 0.3 * torch.randn(x.shape, generator=rng)
        if isinstance(getattr(agent, "sigma", None), torch.Tensor):
            agent.sigma.uniform_(0.05, 0.4, generator=rng)
    return agent


@torch.no_grad()
def target_of(agent, distance=0.1):
    """A target of SAC, whose weights are at some distance from the agent's."""
    rng, target = torch.Generator().manual_seed(2), copy.deepcopy(agent).requires_grad_(False)
    for x in target.parameters():
        x += distance * torch.randn(x.shape, generator=rng)
    return target


@torch.no_grad()
def random_batch(script, agent, samples, seed=0):
    """Random samples for PPO, whose actions were drawn from an older policy."""
    rng, weights = torch.Generator().manual_seed(seed), agent.weights()

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=weights.dtype)

    obs = randn(TASKS, samples, OBS)
    old = agent.unpack(weights + 0.1 * randn(*weights.shape))
    policy = agent.distribution(old, agent.actor(old, obs))
    actions = policy.sample(randn(TASKS, samples, agent.act_dim))
    logprobs, _ = policy.log_prob_entropy(actions)
    returns = agent.critic(old, obs) + randn(TASKS, samples)
    return script.Batch(obs, actions, logprobs, randn(TASKS, samples), returns)


def random_transitions(script, agent, samples, seed=0):
    """Random samples for SAC; the second half of them ended by termination."""
    rng = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, TASKS, samples, OBS, generator=rng).double()
    if agent.discrete:
        actions = torch.randint(agent.act_dim, (TASKS, samples), generator=rng)
    else:
        actions = torch.rand(TASKS, samples, agent.act_dim, generator=rng).double() * 2 - 1
    rewards = torch.randn(TASKS, samples, generator=rng).double()
    terminated = (torch.arange(samples) >= samples // 2).double().expand(TASKS, -1)
    noise = torch.randn(2, TASKS, samples, agent.act_dim, generator=rng).double()
    return script.Batch(obs, next_obs, actions, rewards, terminated, noise)


def draws(agent, seed=0):
    """What `minibatch_backward` of a method wants of randomness, if anything."""
    rng, dtype = torch.Generator().manual_seed(seed), agent.weights().dtype
    names = (name for name in ("draw_noise", "draw_keys") if hasattr(agent, name))
    return [getattr(agent, name)(rng).to(dtype) for name in names]


def gradients(script, agent, *inputs):
    """The gradients that `minibatch_backward` leaves, by name of the parameter; and what it returns."""
    agent.zero_grad()
    returned = script.minibatch_backward(agent, *inputs)
    grads = {name: x.grad for name, x in agent.named_parameters() if x.grad is not None}
    for name, x in grads.items():  # fused Adam takes what is not contiguous for something else
        assert x.is_contiguous(), name
    return {name: x.clone() for name, x in grads.items()}, returned


def update(script, agent, args, batch, optimizer=None):
    """An update phase of PPO, by gradient descent and always with the same draws."""
    optimizer = optimizer or torch.optim.SGD(agent.parameters(), lr=0.01)
    rng = torch.Generator().manual_seed(0)
    return script.update(agent, optimizer, batch, script.minibatch_backward, args, rng)


def normalised(x, agent, net):
    """With --norm-critic the layer normalisation of the critic's x (..., feature), by its formula."""
    if net == "actor" or not getattr(agent, "norm_critic", False):
        return x
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def moore_by_hand(agent, W, net, obs):
    """Outputs (sample, out) of a task of MOORE, sample by sample; its experts made orthonormal by a QR."""
    outputs = []
    for x in obs:
        experts = []
        for k in range(agent.num_experts):
            u = x
            for i in range(len(HIDDEN)):
                u = W[f"{net}.{i}.weight"][k] @ u + W[f"{net}.{i}.bias"][k]
                if i < len(HIDDEN) - 1:
                    u = normalised(u, agent, net).relu()
            experts.append(u)
        q, r = torch.linalg.qr(torch.stack(experts, 1))
        v = q * r.diagonal().sign()
        last = f"{net}.{len(HIDDEN)}"
        outputs.append(W[f"{last}.weight"] @ (v @ W[f"{net}.w"]).tanh() + W[f"{last}.bias"])
    return torch.stack(outputs)


def soft_modularization_by_hand(agent, W, net, obs):
    """Outputs (sample, out) of a task of Soft Modularization, sample by sample and module by module."""

    def layer(name, x, j=...):
        return W[f"{net}.{name}.weight"][j] @ x + W[f"{net}.{name}.bias"][j]

    outputs, (_, num_layers), n = [], agent.sizes, agent.num_modules
    for x in obs:
        for i in range(len(HIDDEN)):
            x = normalised(layer(i, x.relu() if i else x), agent, net)
        e = layer("gate.1", layer("gate.0", (x * W[f"{net}.embedding"]).relu()).relu())
        inputs, past = [x.relu()] * n, []
        for number in range(num_layers):
            condition = e * layer(f"past.{number}", torch.cat(past)) if past else e
            rows = layer(f"route.{number}", condition.relu()).split(n)  # one for each target
            rows = [row.exp() / row.exp().sum() for row in rows]
            past.append(torch.cat(rows))
            h = [layer(f"modules.{number}", inputs[j], j) for j in range(n)]
            inputs = [sum(row[j] * h[j] for j in range(n)).relu() for row in rows]
        (last,) = inputs
        outputs.append(layer("out", last))
    return torch.stack(outputs)


BY_HAND = {"num_experts": moore_by_hand, "num_modules": soft_modularization_by_hand}  # by an attribute


def forward_task_by_task(agent, weights, obs):
    """Actor's outputs (task, sample, out), values (task, sample), logstd (task, action), by a plain loop."""
    for network in (BY_HAND[name] for name in BY_HAND if hasattr(agent, name)):
        W = agent.unpack(weights)
        rows = [{name: x[m] for name, x in W.items()} for m in range(TASKS)]
        both = ([network(agent, W, net, x) for W, x in zip(rows, obs)] for net in ("actor", "critic"))
        actor, critic = map(torch.stack, both)
        return actor, critic.squeeze(2), W.get("logstd", weights[:, :0])
    layers = [(net, i) for net in ("actor", "critic") for i in range(len(HIDDEN) + 1)]
    if hasattr(agent, "heads"):  # the output layers stand behind all others
        layers.sort(key=lambda layer: layer[1] == len(HIDDEN))
    actor, critic, logstd = [], [], []
    for row, x in zip(weights, obs, strict=True):
        params = {}
        for net, i in layers:
            sizes = [x.shape[-1], *HIDDEN, agent.act_dim if net == "actor" else 1]
            n_in, n_out = sizes[i : i + 2]
            w, b, row = row[: n_out * n_in], row[n_out * n_in :][:n_out], row[n_out * (n_in + 1) :]
            params[net, i] = w.view(n_out, n_in), b
        for net, outputs in (("actor", actor), ("critic", critic)):
            hidden = x
            for i in range(len(HIDDEN)):
                hidden = normalised(F.linear(hidden, *params[net, i]), agent, net).relu()
            outputs.append(F.linear(hidden, *params[net, len(HIDDEN)]))
        logstd.append(row[: agent.act_dim * (not agent.discrete)])
    return torch.stack(actor), torch.stack(critic).squeeze(2), torch.stack(logstd)


def networks(agent, obs, noise=0.0):
    """Weights of a plain network of each task (task, weight), and its inputs, by each method's formula."""
    if hasattr(agent, "embedding"):
        embedding = agent.embedding.unsqueeze(1).expand(-1, obs.shape[1], -1)
        return agent.theta.expand(TASKS, -1), torch.cat((obs, embedding), 2)
    if hasattr(agent, "embeddings"):
        return torch.stack([torch.cat((agent.theta, z)) for z in agent.embeddings]), obs
    if hasattr(agent, "w"):
        return torch.stack([sum(w * theta for w, theta in zip(ws, agent.theta)) for ws in agent.w]), obs
    if hasattr(agent, "heads"):
        return torch.stack([torch.cat((agent.theta, head)) for head in agent.heads]), obs
    if hasattr(agent, "mu"):
        return agent.theta + agent.mu + getattr(agent, "sigma", 0.0) * noise, obs
    return agent.theta.expand(TASKS, -1), obs


def losses_task_by_task(agent, weights, b, args):
    """PPO's loss and statistics of each task from the papers' formulas, by torch.distributions."""
    out, values, logstd = forward_task_by_task(agent, weights, b.obs)
    losses, stats = [], []
    for m in range(TASKS):
        if agent.discrete:
            policy = Categorical(logits=out[m])
        else:
            policy = Independent(Normal(out[m], logstd[m].exp()), 1)
        log_ratio = policy.log_prob(b.actions[m]) - b.logprobs[m]
        ratio, advantages, eps = log_ratio.exp(), b.advantages[m], args.clip_coef
        above, below = ratio > 1 + eps, ratio < 1 - eps
        clipped = torch.where(above, 1 + eps, torch.where(below, 1 - eps, ratio))
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        value_loss, entropy = 0.5 * (values[m] - b.returns[m]).square().mean(), policy.entropy().mean()
        losses.append(policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy)
        kl = ratio - 1 - log_ratio, (above | below).double()
        stats.append((policy_loss, value_loss, entropy, -log_ratio.mean(), *(x.mean() for x in kl)))
    names = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
    return torch.stack(losses), {f"losses/{x}": torch.stack(y).detach() for x, y in zip(names, zip(*stats))}


# Runs


def load(folder, name="model"):
    """Content of model.pt or checkpoint.pt."""
    return torch.load(folder / f"{name}.pt", weights_only=True)


def load_agent(script, folder):
    """The trained agent of a run, and its mean weights by name."""
    model = load(folder)
    args = script.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in model["args"].items()})
    agent = script.Agent(
        envs.make(args.env_id, args.envs_per_task, args.tasks or None), args, torch.Generator()
    )
    agent.load_state_dict(model["agent"])
    agent.requires_grad_(False)
    return agent, agent.unpack(agent.weights())


def read_heartbeat(folder):
    """Rows (step, metric, task, value as text) of heartbeat.csv without its header."""
    with open(folder / "heartbeat.csv", newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    assert rows[0] == ("global_step", "metric", "task", "value")
    return rows[1:]


def evaluation(folder):
    """Returns of the final evaluation by task, and their "mean"."""
    rows = read_heartbeat(folder)
    return {row[2]: float(row[3]) for row in rows if row[1] == "eval/episodic_return"}


def assert_same_runs(folder, reference):
    """Weights bit for bit, and every number logged except the times."""
    agent, expected = load(folder)["agent"], load(reference)["agent"]
    assert agent.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all() and torch.equal(agent[name], value), name
    logs = [
        [row for row in read_heartbeat(f) if row[1] not in ("charts/SPS", "charts/wall_time")]
        for f in (folder, reference)
    ]
    assert logs[0] == logs[1]
    rows = [row[:3] for row in read_heartbeat(folder)]
    assert len(set(rows)) == len(rows)


def run_and_kill(script_name, settings, folder, moment=None, save=1, signum=signal.SIGKILL, times=1):
    """A run in a process of its own that gets `signum` at its `save`-th save: the target of a Process.

    moment: "half" with half the file written, "before" and "after" its renaming, None no signal.
    Output goes to `folder`/output.
    """
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    count, replace = itertools.count(1), os.replace

    def replace_and_kill(source, target):
        due = moment and str(target).endswith(".pt") and next(count) == save
        if due and moment == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        for _ in range(times if due and moment != "after" else 0):
            os.kill(os.getpid(), signum)
        replace(source, target)
        if due and moment == "after":
            os.kill(os.getpid(), signum)

    os.replace = replace_and_kill
    script = load_script(script_name)
    script.train(script.Args(**settings))


class Probe(gym.vector.VectorEnv):
    """Episodes of `length` steps, without physics; a subclass says what is seen and what is rewarded.

    Attributes:
        context: (n,) -1 or 1, drawn anew for every episode.
        t: (n,) steps so far.
        task: (n,) number of the task.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    seeds = []  # of all resets of all probes
    num_tasks, length, truncates = 1, 1, False
    single_observation_space = gym.spaces.Box(-10.0, 10.0, (1,))
    single_action_space = gym.spaces.Discrete(2)

    def __init__(self, num_envs=1):
        self.num_envs = num_envs
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.task = np.arange(num_envs) * self.num_tasks // num_envs

    def observe(self):
        return np.zeros(self.num_envs)

    def reward(self, actions):
        return np.ones(self.num_envs)

    def _draw(self):
        return self.rng.choice([-1.0, 1.0], self.num_envs)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.rng = np.random.default_rng(seed)
        self.t, self.context = np.zeros(self.num_envs), self._draw()
        return self.observe()[:, None].astype(np.float32), {}

    def step(self, actions):
        rewards = self.reward(actions)
        self.t += 1
        done = self.t >= self.length
        infos = {"final_obs": self.observe()[:, None].astype(np.float32), "_final_obs": done}
        self.t[done] = 0
        self.context = np.where(done, self._draw(), self.context)
        never, infos = np.zeros_like(done), infos if done.any() else {}
        ends = (never, done) if self.truncates else (done, never)
        return self.observe()[:, None].astype(np.float32), rewards, *ends, infos


class ConstantReward(Probe):
    """One step, reward 1, 2 and 3 in the three tasks: so the values."""

    num_tasks = 3

    def reward(self, actions):
        return self.task + 1.0


class RewardOfObservation(Probe):
    """One step, the reward is the observation: so the value."""

    def observe(self):
        return self.context

    def reward(self, actions):
        return self.context


class DelayedReward(Probe):
    """Nothing, then 1: the values are gamma and 1."""

    length = 2

    def observe(self):
        return self.t

    def reward(self, actions):
        return self.t.copy()


class RewardOfAction(Probe):
    """Reward 1 for action 1 and -1 for action 0."""

    def reward(self, actions):
        return 2.0 * actions - 1


class RewardOfBoth(Probe):
    """Reward 1 for action 1 where the observation is positive and 0 where it is negative, else -1."""

    def observe(self):
        return self.context

    def reward(self, actions):
        return self.context * (2 * actions - 1)


class RewardOfForce(Probe):
    """Reward -(force - observation)^2: the best force is the observation."""

    single_action_space = gym.spaces.Box(-4.0, 4.0, (1,))

    def observe(self):
        return self.context

    def reward(self, actions):
        return -np.square(actions[:, 0] - self.context)


class Truncated(Probe):
    """Four times the reward -1 or 1, seen before, then cut: the values are those of going on forever."""

    length, truncates = 4, True

    def observe(self):
        return self.context

    def reward(self, actions):
        return self.context


class Terminated(Truncated):
    """The same, but it ends there; the step is seen."""

    truncates = False

    def observe(self):
        return self.context * (1 + self.t)


class Opposites(Probe):
    """Nothing to see; action 1 is wrong in the first task, of small rewards, and right in the second."""

    num_tasks = 2

    def reward(self, actions):
        return np.where(actions == self.task, 1.0, -1.0) * np.where(self.task == 0, 0.001, 1.0)


class TurnsToNaN(Probe):
    """The reward is 1 for 80 steps, and the one in which it is tried out, NaN from then on."""

    steps = 0

    def reward(self, actions):
        self.steps += 1
        return np.full(self.num_envs, 1.0 if self.steps <= 81 else np.nan)


for _probe in (*Probe.__subclasses__(), Terminated):
    gym.register(_probe.__name__, vector_entry_point=_probe)


PROBE = {
    "beta": 0.001,  # a prior so weak, and a penalty, that what is learned is the environment
    "l2_coef": 0.005,
    "num_steps": 16,
    "envs_per_task": 16,
    "hidden_sizes": (16,),
    "learning_rate": 0.01,
    "eval_episodes": 2,
    "run_name": "probe",
}
PROBE_SAC = {
    "beta": 1e-12,
    "l2_coef": 1e-9,
    "envs_per_task": 4,
    "learning_starts": 50,
    "hidden_sizes": (32,),
    "batch_size": 64,
    "learning_rate": 0.01,
    "tau": 0.2,
    "reward_scale": 1.0,
    "target_entropy": 0.1,
    "eval_episodes": 2,
    "run_name": "probe",
}


def learn(script, env_id, rollouts=40, **changes):
    """Train on a probe; returns a function that tells the values and the policy, and the folder.

    The function takes observations and, of SAC with continuous actions, actions. Values are SAC's of every
    action by its first critic. SAC takes 300 steps.
    """
    num_tasks = gym.spec(env_id).vector_entry_point.num_tasks
    probe = PROBE_SAC if is_sac(script) else PROBE
    probe = {name: x for name, x in probe.items() if hasattr(script.Args, name)}
    probe["total_timesteps"] = (4 * 300 if is_sac(script) else rollouts * 16 * 16) * num_tasks
    folder = script.train(script.Args(**probe | {"env_id": env_id} | changes))
    agent, W = load_agent(script, folder)

    def at(*observations, actions=None):
        inputs = [
            torch.tensor(x).view(1, -1, 1).expand(num_tasks, -1, 1) for x in (observations, actions) if x
        ]
        values = agent.critics(W, *inputs)[0] if is_sac(script) else agent.critic(W, inputs[0])
        return values.numpy(), agent.policy(W, inputs[0])[..., -1].numpy()

    return at, folder


def small_args(script, **changes):
    """Settings of a small run on cartpole10."""
    small = SMALL_SAC if is_sac(script) else SMALL
    small = {setting: x for setting, x in small.items() if hasattr(script.Args, setting)}
    return script.Args(**small | changes)


def run(script, name="run", **changes):
    """A small run on cartpole10; returns its folder."""
    return script.train(small_args(script, **{"run_name": name} | changes))


def check_figure(figure):
    """Axes are labelled, those that share one once; legends lie outside the data, words within the page."""
    title = figure.get_suptitle()
    assert title
    figure.draw_without_rendering()
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    for ax in figure.axes:
        name = f"{title}: {ax.get_title()}"
        parents = (figure, ax.get_figure(root=False))
        labels_y = [x.get_ylabel() for x in ax.get_shared_y_axes().get_siblings(ax)]
        assert any(labels_y) or any(x.get_supylabel() for x in parents), f"no label of y, {name}"
        if ax.get_label() != "<colorbar>":
            labels_x = [x.get_xlabel() for x in ax.get_shared_x_axes().get_siblings(ax)]
            assert any(labels_x) or any(x.get_supxlabel() for x in parents), f"no label of x, {name}"
        assert ax.get_legend() is None, f"a legend among the data, {name}"
        for legend in legends:
            assert not legend.get_window_extent().overlaps(ax.get_window_extent()), name
    for words in (*figure.texts, *legends):
        low, high = words.get_window_extent().intervalx
        assert 0 <= low and high <= figure.bbox.width, f"wider than the page: {title}"


def check_all_figures(monkeypatch):
    """From now on every figure is checked before it is written."""
    write = Figure.savefig

    def savefig(figure, *args, **options):
        check_figure(figure)
        write(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
