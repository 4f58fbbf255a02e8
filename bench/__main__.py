"""`python -m bench COMMAND ...`: what benchmark.sh calls."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from bench import launch, studies
from bench.methods import ROOT, fail
from bench.suites import STORAGE, Suite

# what takes a second to import, or more, is imported where it is needed
SuiteArg = Annotated[Suite, tyro.conf.arg(name="")]
Name = tyro.conf.Positional[str]


def search(suite: SuiteArg, storage: str = STORAGE, missing: bool = False) -> bool:
    """Search the settings of a suite's methods, unless it takes those of another.

    Args:
        suite: a line of benchmark.sh.
        storage: URL of the database of trials, e.g. postgresql+psycopg://user@host/name
        missing: only of those of which settings.csv has none
    """
    methods = tuple(m for m in suite.methods if not (missing and m in suite.chosen))
    if not (suite.searched and methods):
        return True
    from bench import tune

    suite = replace(suite, methods=methods)
    return tune.try_rates(suite) if suite.rates else tune.search(suite, storage)


def runs(suite: SuiteArg) -> bool:
    """Start or continue the reported runs of a suite, then report; on Slurm submit both."""
    if on_slurm():
        launch.submit(suite.name, suite.jobs(), ["report", suite.name])
        return True
    done = launch.launch(suite.jobs())
    report(suite)
    return done


def report(suite: SuiteArg) -> None:
    """Table and figures of a suite's finished runs, or where there are none here of its CSVs in results/."""
    from bench.collect import collect
    from bench.suite_report import write_suite

    folder = Path("results", suite.name)
    if any(map(suite.finished, suite.methods)):
        collect(suite, folder)
    elif not (folder / "configs.csv").exists():
        print(f"{suite.name}: no run has finished yet")
        return
    print(write_suite(folder))


def commands(suite: SuiteArg) -> None:
    """Print the commands of the reported runs."""
    show_commands(suite.jobs())


def plan(suite: SuiteArg) -> None:
    """Print what of a suite is done, and about how long the rest takes, so many runs at a time as JOBS."""
    done, steps, seconds = 0, 0, 0.0
    for method in suite.methods:
        finished = suite.finished(method)
        left = (suite.seeds - finished) * suite.steps
        if suite.searched and method not in suite.chosen:
            left += suite.steps_of_search
        cost = suite.seconds_per_step(method)
        done, steps, seconds = done + finished, steps + left, seconds + (left and left * cost)
    hours = seconds / 3600 / launch.jobs_at_a_time()
    runs = f"{done:3} of {suite.seeds * len(suite.methods):3} runs done"
    time = "for an unknown time" if math.isnan(hours) else f"some {hours:.1f} h on the machine of results/"
    print(f"{suite.name:25} {runs}, {steps / 1e6:5.0f} M steps left, {time}")


def study(name: Name, dry_run: bool = False, report_only: bool = False) -> bool:
    """Start or continue the runs of a suite of bench/studies.py, then report; on Slurm submit both.

    Args:
        name: power, ceilings, normalisation, noise, posterior, serial, ranks or recipe
        dry_run: print the commands only
        report_only: of whatever has finished
    """
    jobs = list(studies.STUDIES[name]())
    if dry_run:
        show_commands(jobs)
        return True
    if on_slurm() and not report_only:
        launch.submit(name, jobs, [name, "--report-only"])
        return True
    done = report_only or launch.launch(jobs)
    if not (any(job.finished for job in jobs) or Path("results", name, "runs.csv").exists()):
        print(f"{name}: no run has finished yet")
        return done
    from bench import controls, noise, posterior

    own = {"noise": noise.main, "posterior": posterior.main}
    print(own[name]() if name in own else controls.main(name))
    return done


def loo(
    suites: tyro.conf.Positional[tuple[str, ...]] = (),
    seeds: int = 10,
    dry_run: bool = False,
    report_only: bool = False,
) -> bool:
    """Leave-one-out on suites of bench/loo.py, by default all: step sizes, models, adaptations, report.

    Args:
        suites: their names
        seeds: 1, 2, ...
        dry_run: print the commands only: of the search, and once it has chosen those that are reported
        report_only: of whatever has finished
    """
    from bench import loo, loo_report

    if unknown := set(suites) - loo.SUITES.keys():
        fail(f"unknown suite {min(unknown)}, choose from {', '.join(loo.SUITES)}")
    if on_slurm():
        fail("loo runs on one machine: LAUNCHER is for what does not load other runs' models")
    done, numbers = True, tuple(range(1, seeds + 1))
    for suite in [loo.SUITES[name] for name in suites or loo.SUITES]:
        if dry_run:
            show_commands(loo.all_jobs(suite, numbers))
            continue
        done &= report_only or loo.run(suite, numbers)
        loo.collect(suite, numbers)
        print(loo_report.report(suite.name))
    return done


def scale(report_only: bool = False) -> None:
    """Time and memory of a minibatch, full rank against LoRA, with nothing else running.

    Args:
        report_only: of results/scaling/scaling.csv
    """
    from bench import scaling

    out = Path("results/scaling")
    if not report_only:
        scaling.run(out)
    print(scaling.report(out))


def claims() -> None:
    """The verdicts on the README's claims, from results/."""
    from bench.suite_report import write_claims

    print(write_claims(Path("results")))


def job(path: tyro.conf.Positional[Path], number: tyro.conf.Positional[int]) -> bool:
    """One run of those that `runs` submitted to Slurm."""
    return launch.run_line(path, number) == 0


def show_commands(jobs: list[launch.Job]) -> None:
    """One a line."""
    for x in jobs:
        print(f"python {ROOT / x.script} {x.flags} --run-name {x.name} --resume")


def on_slurm() -> bool:
    """Whether the environment variable LAUNCHER says so."""
    launcher = os.environ.get("LAUNCHER", "")
    if launcher not in ("", "slurm"):
        fail(f"LAUNCHER is slurm or nothing, not {launcher!r}")
    return launcher == "slurm"


if __name__ == "__main__":
    on_slurm()  # this and the next refuse bad input before anything starts
    launch.jobs_at_a_time()
    launch.stop_on_signals()
    functions = (search, runs, report, commands, plan, study, loo, scale, claims, job)
    result = tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in functions})
    raise SystemExit(result is False)
