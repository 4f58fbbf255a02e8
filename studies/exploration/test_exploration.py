"""Settings by success, what each task had learned, and pink noise minus white on the same seeds."""

import pandas as pd

from bench.collect import TRAINING_SUCCESS
from studies.conftest import cells_of, made_up
from studies.exploration.__main__ import ENTROPY, KL, PINK, WHITE, jobs, report


def test_pink_minus_white_on_the_same_seeds():
    finals = {WHITE: {101: 400, 102: 400}, PINK: {101: 600, 102: 600}, "pink-0.0012": {101: 500}}
    cases = {
        ("mt10", f"{method}@{setting}", seed): (mean - 100.0, mean + 100.0)
        for method in ("hard-sharing", "varshare-recentred")
        for setting, seeds in finals.items()
        for seed, mean in seeds.items()
    }
    rows = made_up("exploration", cases)
    success = rows[rows.metric == "eval/success_rate"]
    logged = [success.assign(metric=TRAINING_SUCCESS, value=success.value / 2)]
    logged.append(logged[0].assign(step=500, value=0.0))  # on the way
    logged += [success.assign(metric=metric, value=x) for metric, x in ((ENTROPY, 1.5), (KL, 0.02))]
    text = report(pd.concat([rows, *logged], ignore_index=True))
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| Hard sharing")]
    assert [line[1] for line in lines[:3]] == [PINK, "pink-0.0012", WHITE]
    assert lines[0][2:] == ["2", "60.0 [60.0, 60.0]", "30", "1.5", "0.02", "50", "70 |"]
    tested = cells_of(text[text.index(f"{PINK} minus {WHITE}") - 20 :])
    assert tested["VarShare, re-centred"][f"{PINK} minus {WHITE}"] == "20.0 [20.0, 20.0]"


def test_three_seeds_of_what_is_tested_and_one_of_the_rest():
    names = [job.name for job in jobs()]
    assert len(names) == len(set(names)) == 18
    assert all("--anneal-lr" in job.flags and "--no-anneal" not in job.flags for job in jobs())
