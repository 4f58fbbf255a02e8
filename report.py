"""Figures and tables from run folders.

    python report.py runs/NAME [runs/NAME2 ...]   plots of single runs -> runs/NAME/plots/
    python report.py runs/latest                  of the newest
    python report.py results/suites/NAME          table and figures of a suite, from its committed CSVs

Of a run: returns.png, success.png, norms.png, sigma.png, sharing_ratio.png, losses.png. What it has not
logged is left out, and a run that is not finished is drawn as far as it went. Of several runs on the same
tasks also their evaluations on the way (--eval-interval) in one figure, compared.png beside the plots of the
first. Of a suite: table.md, curves.png, tasks.png, sharing.png and variants.png. Intervals and verdicts are
those of bench/statistics.py. A method is what --exp-name says, by default the script's name.
"""

from pathlib import Path

import tyro

from bench.collect import read_run
from bench.figures import write_suite
from bench.methods import fail
from bench.run_figures import plot_run, plot_together


def main(folders: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Draw the plots of runs, or make the report of a suite.

    Args:
        folders: runs/NAME, one or more; or results/suites/NAME
    """
    if not folders:
        fail("name one or more folders of runs: python report.py runs/NAME")
    if len(folders) == 1 and (folders[0] / "configs.csv").exists():
        print(write_suite(folders[0]))
        return
    runs = [read_run(folder) for folder in folders]
    paths = [path for run in runs for path in plot_run(run)]
    if len(runs) > 1 and (together := plot_together(runs)):
        paths.append(together)
    print(*paths, sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
