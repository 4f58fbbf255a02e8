"""The residuals' share of what weights have moved."""

import numpy as np
import pandas as pd
import pytest

from bench.collect import NORMS
from bench.methods import ROOT
from studies.theta_first.__main__ import report, share


class Norms:
    """Logged norms of two runs at two steps."""

    def logged(self, method, metric):
        values = {NORMS[0]: [[3.0, 1.0], [0.0, 2.0]], NORMS[1]: [[4.0, 1.0], [5.0, 0.0]]}
        return pd.DataFrame(values[metric])


def test_the_share_is_of_the_squared_change():
    found = share(Norms(), "varshare")
    assert NORMS[0].endswith("mu_norm") and NORMS[1].endswith("theta_moved")
    assert found.to_numpy() == pytest.approx(np.array([[9 / 25, 0.5], [0.0, 1.0]]))


def test_the_committed_table_is_that_of_the_committed_suites(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert report(tmp_path) == (ROOT / "results/studies/theta_first/table.md").read_text()
