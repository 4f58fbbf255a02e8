"""Siblings differ from their trunk in their method and nothing else."""

import inspect

import probes
import pytest
import siblings


@pytest.mark.parametrize("name", siblings.SIBLINGS)
def test_a_sibling_differs_in_its_method_only(name):
    assert not siblings.drifted(name), "\n".join(siblings.drifted(name))


def test_every_script_is_known():
    assert set(siblings.METHOD) | set(siblings.SIBLINGS) == set(probes.SCRIPTS + probes.SAC_SCRIPTS)
    found = {
        *probes.ROOT.glob("*_ppo.py"),
        *probes.ROOT.glob("*_sac.py"),
        *probes.ROOT.glob("baselines/*.py"),
    }
    assert found == {probes.ROOT / name for name in probes.SCRIPTS + probes.SAC_SCRIPTS}


def test_scripts_with_heads_have_the_same_agent():
    names = [f"baselines/{name}_ppo.py" for name in ("hard_sharing", "pcgrad", "cagrad")]
    agents = {inspect.getsource(probes.load_script(name).Agent) for name in names}
    assert len(agents) == 1


def test_the_table_in_the_readme_is_up_to_date():
    assert siblings.table() in (probes.ROOT / "README.md").read_text(), "run python tests/siblings.py"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(ratio - 1) - logratio", "ratio - 1 - logratio"),
        ("anneal_lr: bool = True", "anneal_lr: bool = False"),
        ("            returns = advantages + values\n", ""),
        ("        stats = []\n", "        stats = []\n        extra = 0\n"),
        ("# rollout with one set of weights", "# rollout"),
    ],
)
def test_drift_is_noticed(monkeypatch, tmp_path, old, new):
    for name in ("varshare_ppo.py", "baselines/l2soft_ppo.py"):
        text = (probes.ROOT / name).read_text()
        assert text.count(old) == 1
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace(old, new) if "l2soft" in name else text)
    monkeypatch.setattr(siblings, "ROOT", tmp_path)
    assert siblings.drifted("baselines/l2soft_ppo.py")
