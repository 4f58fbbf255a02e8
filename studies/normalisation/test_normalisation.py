"""What either normalisation adds."""

from studies.conftest import cells_of, made_up
from studies.normalisation.__main__ import report


def test_normalisation_says_what_either_adds():
    gains = {"none": 0, "obs": -10, "value": 30, "obs+value": 20}
    cases = {}
    for method, seed in ((m, s) for m in ("l2soft", "varshare") for s in (101, 102)):
        for norm, gain in gains.items():
            mean = 100 * seed + gain * (1 + (method == "varshare"))
            cases["goals", f"{method}@{norm}", seed] = mean, mean
    rows = cells_of(report(made_up("normalisation", cases)))
    assert list(rows["l2soft"].values())[1:] == [f"{10150 + x:.1f} +- 70.7" for x in gains.values()]
    assert list(rows["mean gain over none"].values())[2:] == ["-15.0", "+45.0", "+30.0"]
