"""Scaling is measured where it fits, and else said not to."""

import probes
import pytest
import torch

from studies.scaling import __main__ as scaling


@pytest.mark.slow
def test_scaling_is_measured_where_it_fits(tmp_path, monkeypatch):
    varshare = probes.load_script("varshare_ppo.py")
    agent = varshare.Agent(probes.spaces(), varshare.Args(), torch.Generator())
    more = 2 * 64 * (probes.OBS - scaling.OBS) + 65 * (agent.act_dim - scaling.ACTIONS)
    assert agent.theta.numel() == scaling.full_parameters(64) + more
    monkeypatch.setattr(scaling, "TASKS", (2,))
    monkeypatch.setattr(scaling, "WIDTHS", (8, 1_000_000))
    monkeypatch.setattr(scaling, "methods", lambda: ["varshare-lora"])
    scaling.run(tmp_path)
    lines = [line for line in scaling.report(tmp_path).splitlines() if line.startswith("| VarShare")]
    assert [("does not fit" in line) for line in lines] == [False, True]
    assert (tmp_path / "scaling.png").exists()
