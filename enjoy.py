"""Play a saved model of any script: returns per task with mean, sampled or ensemble weights, and films.

    python enjoy.py runs/NAME                                          # mean weights, 20 episodes per task
    python enjoy.py runs/NAME --weights ensemble --ensemble-size 5     # average of 5 draws of the weights
    python enjoy.py runs/NAME --tasks 0 3 --capture-video              # two of the tasks, filmed
    python enjoy.py models/goals10 --goal 0.37                         # a goal that was never trained
    python enjoy.py runs/NAME --export models/NAME                     # a small model to give away

The model names the script that wrote it, whose `Args` and `Agent` are used. Actions are deterministic. With
mean weights and the run's own seed and number of episodes the result is the run's own final evaluation.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from envs import make
from envs.cartpole import CartPole10
from envs.evaluation import greedy, play_episodes, spread_seeds
from envs.folders import find_run
from envs.generators import generators_of
from envs.models import POSTERIOR, mean_weights, read, save
from envs.settings import exit_on_bad_input, fail

ROOT = Path(__file__).resolve().parent
ENVS_PER_TASK = 50  # episodes of a task at a time
WEIGHTS_AT_A_TIME = 2**25  # and at most as many weights, 128 MB


@dataclass
class Args:
    """What to play."""

    run: tyro.conf.Positional[Path]  # folder of a finished run or of a saved model, or a model.pt
    weights: Literal["mean", "sample", "ensemble"] = "mean"  # the latter two are drawn for every episode
    ensemble_size: int = 5  # draws whose policies an ensemble averages
    episodes: int = 20  # per task
    tasks: tuple[int, ...] = ()  # indices of the environment's tasks; by default all that the model knows
    seed: int | None = None  # of the environments and of the weights drawn; by default the run's own
    goal: float | None = None  # in m, that no task has: weights regressed on the trained goals play it
    capture_video: bool = False  # film the first episode of every task, one by one and side by side
    video_dir: Path | None = None  # where to; by default videos/ in the run's folder
    export: Path | None = None  # instead of playing, write the mean weights alone to this new folder


def build(function: Callable, *args: Any) -> Any:
    """Environments for the user's input, which complaints are about."""
    try:
        return function(*args)
    except ValueError as error:
        fail(str(error))


def read_model(run: Path) -> dict[str, Any]:
    """The model of a run's folder, or in a file."""
    run = find_run(run)
    path = run / "model.pt" if run.is_dir() else run
    if not path.exists():
        unfinished = (run / "config.json").exists()
        fail(f"{path} does not exist" + unfinished * ": the run is not finished, continue it with --resume")
    return read(path, "model")


def load_script(name: str) -> ModuleType:
    """Import a script of this project by its path relative to the root."""
    path = (ROOT / name).resolve()
    if not path.is_file() or path.suffix != ".py" or not path.is_relative_to(ROOT):
        fail(f"the model needs the script {name}, which is not in {ROOT}")
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look up their annotations
    spec.loader.exec_module(script)
    return script


def read_args(model: dict[str, Any], script: ModuleType) -> Any:
    """The settings that a model was trained with, as the script's `Args`."""
    return script.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in model["args"].items()})


def load_agent(model: dict[str, Any], script: ModuleType, envs: gym.vector.VectorEnv) -> nn.Module:
    """The script's agent, of all the model's tasks, with the model's weights; without its sigma that is 0."""
    try:
        agent = script.Agent(envs, read_args(model, script), torch.Generator())
        missing = agent.state_dict().keys() & set(POSTERIOR) - model["agent"].keys()
        zeros = {name: torch.zeros_like(agent.state_dict()[name]) for name in missing}
        agent.load_state_dict(model["agent"] | zeros)
    except (TypeError, RuntimeError) as error:
        fail(f"the model does not fit today's {model['script']} ({' '.join(str(error).split())[:200]})")
    return agent.requires_grad_(False)


class Model:
    """A saved model in Python, with its mean weights.

    Attributes:
        env_id, task_names: what it was trained on.
        agent: the script's `Agent`, of all tasks; W: its weights by name, (task, ...).
    """

    def __init__(self, run: str | Path):
        """Read a run's folder, a folder of models/ or a model.pt, or raise an `InputError`."""
        model = read_model(Path(run))
        script = load_script(model["script"])
        self.env_id, self.task_names = model["args"]["env_id"], model["task_names"]
        suite = make(self.env_id, 1).task_names
        envs = make(self.env_id, 1, [suite.index(name) for name in self.task_names])
        self.action_space = envs.single_action_space
        self.agent = load_agent(model, script, envs)
        self.W = self.agent.unpack(self.agent.weights())

    def policy(self, obs: Tensor) -> Tensor:
        """Action probabilities, or Box actions: (task, sample, obs) -> (task, sample, action)."""
        return self.agent.policy(self.W, obs)

    def act(self, obs: np.ndarray, task: int | str) -> np.ndarray:
        """The deterministic action of a task, by row or name, at one observation (obs,).

        Box actions are in units in which the environment's bounds are -1 and 1, as those of `envs.make`.
        """
        m = self.task_names.index(task) if isinstance(task, str) else task
        x = torch.as_tensor(obs, dtype=torch.float32).expand(len(self.task_names), 1, -1)
        return greedy(self.policy(x)[m, 0], self.action_space).numpy()


