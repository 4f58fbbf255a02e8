"""`python -m bench COMMAND ...`: what benchmark.sh calls."""

import math
from pathlib import Path
from typing import Annotated

import tyro

from bench import launch
from bench.suites import STORAGE, Suite

# what takes a second to import, or more, is imported where it is needed
SuiteArg = Annotated[Suite, tyro.conf.arg(name="")]


def search(suite: SuiteArg, storage: str = STORAGE, missing: bool = False) -> bool:
    """Search the settings of a suite's methods, unless it takes those of another.

    Args:
        suite: a line of benchmark.sh
        storage: URL of the database of trials, e.g. postgresql+psycopg://user@host/name
        missing: only those of which settings.csv has nothing
    """
    pairs = suite.missing if missing else suite.pairs
    if not (suite.searched and pairs):
        return True
    from bench import tune

    return tune.search(suite, pairs, storage)


def runs(suite: SuiteArg) -> bool:
    """Start or continue the reported runs of a suite, then report; on Slurm submit both."""
    if launch.on_slurm():
        launch.submit(suite.name, suite.left(), ["report", suite.name])
        return True
    done = launch.launch(suite.left())
    report(suite)
    return done


def report(suite: SuiteArg) -> None:
    """Table and figures of a suite's finished runs, or if there are none here of its CSVs in results/."""
    from bench.figures import write_suite

    if any(map(suite.finished, suite.methods)):
        suite.collect()
    elif not (suite.folder / "configs.csv").exists():
        print(f"{suite.name}: no run has finished yet")
        return
    print(write_suite(suite.folder))


def commands(suite: SuiteArg) -> None:
    """Print the commands of the reported runs."""
    launch.show_commands(suite.left())


def plan(suite: SuiteArg) -> None:
    """Print what of a suite is done, and about how long the rest takes, so many runs at a time as JOBS."""
    done, runs = sum(map(suite.finished, suite.methods)), suite.seeds * len(suite.methods)
    searches = suite.missing if suite.searched else []
    steps = (runs - done) * suite.steps + sum(suite.steps_of_search(method) for method, _ in searches)
    hours = steps and steps * suite.seconds_per_step / 3600 / launch.jobs_at_a_time()
    time = f"some {hours:.1f} h" if hours >= 1 else f"some {math.ceil(60 * hours)} min" if hours >= 0 else ""
    time = f"{time} on the machine of results/" if time else "for a time that is not known before a run"
    print(f"{suite.name:25} {done:3} of {runs:3} runs done, {steps / 1e6:5.0f} M steps left, {time}")


def compare(
    scripts: tyro.conf.Positional[tuple[str, ...]],
    env_id: str = "cartpole-goals10",
    seeds: int = 5,
    steps: int = 300_000,
    name: str = "",
) -> bool:
    """Run scripts side by side over seeds and compare them: a figure and a table in results/compare/.

    Args:
        scripts: paths, each with its flags in quotes, e.g. varshare_ppo.py "forks/my_idea.py --beta 0.01"
        env_id: any environment that a script takes
        seeds: of each script, 1, 2, ...
        steps: of a run, all tasks together
        name: of the folder below results/compare/, by default the environment's
    """
    from bench.compare import run_comparison

    return run_comparison(list(scripts), env_id, seeds, steps, name)


def job(path: tyro.conf.Positional[Path], number: tyro.conf.Positional[int]) -> bool:
    """The run of a line, from 1, of the file that `runs` wrote for Slurm."""
    line = path.read_text().splitlines()[number - 1]
    return launch.run(launch.Job(*line.split("\t"))) == 0


if __name__ == "__main__":
    launch.set_up()
    functions = (search, runs, report, commands, plan, compare, job)
    result = tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in functions})
    raise SystemExit(result is False)
