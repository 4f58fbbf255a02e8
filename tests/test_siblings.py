"""Scripts differ from their parents in their method and nothing else, and drift does not go unnoticed."""

from collections import Counter

import probes
import pytest
import siblings


@pytest.mark.parametrize("name", siblings.SIBLINGS)
def test_a_script_differs_from_its_parent_in_its_method_only(name):
    assert not (wrong := siblings.drifted(name)), "\n".join(wrong)


def test_trunks_differ_in_their_algorithm_only():
    assert not (wrong := siblings.trunks_drifted()), "\n".join(wrong)


def test_every_script_is_known():
    known = {*probes.SCRIPTS, *probes.SAC_SCRIPTS, *probes.VARIANTS, *probes.SAC_VARIANTS}
    assert {*siblings.TRUNKS, *siblings.SIBLINGS} == known == siblings.METHOD_OF.keys()
    patterns = ("*_ppo.py", "*_sac.py", "baselines/*.py", "variants/*.py", "studies/*/varshare_*.py")
    paths = {path for pattern in patterns for path in probes.ROOT.glob(pattern)}
    assert paths == {probes.ROOT / name for name in known}


def test_scripts_with_heads_have_the_same_agent():
    """But for what they draw, also in what a method may change."""
    scripts = [siblings.definitions(f"baselines/{x}_ppo.py") for x in ("hard_sharing", "pcgrad", "cagrad")]
    agents = [{x: lines for x, lines in script.items() if x.startswith("Agent")} for script in scripts]
    assert agents[1].pop("Agent.draw_keys")
    assert agents[0] == agents[1] == agents[2]


def test_every_line_of_a_script_belongs_to_a_definition():
    """But for blank ones and the headings in Args: there is no place where drift goes unseen."""
    for name in (*siblings.TRUNKS, *siblings.SIBLINGS):
        found = Counter(line for lines in siblings.definitions(name).values() for line in lines if line)
        lines = Counter(line for line in siblings.lines_of(name) if line)
        assert not found - lines and all(line.startswith("    # ") for line in lines - found)


@pytest.mark.parametrize("name", siblings.TABLES)
def test_the_table_of_scripts_is_up_to_date(name):
    table = siblings.table(siblings.TABLES[name])
    assert table in (probes.ROOT / name).read_text(), "run python tests/siblings.py"


@pytest.fixture
def edit(monkeypatch, tmp_path):
    """A copy of all scripts, and a function that replaces a text that occurs once in one of them."""
    for name in (*siblings.TRUNKS, *siblings.SIBLINGS):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text((probes.ROOT / name).read_text())
    monkeypatch.setattr(siblings, "ROOT", tmp_path)

    def replace(name, old, new):
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, old
        (tmp_path / name).write_text(text.replace(old, new))

    return replace


DRIFT = {  # where -> a line, and what becomes of it
    "ppo_loss": ("(ratio - 1 - logratio).mean(1)", "((ratio - 1) - logratio).mean(1)"),
    "Args.anneal_lr": ("anneal_lr: bool = True", "anneal_lr: bool = False"),
    "Args.gamma": ("gamma: UnitFloat = ", "gamma: float = "),
    "Args.num_steps": ("# steps of each environment per rollout", "# steps per rollout"),
    "Args.samples_per_task": ("return self.num_steps * self.envs_per_task", "return self.num_steps"),
    "LUNARLANDER": ("gamma=0.999, norm_reward", "gamma=0.99, norm_reward"),
    "imports": ("from envs.rewards import scale_rewards\n", ""),
    "Rollout": ("# each (step, task, env, ...); obs", "# obs"),
    "mlp": ("*hidden, last = [", "*hidden, last = inner, out = ["),
    "Agent.__init__": ("3, dtype=torch.float64)", "3)"),
    "Agent.init_weights": ('("critic", 1, 1.0)', '("critic", 1, 0.1)'),
    "make_batch, a line less": ("    returns = advantages + values\n", ""),
    "make_batch, a comment": ("# steps at which an episode was truncated", "# truncated steps"),
    "rollout, a line more": ("    obs[0] = next_obs\n", "    obs[0] = next_obs\n    extra = 0\n"),
    "minibatch_gradients": ("(norm + 1e-6)", "(norm + 1e-8)"),
    "update, a line more": ("            optimizer.step()\n", 2 * "            optimizer.step()\n"),
    "check": ("    check_args(args)\n", ""),
    "train": ("eps=1e-5, fused=True", "eps=1e-8, fused=True"),
    "main": ("train(parse_args(Args, ENV_DEFAULTS, __doc__))", "train(parse_args(Args, {}, __doc__))"),
    "a name": ("def by_task(", "def of_tasks("),
}