def player(agent: nn.Module, rows: list[int], noise: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The policy for `play_episodes`: observations (task, env, obs) -> what `greedy` takes.

    The tasks are these rows of the agent's. With noise (draw, env, task, weight), for all the agent's tasks,
    every environment acts with the average policy of its own draws of the weights, without with the mean.
    """
    if noise is None:
        nets = [agent.unpack(agent.weights()[rows])]
    else:  # every environment is a task of its own: weights (task * env, weight)
        nets = [agent.unpack(agent.weights(draw)[:, rows].transpose(0, 1).flatten(0, 1)) for draw in noise]

    def policy(obs: Tensor) -> Tensor:
        x = obs if noise is None else obs.flatten(0, 1).unsqueeze(1)
        mean = torch.stack([agent.policy(W, x) for W in nets]).mean(0)
        return mean.flatten(0, 1).unflatten(0, obs.shape[:2])

    return policy


def interpolate(weights: Tensor, known: Sequence[float], wanted: Sequence[float], degree: int = 3) -> Tensor:
    """Weights at values of the tasks' parameter that were not trained, from those at values that were.

    Every weight is a polynomial of the parameter, by least squares over the trained tasks. What all tasks
    share stays as it is.

    Args:
        weights: (task, weight), as `Agent.weights()`.
        known: the parameter of each of these tasks.
        wanted: its values to play.

    Returns:
        (wanted, weight).
    """
    scale = max(map(abs, known))
    known, wanted = (torch.tensor(x, dtype=torch.float64) / scale for x in (known, wanted))
    solution = torch.linalg.lstsq(torch.vander(known, degree + 1), weights.double()).solution
    return (torch.vander(wanted, degree + 1) @ solution).to(weights.dtype)


def trained_tasks(model: dict[str, Any], names: list[str]) -> list[int]:
    """Indices of the model's tasks among those of its environment."""
    if lost := [name for name in model["task_names"] if name not in names]:
        fail(f"the model was trained on {lost[0]}, a task that {model['args']['env_id']} no longer has")
    return [names.index(name) for name in model["task_names"]]


def folder_of_films(args: Args) -> Path:
    """Where films go."""
    run = find_run(args.run)
    return args.video_dir or (run if run.is_dir() else run.parent) / "videos"


def play_goal(args: Args) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, list[Path]]:
    """As `play`, of the one task that is the model's with another goal, with interpolated weights."""
    model = read_model(args.run)
    script, env_id = load_script(model["script"]), model["args"]["env_id"]
    suite = build(make, env_id, 1)
    trained = trained_tasks(model, suite.task_names)
    params = [suite.task_params[task] for task in trained]
    alike = all({**x, "goal": 0} == {**params[0], "goal": 0} for x in params)
    if not (isinstance(suite.unwrapped, CartPole10) and suite.reward and alike):
        fail(f"--goal is for CartPoles that differ by their goals only, not for {env_id}")
    if args.weights != "mean" or args.tasks:
        fail("--goal plays mean weights of no task that was trained: leave out --weights and --tasks")
    if len(trained) < 5:
        fail(f"--goal needs a model of 5 tasks or more, not {len(trained)}")
    if not abs(args.goal) < 2.4:
        fail(f"--goal must lie on the track, between -2.4 and 2.4 m, not {args.goal}")
    agent = load_agent(model, script, build(make, env_id, 1, trained))
    W = agent.unpack(interpolate(agent.weights(), [x["goal"] for x in params], [args.goal]))
    envs = make(env_id, args.episodes, trained[:1])
    envs.goal[:] = args.goal
    seeds = spread_seeds(model["args"]["seed"] if args.seed is None else args.seed, 1, args.episodes)
    names, films = [f"goal{args.goal:+g}"], []
    if args.capture_video:
        from envs.video import film, open_stages  # needs packages that playing does not

        stages = build(open_stages, env_id, trained[:1])
        stages[0].unwrapped.goal = args.goal
        films, _ = film(lambda obs: agent.policy(W, obs), stages, names, seeds, folder_of_films(args))
    return names, *play_episodes(lambda obs: agent.policy(W, obs), envs, seeds), films


