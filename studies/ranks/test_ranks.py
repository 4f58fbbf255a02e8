"""Ranks beside full rank."""

from studies.conftest import made_up
from studies.ranks.__main__ import report


def test_ranks_are_compared_with_full_rank():
    finals = {"varshare-lora@1": 80.0, "varshare-lora@8": 99.0, "varshare@full": 100.0}
    cases = {("goals", name, s): (x + s, x + s) for name, x in finals.items() for s in range(4)}
    text = report(made_up("ranks", cases))
    assert text.count("| -20.0 [-20.0, -20.0] |") == text.count("| -1.0 [-1.0, -1.0] |") == 1
    (full,) = [line for line in text.splitlines() if "| full |" in line]
    assert full.startswith("| VarShare | full | 101.5") and full.endswith("|  |")
