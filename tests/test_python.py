"""docs/python.md: every block of code in it runs, and a model acts as it is evaluated."""

import re
import signal
from pathlib import Path

import numpy as np
import probes
import pytest
import torch

import enjoy
import envs
from envs.settings import ENVIRONMENTS, InputError

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_every_block_of_the_page_runs():
    Path("models").symlink_to(probes.ROOT / "models")
    page = (probes.ROOT / "docs/python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    found = {}
    exec(code.replace("307_200", "20_480").replace('glob("compare__*")', 'glob("cartpole*")'), found)
    example = torch.randn(10, 3, 4)
    torch.testing.assert_close(torch.jit.load("policy.pt")(example), found["model"].policy(example))
    assert found["curve"].index[-1] == 20_480 and len(found["episodes"]) == 200
    (scores,) = found["score_dict"].values()
    means = found["episodes"].groupby("task", sort=False)["return"].mean()
    np.testing.assert_allclose(scores, [means])


def test_settings_are_the_command_lines():
    script = probes.load_script("varshare_ppo.py")
    args = script.make_args("mt10", seed=2)
    assert args.seed == 2 and args.env_id == "mt10"
    assert {name: getattr(args, name) for name in ENVIRONMENTS["ppo"]["mt10"]} == ENVIRONMENTS["ppo"]["mt10"]
    assert script.make_args("mt10", gamma=0.5).gamma == 0.5
    with pytest.raises(TypeError, match="no_such"):
        script.make_args("mt10", no_such=1)
    with pytest.raises(InputError, match="--gamma must be"):
        script.train(script.make_args("cartpole10", gamma=2.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_weights": "foo"}, "--rollout-weights must be .*mean.*, not 'foo'"),
        ({"hidden_sizes": [-8]}, "--hidden-sizes must be positive, not -8"),
        ({"total_timesteps": 1e3}, "--total-timesteps must be .*int.*, not 1000.0"),
        ({"seed": "2"}, "--seed must be .*int.*, not '2'"),
        ({"seed": np.int64(2)}, "--seed must be"),
        ({"anneal_lr": 1}, "--anneal-lr must be bool, not 1"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(settings, message):
    script = probes.load_script("varshare_ppo.py")
    with pytest.raises(InputError, match=message):
        script.train(script.make_args("cartpole10", **settings))
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["varshare_ppo.py", "varshare_sac.py", "baselines/cagrad_ppo.py"])
def test_signals_are_handled_as_before_however_a_run_ends(name, monkeypatch):
    script = probes.load_script(name)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(x) for x in signals]
    probes.run(script)
    assert [signal.getsignal(x) for x in signals] == before

    def crash(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(script, "update", crash)
    with pytest.raises(ZeroDivisionError):
        probes.run(script, "crashed")
    assert [signal.getsignal(x) for x in signals] == before


def test_a_model_acts_as_it_is_evaluated():
    model, seeds = enjoy.Model(probes.ROOT / "models/goals10"), envs.evaluation.spread_seeds(1, 1, 10)
    env = envs.make_single(model.env_id, task=7)
    (obs, _), total, over = env.reset(seed=seeds[7]), 0.0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(int(model.act(obs, model.task_names[7])))
        total, over = total + reward, terminated or truncated
    _, returns, *_ = enjoy.play(enjoy.Args(probes.ROOT / "models/goals10", episodes=1, seed=1))
    assert returns[7, 0] == pytest.approx(total)