@pytest.mark.parametrize("where", DRIFT)
@pytest.mark.parametrize("name", ["baselines/l2soft_ppo.py", "baselines/cagrad_ppo.py"])
def test_drift_is_noticed(edit, name, where):
    edit(name, *DRIFT[where])
    assert siblings.drifted(name)


IN_SAC = [x for x, (old, _) in DRIFT.items() if (probes.ROOT / "varshare_sac.py").read_text().count(old) == 1]
CASES = [(x, where) for x in ("varshare_ppo.py", "baselines/hard_sharing_ppo.py") for where in DRIFT]
CASES += [("varshare_sac.py", where) for where in IN_SAC]


@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_fix_in_the_parent_that_its_children_lack_is_noticed(edit, name, where):
    edit(name, *DRIFT[where])
    children = [x for x in siblings.SIBLINGS if siblings.METHOD_OF[x].parent == name]
    assert children and all(map(siblings.drifted, children))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.theta.expand(self.num_tasks, -1)", "self.theta.repeat(self.num_tasks, 1)"),
        ('return {"theta": G.sum(0)}', 'return {"theta": G.mean(0)}'),
        ('"""Log what is the method\'s own."""', '"""Log."""'),
    ],
)
def test_what_is_a_methods_own_may_change(edit, old, new):
    edit("baselines/task_blind_ppo.py", old, new)
    assert not any(map(siblings.drifted, siblings.SIBLINGS))


def test_a_line_of_the_method_that_is_lost_is_noticed(edit):
    edit("baselines/l2soft_ppo.py", "        recentre(agent, args.reptile_alpha)\n", "        pass\n")
    assert siblings.drifted("baselines/l2soft_ppo.py")


def test_drift_of_order_and_size_is_noticed(edit):
    name = "baselines/l2soft_ppo.py"
    lines = "\n".join(siblings.definitions(name)["by_task"])
    edit(name, lines, "")
    edit(name, "def gae(", f"{lines}\n\n\ndef gae(")
    assert any("same order" in x for x in siblings.drifted(name))
    edit("baselines/pcgrad_ppo.py", "def pcgrad(", 90 * "# on and on\n" + "def pcgrad(")
    assert siblings.drifted("baselines/pcgrad_ppo.py") == ["135 lines differ in total"]


@pytest.mark.parametrize("where", ["Args.gamma", "Agent.__init__", "imports", "main"])
def test_drift_between_trunks_is_noticed(edit, where):
    before = siblings.trunks_drifted()
    edit("varshare_ppo.py", *DRIFT[where])
    after = siblings.trunks_drifted()
    assert (before != after) == (where in ("Args.gamma", "main"))  # the others are of an algorithm
    edit("varshare_sac.py", "2 * sigma.log().sum(1)", "2 * sigma.log().sum(dim=1)")
    assert siblings.trunks_drifted() != after


def test_changed_lines_are_those_of_diff():
    assert siblings.count_changed(list("abcabba"), list("cbabac")) == 5  # of Myers 1986
    assert siblings.count_changed([], list("ab")) == siblings.count_changed(list("ab"), []) == 2