def play(args: Args) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, list[Path]]:
    """Play and film; names of the tasks, `Evaluation` (task, episode), and the films' paths."""
    for name, least in (("episodes", 1), ("ensemble_size", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if args.goal is not None:
        return play_goal(args)
    if args.capture_video:
        from envs.video import draw_without_screen, film, open_stages  # needs packages that playing does not

        draw_without_screen()
    model = read_model(args.run)
    script, env_id = load_script(model["script"]), model["args"]["env_id"]
    suite = build(make, env_id, 1).task_names
    trained = trained_tasks(model, suite)
    tasks = list(args.tasks) or trained
    if not set(tasks) <= set(trained):
        fail(f"--tasks must be of those that the model was trained on, {trained}, not {tasks}")
    rows = [trained.index(task) for task in tasks]

    def make_envs(envs_per_task: int, tasks: list[int]) -> gym.vector.VectorEnv:
        return build(make, env_id, envs_per_task, None if tasks == list(range(len(suite))) else tasks)

    agent = load_agent(model, script, make_envs(1, trained))
    if args.weights != "mean" and not hasattr(agent, "sigma"):
        fail(
            f"--weights {args.weights} needs a distribution of weights, which {model['script']} does not have"
        )
    if args.weights != "mean" and "sigma" not in model["agent"]:
        fail(f"--weights {args.weights} needs sigma: {args.run} has mean weights only")
    names = make_envs(1, tasks).task_names
    stages = build(open_stages, env_id, tasks) if args.capture_video else []
    torch.set_num_threads(model["args"]["num_threads"])

    # Seeds and noise are drawn for all tasks of the model and episode after episode, so that an episode is
    # the same whichever tasks are played, and however many of the episodes at a time.
    seed = model["args"]["seed"] if args.seed is None else args.seed
    seeds = np.reshape(spread_seeds(seed, 1, len(trained) * args.episodes), (len(trained), -1))[rows]
    rng = torch.Generator().manual_seed(seed)
    draws, at_a_time = {"mean": 0, "sample": 1, "ensemble": args.ensemble_size}[args.weights], ENVS_PER_TASK
    if draws:
        at_a_time = max(1, min(at_a_time, WEIGHTS_AT_A_TIME // (agent.weights().numel() * draws)))
    results, films = [], []
    for start in range(0, args.episodes, at_a_time):
        part, noise = seeds[:, start : start + at_a_time], None
        if draws:  # (draw, env, task, weight)
            noise = [torch.stack([agent.draw_noise(rng) for _ in range(draws)]) for _ in part[0]]
            noise = torch.stack(noise, 1)
        if stages and start == 0:
            policy = player(agent, rows, noise if noise is None else noise[:, :1])
            films, _ = film(policy, stages, names, seeds[:, 0].tolist(), folder_of_films(args))
        with generators_of(seed, 1 + start):  # as in the run's own evaluation
            env = make_envs(part.shape[1], tasks)
            results.append(play_episodes(player(agent, rows, noise), env, part.flatten().tolist()))
            env.close()
    return names, *(np.concatenate(x, axis=1) for x in zip(*results)), films


def export(args: Args) -> None:
    """Write a model of mean weights only."""
    if args.goal is not None:
        fail("--export writes what was trained: leave out --goal")
    path = args.export / "model.pt"
    if path.exists():
        fail(f"{path} exists")
    model = mean_weights(read_model(args.run))
    args.export.mkdir(parents=True, exist_ok=True)
    save(path, "model", model)
    print(f"saved  {path}, {path.stat().st_size / 1e6:.1f} MB")


def main(args: Args) -> None:
    """Play and print, or export."""
    if args.export:
        return export(args)
    names, returns, lengths, successes, films = play(args)
    weights = {"mean": "mean weights", "sample": "sampled weights"}.get(
        args.weights, f"ensembles of {args.ensemble_size} sampled weights"
    )
    if args.goal is not None:
        weights = "weights interpolated between the goals that were trained"
    print(f"{args.run}: {args.episodes} episodes per task, {weights}, deterministic actions")
    head = f"{'task':>24} {'return':>9} {'std':>8} {'min':>8} {'max':>8} {'length':>8}"
    reported = not np.isnan(successes).all()  # few environments do
    print(f"{head} {'success':>8}" if reported else head)
    for i, name in enumerate([*names, "mean over tasks"]):
        of = slice(i, i + 1) if i < len(names) else slice(None)
        x, length = returns[of].mean(0), lengths[of].mean()
        row = f"{name:>24} {x.mean():9.1f} {x.std():8.1f} {x.min():8.1f} {x.max():8.1f} {length:8.1f}"
        print(f"{row} {np.nanmean(successes[of]):8.0%}" if reported else row)
    for path in films:
        print(f"film  {path}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    with exit_on_bad_input():
        main(args)
