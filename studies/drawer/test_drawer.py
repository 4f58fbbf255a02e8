"""The script pulls what the policy leaves."""

import numpy as np
import pytest

from studies.drawer import __main__ as drawer


@pytest.mark.slow
def test_a_hand_that_is_far_from_the_handle_opens_nothing(monkeypatch):
    monkeypatch.setattr(drawer, "ACTS", 5)
    seen = []

    def policy(obs):
        seen.append(obs)
        return np.zeros(4, np.float32)

    at_rest, lowest, opened = drawer.pull(policy, 0, 10)
    assert len(seen) == 5 and lowest <= at_rest and abs(opened) < 0.1
