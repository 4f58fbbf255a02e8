"""Settings of a run: what every script has beside its algorithm's, what an environment needs, and the checks.

@dataclass
class Args(RunArgs):  # a script's own settings on top
    gamma: UnitFloat = 0.99  # discount

make_args = args_maker(Args, "ppo", {})  # in Python: train(make_args("cartpole10", seed=2))

if __name__ == "__main__":
    run_command(train, make_args, __doc__)
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch
import tyro

from envs.types import BOUNDS, NonNegativeFloat, NonNegativeInt, PositiveInt


@dataclass
class RunArgs:
    """The bookkeeping of a run, the same for every algorithm. A script's `Args` extends it."""

    tasks: tuple[int, ...] = ()  # train on these tasks of the environment only, e.g. --tasks 0 2 5
    eval_episodes: PositiveInt = 20  # episodes per task of the evaluation of the final policy
    eval_interval: NonNegativeInt = 0  # steps between evaluations during training, 0: none
    eval_interval_episodes: PositiveInt = 20  # episodes per task of these
    exp_name: str = ""  # name of the experiment, by default the script's
    run_name: str = ""  # folder below runs/; by default {env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # continue the run of the same settings from its checkpoint; without one, start it
    checkpoint_interval: NonNegativeFloat = 30.0  # seconds between checkpoints
    num_threads: PositiveInt = 1  # CPU threads
    env_workers: PositiveInt = 1  # processes that step the environments, each those of whole tasks
    cuda: bool = False  # train on the GPU; meant for networks much larger than the default
    compile: bool = False  # torch.compile the update: needs a C++ compiler, starts some 20 s later
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "varshare"  # project there
    wandb_entity: str = ""  # team there, by default one's own
    capture_video: bool = False  # film every task with the final policy -> videos/ in the run's folder


# what an environment needs, for every method of a base algorithm alike; flags on the command line win
_LANDER = dict(total_timesteps=8_000_000, envs_per_task=4, gamma=0.999, norm_reward=True, ent_coef=0.01)
_LANDER |= dict(eval_interval_episodes=5)
_LANDER_GOALS = ("lunarlander20-goals", "lunarlander20-goals-continuous")
_LANDER_SAC = dict(total_timesteps=800_000, envs_per_task=4, updates_per_step=4.0, batch_size=64)
_LANDER_SAC |= dict(learning_rate=2e-3, gamma=0.995, target_entropy=1.0, eval_interval_episodes=5)
_DISCRETE_LANDER_SAC = _LANDER_SAC | dict(gamma=0.99, target_entropy=0.08, critics="mean")
_METAWORLD = dict(total_timesteps=20_000_000, eval_episodes=50, eval_interval_episodes=5)
_METAWORLD_PPO = _METAWORLD | dict(learning_rate=1e-3, anneal_lr=False, hidden_sizes=(128, 128))
_METAWORLD_PPO |= dict(envs_per_task=4, num_steps=500, num_minibatches=8, update_epochs=8, gae_lambda=0.97)
_METAWORLD_PPO |= dict(norm_critic=True, norm_obs=True, norm_value=True)
_METAWORLD_SAC = _METAWORLD | dict(learning_rate=3e-4, buffer_size=100_000, learning_starts=4_000, tau=0.005)
_METAWORLD_SAC |= dict(reward_scale=1.0, target_entropy=1.0, alpha_init=1.0, hidden_sizes=(400, 400, 400))

ENVIRONMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "ppo": {
        **{f"cartpole-goals{x}": dict(norm_value=True) for x in (10, 20, 40, 80, 160)},
        **{f"cartpole-goals{x}": dict(norm_value=True) for x in ("10-sparse", "10-continuous", "-physics10")},
        **dict.fromkeys(("lunarlander20", "lunarlander20-continuous"), _LANDER),
        **dict.fromkeys(_LANDER_GOALS, _LANDER | dict(total_timesteps=2_000_000, norm_value=True)),
        **dict.fromkeys(("mt10", "mt10-reward-v1", "mt50"), _METAWORLD_PPO),
    },
    "sac": {
        "cartpole-goals10-continuous": dict(target_entropy=1.0),
        **dict.fromkeys(("lunarlander20", "lunarlander20-goals"), _DISCRETE_LANDER_SAC),
        **dict.fromkeys(("lunarlander20-continuous", "lunarlander20-goals-continuous"), _LANDER_SAC),
        **dict.fromkeys(("mt10", "mt10-reward-v1", "mt50"), _METAWORLD_SAC),
    },
}


class InputError(ValueError):
    """Bad input, with one line on what is wrong; the command line prints it and exits with code 2."""


