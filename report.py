"""Figures and tables from run folders.

    python report.py runs/NAME [runs/NAME2 ...]   plots of single runs -> runs/NAME/plots/
    python report.py runs/latest                  of the newest
    python report.py results/SUITE                table and figures of a suite, from its committed CSVs
    python report.py results                      the verdicts on the README's claims -> results/claims.md

Of a run: returns.png, success.png, norms.png, sigma.png, sharing_ratio.png, losses.png; what it has not
logged is left out, and a run that is not finished is drawn as far as it went. Of several runs on the same
tasks also their evaluations on the way (--eval-interval) in one figure, compared.png beside the plots of the
first. Of a suite: table.md, curves.png, tasks.png, sharing.png, change.png and, where SAC is compared,
cost.png. Intervals and verdicts are those of bench/statistics.py. A method is what --exp-name says, by
default the script's name.
"""

from pathlib import Path

import tyro

from bench.collect import read_run
from bench.methods import fail
from bench.run_figures import plot_run, plot_together
from bench.suite_report import write_claims, write_suite


def main(folders: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Draw the plots of runs, or make the report of a suite, or of all.

    Args:
        folders: runs/NAME, one or more; or results/SUITE; or results
    """
    if not folders:
        fail("name one or more folders of runs: python report.py runs/NAME")
    if len(folders) == 1 and (folders[0] / "configs.csv").exists():
        print(write_suite(folders[0]))
    elif len(folders) == 1 and list(folders[0].glob("*/configs.csv")):
        print(write_claims(folders[0]))
    else:
        runs = [read_run(folder) for folder in folders]
        paths = [path for run in runs for path in plot_run(run)]
        if len(runs) > 1 and (compared := plot_together(runs)):
            paths.append(compared)
        print(*paths, sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
