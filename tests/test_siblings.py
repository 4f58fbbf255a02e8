"""Scripts differ from their parents in their method and nothing else, and drift does not go unnoticed."""

from collections import Counter

import pytest

from bench import siblings

SCRIPTS = list(siblings.compared())
ALL = list(siblings.read_scripts())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_differs_from_its_parent_in_its_method_only(script):
    wrong = siblings.drifted(script)
    assert not wrong, "\n".join([*wrong, "meant? python -m bench.siblings"])


def test_every_script_is_known():
    patterns = ("*_ppo.py", "*_sac.py", "baselines/*.py", "variants/*.py", "studies/*/varshare_*.py")
    paths = {path for pattern in patterns for path in siblings.ROOT.glob(pattern)}
    assert paths == {siblings.ROOT / script for script in ALL}


def test_every_line_of_a_script_belongs_to_a_definition():
    """Except for blank ones and the headings in Args: there is no place in which drift goes unseen."""
    for script in ALL:
        found = Counter(line for lines in siblings.definitions(script).values() for line in lines if line)
        lines = Counter(line for line in siblings.lines_of(script) if line)
        assert not found - lines and all(line.startswith("    # ") for line in lines - found)


@pytest.mark.parametrize("page", siblings.TABLES)
def test_the_table_of_scripts_is_up_to_date(page):
    table = siblings.table(siblings.TABLES[page])
    assert table in (siblings.ROOT / page).read_text(), "run python -m bench.siblings"


def test_the_table_of_parameters_is_up_to_date():
    assert siblings.parameter_table() in (siblings.ROOT / siblings.COUNTS).read_text(), (
        "run python -m bench.siblings"
    )
    # of 4 observed numbers, 2 actions and layers of 64: actor 4,610 and critic 4,545
    assert siblings.count_parameters("varshare_ppo.py") == (9_155, 9_155)
    assert siblings.count_parameters("baselines/hard_sharing_ppo.py") == (9_155 - 195, 195)
    assert siblings.count_parameters("baselines/paco_ppo.py") == (5 * 9_155, 5)


@pytest.fixture
def edit(monkeypatch, tmp_path):
    """A copy of all scripts, and a function that replaces a text that occurs once in one of them."""
    lists = [str(path.relative_to(siblings.ROOT)) for path in siblings.ROOT.glob("*/**/methods.csv")]
    for name in (*ALL, *lists):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text((siblings.ROOT / name).read_text())
    monkeypatch.setattr(siblings, "ROOT", tmp_path)

    def replace(name, old, new):
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, old
        (tmp_path / name).write_text(text.replace(old, new))

    return replace


PPO, SAC, L2SOFT = "varshare_ppo.py", "varshare_sac.py", "baselines/l2soft_ppo.py"
BOOTSTRAP, WEIGHT = "next_values * (1 - terminated) - values", "return torch.baddbmm(bias, x, weight.mT)"


@pytest.mark.parametrize(
    "edited, old, new, seen_in",
    [
        (PPO, BOOTSTRAP, BOOTSTRAP.replace(" * (1 - terminated)", ""), L2SOFT),
        (L2SOFT, BOOTSTRAP, BOOTSTRAP.replace(" * (1 - terminated)", ""), L2SOFT),
        (L2SOFT, "1 - args.clip_coef, 1 + args.clip_coef", "1 - args.clip_coef, 2", L2SOFT),
        (L2SOFT, "update_epochs: PositiveInt = 4", "update_epochs: PositiveInt = 8", L2SOFT),
        (L2SOFT, "optimizer.zero_grad()", "pass", L2SOFT),
        (L2SOFT, "import sys\n", "import os\nimport sys\n", L2SOFT),
        (L2SOFT, "@torch.no_grad()\ndef predict_values", "def predict_values", L2SOFT),
        (L2SOFT, "def by_task", "def by_tasks", L2SOFT),  # it is gone
        (SAC, "delta = alpha * agent.mu.mean(0)", "delta = alpha * agent.mu.sum(0)", SAC),
        (PPO, WEIGHT, "return torch.baddbmm(bias, x, weight.mT).relu()", SAC),
    ],
)
def test_drift_is_seen(edit, edited, old, new, seen_in):
    assert not siblings.drifted(seen_in)
    edit(edited, old, new)
    assert any(new.strip().splitlines()[-1] in line or "differ" in line for line in siblings.drifted(seen_in))


def test_what_is_the_methods_own_is_free(edit):
    edit(L2SOFT, "        return self.theta + self.mu\n", "        return self.mu + self.theta\n")
    edit(L2SOFT, "def check(", "SCALE = 1\ndef check(")
    assert not siblings.drifted(L2SOFT)


def test_too_long_a_difference_is_seen(edit):
    edit(
        L2SOFT,
        "def check(",
        "def penalty(x):\n" + "    x += 1\n" * siblings.LONGER[L2SOFT] + "\n\ndef check(",
    )
    assert "more than" in siblings.drifted(L2SOFT)[-1]


def test_the_order_of_definitions_is_held(edit):
    edit(L2SOFT, "def by_task", "def by_task_x")
    edit(L2SOFT, "def check(", "def by_task(x):\n    pass\n\n\ndef check(")
    assert "not in the same order" in siblings.drifted(L2SOFT)[0]
