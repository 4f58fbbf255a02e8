"""Settings by their return, and how noisy they are."""

import pandas as pd

from studies.conftest import cells_of, made_up
from studies.noise.__main__ import CLIPPED, SIGMA, report


def test_noise_says_what_differs_between_settings_best_first():
    """beta only where a method has it; how noisy it is beside its return."""
    methods = {"l2soft@0.01": (100, None), "varshare@0.01,0.001": (130, 0.02)}
    methods["varshare-fixed@0.01,0.5"] = (60, None)
    cases = {("goals", name, s): (m - 10 + s, m + 10 + s) for name, (m, _) in methods.items() for s in (0, 1)}
    runs = made_up("noise", cases)
    more = runs[(runs.task == "mean") & (runs.metric == "eval/episodic_return")]
    more = pd.concat([more.assign(metric=CLIPPED, value=0.015), more.assign(metric=SIGMA, value=0.02)])
    more = more[(more.metric == CLIPPED) | (more.method == "varshare")]
    text = report(pd.concat([runs, more]))
    assert list(cells_of(text)) == ["varshare", "l2soft", "varshare-fixed"]
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    spread = ["2", "130.5", "0.7", "130.0", "120.5", "1.50 %"]
    assert rows[0] == ["varshare", "goals", "0.01", "0.001", "-", *spread, "0.0200"]
    assert rows[1][:5] == ["l2soft", "goals", "0.01", "-", "-"] and rows[1][-1] == ""
    assert rows[2][:5] == ["varshare-fixed", "goals", "0.01", "-", "0.5"]