def fail(message: str) -> NoReturn:
    """Refuse the input: raises `InputError`."""
    raise InputError(message)


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """For the command line: an `InputError` becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # which may be ASCII's, where a task has a Greek name
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def args_maker(args_class: type, algorithm: str, own: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """The function `make_args` of a script.

    Args:
        args_class: the script's settings, a dataclass that extends `RunArgs`.
        algorithm: a key of `ENVIRONMENTS`, "ppo" or "sac".
        own: defaults of the method's own settings, by environment.
    """

    def make_args(env_id: str = args_class.env_id, **settings: Any) -> Any:
        """The script's `Args` for an environment: the same as the command line's with these flags.

        Args:
            env_id: as --env-id.
            settings: fields of `Args`; they win over what the environment needs.

        Raises:
            TypeError: there is no such setting.
        """
        needed = ENVIRONMENTS[algorithm].get(env_id, {}).items()  # of which a script may lack something
        defaults = {k: x for k, x in needed if hasattr(args_class, k)} | own.get(env_id, {})
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
        return args_class(env_id=env_id, **defaults | settings)

    return make_args


def describe_fields(args_class: type) -> dict[str, tuple[str, str]]:
    """What the source says of each setting: the heading it is under, and the comment behind it.

    A heading is a comment of one word on a line of its own; what is above all of them has none (""). The
    fields of `RunArgs` are under "run".
    """
    found = {}
    for owner in filter(is_dataclass, reversed(args_class.__mro__)):
        heading = "run" if owner is RunArgs else ""
        for line in inspect.getsource(owner).splitlines():
            if title := re.fullmatch(r"    # (\w+)", line):
                heading = title[1]
            if field := re.match(r"    (\w+): [^#]*(?:# (.*))?", line):
                name, comment = field.groups(default="")
                found[name] = heading, comment
    return found


def parse_args(make_args: Callable[..., Any], doc: str | None) -> Any:
    """Read the command line, over what the environment it names needs.

    Args:
        make_args: the script's.
        doc: the script's docstring, whose first line --help shows.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env-id", "--env_id", default=make_args().env_id)
    default = make_args(peek.parse_known_args()[0].env_id)
    hints = get_type_hints(type(default), include_extras=True)
    groups: dict[str, dict[str, Any]] = {"": {}}
    for name, (heading, comment) in describe_fields(type(default)).items():
        hint = Annotated[hints[name], tyro.conf.arg(help=comment)]
        groups.setdefault(heading, {})[name] = hint
    groups["run"] = groups.pop("run")  # last, as it is of least interest

    # tyro shows the fields of a nested class under a title of their own
    top = groups.pop("")
    nested = {title: make_dataclass(title, group.items()) for title, group in groups.items()}
    outer = make_dataclass("Settings", [*top.items(), *nested.items()])
    values = {name: getattr(default, name) for name in top}
    values |= {x: nested[x](**{name: getattr(default, name) for name in groups[x]}) for x in groups}
    lines = [
        (doc or "").partition("\n")[0],
        "docs/ppo.md, sac.md and vmpo.md explain the settings, docs/environments.md the environments.",
        f"The defaults shown are those for --env-id {default.env_id}.",
    ]
    # tyro keeps the ends of indented lines
    description = "\n".join(textwrap.fill(x, 78, initial_indent="  ", subsequent_indent="  ") for x in lines)
    read = tyro.cli(tyro.conf.OmitArgPrefixes[outer], default=outer(**values), description=description)
    settings = {name: getattr(read, name) for name in top}
    for title in nested:
        settings |= vars(getattr(read, title))
    return type(default)(**settings)


def run_command(train: Callable[[Any], Path], make_args: Callable[..., Any], doc: str | None) -> Path:
    """What a script does on the command line; bad input is one line on stderr and exit code 2."""
    with exit_on_bad_input():
        return train(parse_args(make_args, doc))


def has_type(value: Any, hint: Any) -> bool:
    """Whether a setting is of the type of its field; an integer is a float too."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(has_type(x, get_args(hint)[0]) for x in value)
    return type(value) is hint or (hint is float and type(value) is int)


def check_args(args: RunArgs) -> None:
    """Refuse settings of any script that make no sense, such as numbers beyond the bounds of their type."""
    plain_hints = get_type_hints(type(args))
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        plain = plain_hints[name]
        if not has_type(value, plain):  # in Python; the command line checks types itself
            wanted = plain.__name__ if isinstance(plain, type) else str(plain).removeprefix("typing.")
            fail(f"--{name.replace('_', '-')} must be {wanted}, not {value!r}")
        if isinstance(value, tuple):
            hint = get_args(hint)[0]
        for bound in getattr(hint, "__metadata__", ()):
            for x in value if isinstance(value, tuple) else (value,):
                if not BOUNDS[bound](x):
                    fail(f"--{name.replace('_', '-')} must be {bound}, not {x}")
    if args.seed >= 2**63:
        fail(f"--seed must be below 2^63, not {args.seed}")
    if args.num_threads > os.cpu_count():
        fail(f"--num-threads must be at most {os.cpu_count()}, this machine's cores, not {args.num_threads}")
    if args.run_name in (".", "..", "latest") or Path(args.run_name).name != args.run_name:
        fail(f"--run-name is the name of a folder below runs/, not {args.run_name!r}")
    if not re.fullmatch(r"[A-Za-z0-9._-]*", args.run_name):
        fail(f"--run-name may have letters, digits and ._- only, not {args.run_name!r}")
    if getattr(args, "freeze_theta", False) and not args.load:
        fail("--freeze-theta needs a theta from --load")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: PyTorch finds no CUDA device")
    if args.track:
        import wandb  # a slow import that few need

        try:
            wandb.login()
        except wandb.errors.Error as error:
            fail(f"--track: {' '.join(str(error).split())}")
