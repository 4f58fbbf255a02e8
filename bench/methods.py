"""methods.csv, the one list of methods: what grid, search, report, tests and the README's table read.

docs/benchmark.md says what its columns are. A study that needs methods of its own has a methods.csv of the
same format in its folder.
"""

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

ROOT = Path(__file__).resolve().parents[1]
Settings = dict[str, str]  # flag without its dashes -> value


@dataclass(frozen=True)
class Method:
    """A row of methods.csv."""

    name: str
    title: str
    family: str
    what: str
    script: str
    parent: str
    flags: Settings
    color: str
    space: dict[str, BaseDistribution]

    @property
    def variant(self) -> bool:
        """The same script as another method, with other flags."""
        return self.script == self.parent

    def has_flag(self, name: str) -> bool:
        """Whether the script itself has this setting, by its source: an import takes seconds."""
        field = name.replace("-", "_")
        return bool(re.search(rf"^    {field}: ", (ROOT / self.script).read_text(encoding="utf-8"), re.M))


def fail(message: str) -> NoReturn:
    """As `envs.settings.fail`, without torch's seconds of import: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name.replace('__main__.py', 'bench')}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_flags(text: str) -> Settings:
    """ "--beta 0.1 --norm-obs" -> {"beta": "0.1", "norm-obs": ""}."""
    words = [part.split(maxsplit=1) for part in f" {text.strip()}".split(" --")[1:]]
    return {name: value[0] if value else "" for name, *value in words}


def write_flags(settings: Settings) -> str:
    """The reverse of `parse_flags`."""
    return " ".join(f"--{name} {value}".rstrip() for name, value in settings.items())


def parse_space(text: str) -> dict[str, BaseDistribution]:
    """Distributions by the name of their flag."""
    space = {}
    for part in filter(None, text.split("; ")):
        name, values = part.split(maxsplit=1)
        if "|" in values:
            space[name] = CategoricalDistribution(values.split("|"))
        else:
            bounds, _, scale = values.partition(" ")
            low, high = map(float, bounds.split(".."))
            space[name] = FloatDistribution(low, high, log=scale == "log")
    return space


def read_methods(path: Path) -> dict[str, Method]:
    """All methods of a file by name, in its order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parsed = [{"flags": parse_flags(row["flags"]), "space": parse_space(row["space"])} for row in rows]
    return {row["name"]: Method(**row | more) for row, more in zip(rows, parsed)}


def title_of(method: str) -> str:
    """As in tables and figures; a method of a fork is called what it is."""
    return METHODS[method].title if method in METHODS else method


def base_of(method: str) -> str:
    """What a method is called with PPO: "l2soft" of "l2soft-sac" and of "l2soft-vmpo"."""
    return method.removesuffix("-sac").removesuffix("-vmpo")


METHODS = read_methods(ROOT / "bench/methods.csv")
