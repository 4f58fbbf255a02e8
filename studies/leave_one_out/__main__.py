"""Is a held-out task learned faster from a model of the others? results/studies/leave_one_out/NAME/."""

from __future__ import annotations

import tyro

from bench import launch
from bench.methods import fail
from studies.leave_one_out import report, runs


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    seeds: int = 10,
    dry_run: bool = False,
    report_only: bool = False,
) -> bool:
    """Leave-one-out: step sizes, models of the other tasks, adaptations, report.

    Args:
        names: cartpole-goals10, cartpole-goals-physics10 or cartpole10; by default all
        seeds: 1, 2, ...
        dry_run: print the commands only: of the search, and once it has chosen those that are reported
        report_only: of whatever has finished
    """
    if unknown := set(names) - runs.SUITES.keys():
        fail(f"unknown environment {min(unknown)}, choose from {', '.join(runs.SUITES)}")
    if launch.on_slurm():
        fail("leave_one_out runs on one machine: LAUNCHER is for what does not load other runs' models")
    done, numbers = True, tuple(range(1, seeds + 1))
    for suite in [runs.SUITES[name] for name in names or runs.SUITES]:
        if dry_run:
            launch.show_commands(runs.all_jobs(suite, numbers))
            continue
        done &= report_only or runs.run(suite, numbers)
        runs.collect_runs(suite, numbers)
        print(report.report(suite.name))
    return done


if __name__ == "__main__":
    launch.set_up()
    raise SystemExit(not tyro.cli(main))
