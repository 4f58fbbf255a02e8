"""What does a learned sigma buy? Runs, models played anew, tables and figures: results/studies/posterior/.

Every finished model is played with other weights and in other physics, once (played.csv in its folder).
Tables and figures are made from the CSVs alone.
"""

from __future__ import annotations

import pandas as pd
from matplotlib import rc_context

from bench.figures import STYLE, save
from studies import folder_of, run_study
from studies.posterior.figures import plot_ladder, plot_sigma, plot_use
from studies.posterior.play import play_all
from studies.posterior.runs import STUDY, USED, collect_sigma, jobs, rows_of
from studies.posterior.tables import all_tables


def report(runs: pd.DataFrame) -> str:
    """Play what has not been played, and make tables and figures; returns the tables."""
    out, today = folder_of(STUDY), list(jobs())
    collect_sigma(today, out)
    play_all(today, out, USED)
    others, sigma = pd.read_csv(out / "played.csv"), pd.read_csv(out / "sigma.csv")
    with rc_context(STYLE):
        save(plot_ladder(runs), out / "ladder.png")
        save(plot_sigma(runs, sigma), out / "sigma.png")
        save(plot_use(runs, others), out / "use.png")
    return all_tables(runs, others, sigma)


if __name__ == "__main__":
    run_study(STUDY, jobs, report, rows_of)
