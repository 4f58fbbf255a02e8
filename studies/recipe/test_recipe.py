"""Settings by success, beside the base on the same seeds."""

from studies.conftest import cells_of, made_up
from studies.recipe.__main__ import report


def test_recipes_by_success_and_beside_the_base_on_the_same_seeds():
    finals = {"base": {101: 400, 102: 400, 103: 800}, "2-environments": {101: 600, 102: 600}}
    cases = {
        ("mt10", f"hard-sharing@{setting}", seed): (mean - 100.0, mean + 100.0)
        for setting, seeds in finals.items()
        for seed, mean in seeds.items()
    }
    rows = cells_of(report(made_up("recipe", cases)))
    assert list(rows) == ["2 environments", "base"]
    assert rows["base"]["runs"] == "3" and rows["base"]["success, %"].startswith("53.3 [")
    assert list(rows["base"].values())[3:] == ["", "", "43", "63"]
    assert rows["2 environments"]["minus base, same seeds"] == "20.0 [20.0, 20.0]"
