"""Verdicts on the claims, on made-up numbers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.collect import DIRECTION, NORMS, SECONDS
from bench.tables import Result, Scores
from studies.claims import __main__ as claims
from studies.conftest import cells_of


def scores(final, curve=None, steps=(100, 200)):
    final = pd.DataFrame(np.asarray(final, float))
    curve = np.zeros((len(final), 2)) if curve is None else np.asarray(curve, float)
    return Scores(final, pd.DataFrame(curve, columns=steps))


def make_scores(**means):
    rng = np.random.default_rng(0)
    names = {name.replace("_", "-"): mean for name, mean in means.items()}
    return {name: scores(mean + rng.normal(size=(10, 1)) + np.zeros((1, 3))) for name, mean in names.items()}


def test_verdicts_on_claim_1():
    best = make_scores(varshare=100, l2soft=100, pcgrad=90, hard_sharing=80)
    answer, text = claims.claim_1(best)
    assert answer == "supported" and text.count("| better |") == 4
    assert "better in 0 of 4 comparisons, worse in 0" in text  # as fast
    answer, _ = claims.claim_1(best | make_scores(contextual=110))
    assert answer == "supported in 4 of 6 comparisons, worse in 2"
    assert claims.claim_1(make_scores(varshare=50, pcgrad=90))[0] == "not supported, against PCGrad alone"
    answer, text = claims.claim_1(make_scores(varshare=100, pcgrad=99))  # significant, of no importance
    assert answer == "not supported, against PCGrad alone" and "| the same |" in text
    unrelated = {"varshare_sac": 50, "varshare_recentred": 50, "task_blind": 200}  # not what is claimed
    assert claims.claim_1(best | make_scores(**unrelated)) == claims.claim_1(best)
    assert claims.claim_1(make_scores(varshare=100)) is None
    recentred = make_scores(varshare_recentred=100, pcgrad=90, hard_sharing=90)  # all there is
    assert claims.claim_1(recentred)[0] == "supported"
    rng = np.random.default_rng(1)
    fast = {m: scores(s.final, (m == "varshare") + rng.normal(size=(10, 2)) / 9) for m, s in best.items()}
    assert "better in 2 of 4 comparisons, worse in 0" in claims.claim_1(fast)[1]
    assert claims.claim_1(fast)[0] == "supported"  # which says where they end
    single = {name: scores(s.final[:1]) for name, s in best.items()}
    answer, text = claims.claim_1(single)
    assert answer == "not decided" and "| undecided |" in text


def test_verdicts_on_claim_2():
    assert claims.claim_2(make_scores(varshare=100, l2soft=101))[0] == "supported"
    assert claims.claim_2(make_scores(varshare=100, l2soft=50))[0] == "not supported"
    both = {"varshare_recentred": 100, "l2soft_recentred": 99}
    answer, text = claims.claim_2(make_scores(varshare=103, l2soft=100, **both))
    assert answer == "supported" and text.count("| the same |") == 2  # each with its own kind
    assert claims.claim_2(make_scores(varshare=50, l2soft=100, **both))[0] == "not supported"
    unclear = {"varshare": scores([[0.0], [200.0]]), "l2soft": scores([[10.0], [195.0]])}
    assert claims.claim_2(unclear)[0] == "not decided"
    assert claims.claim_2(make_scores(varshare=100)) is None
    assert claims.claim_2(make_scores(varshare_sac=100, l2soft=50)) is None  # of another algorithm


def test_verdicts_on_claim_4():
    others = {"varshare": 100, "varshare_recentred": 101, "varshare_lora": 99, "varshare_annealed": 90}
    for reptile, answer in ((130, "supported"), (101, "not supported"), (60, "not supported")):
        assert claims.claim_4(make_scores(varshare_reptile=reptile, **others))[0] == answer
    _, text = claims.claim_4(make_scores(varshare_reptile=100, **others, l2soft=90, pcgrad=80))
    assert len(cells_of(text)) == 1 and text.count("| VarShare-Reptile |") == 4  # one row for each variant
    assert claims.claim_4(make_scores(varshare=100, varshare_lora=100)) is None


def test_verdicts_on_claim_5():
    own = pd.DataFrame({"method": ["varshare", "varshare-lora"], "value": [900, 90]})
    own["metric"] = "parameters/own"
    for lora, answer in ((100, "supported"), (120, "supported"), (60, "not supported")):
        found, text = claims.claim_5(make_scores(varshare=100, varshare_lora=lora), own)
        assert found == answer and "Own parameters per task: 90 and 900." in text
    assert claims.claim_5(make_scores(varshare=100, varshare_reptile=100), own) is None


def write_suite(name, means, env="cartpole10", seeds=6, searched_on="", size=1.0, first_seed=1, scatter=1.0):
    """A suite whose methods have these mean returns; size: norm of the residuals at the end."""
    rng, rows, configs = np.random.default_rng(0), [], []
    for method, mean in means.items():
        for seed in range(first_seed, first_seed + seeds):
            x = mean + scatter * rng.normal()
            values = [("eval/episodic_return", task, 1000, x) for task in ("a", "b", "mean")]
            values.append((SECONDS, "mean", 1000, 5.0))
            if method == "varshare":
                values += [("residual/ratio", "mean", 1000, size), ("parameters/own", "mean", 1000, 5)]
                values += [(metric, "mean", s, size * s / 1000) for metric in NORMS for s in (500, 1000)]
            rows += [(env, method, "", seed, *value) for value in values]
            configs.append((env, method, "", seed, 1000, searched_on or name, "", "abc", "abacus"))
    folder = Path("results/suites", name)
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["env", "method", "setting", "seed", "metric", "task", "step", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "runs.csv", index=False)
    columns = [*columns[:4], "steps", "searched_on", "command", "commit", "hardware"]
    pd.DataFrame(configs, columns=columns).to_csv(folder / "configs.csv", index=False)
    return Result(folder)


def say():
    """The verdicts, without figures."""
    return claims.verdicts([Result(path) for path in sorted(Path("results/suites").iterdir())], [])


def report():
    return claims.report(Path("results/studies/claims"))


def test_verdicts_on_claim_6():
    """SAC minus PPO, method by method, of suites of the same environment and length."""
    ppo = write_suite("ppo", {"independent": 100, "l2soft": 100, "varshare": 100, "pcgrad": 100})

    def answer_to(independent, l2soft, varshare, reptile=0):
        means = {"independent": independent, "l2soft": l2soft, "varshare": varshare}
        means["varshare-reptile"] = reptile  # which PPO's suite lacks
        sac = write_suite("sac", {f"{method}-sac": x for method, x in means.items()})
        assert claims.beside_ppo([ppo, sac], "sac") == [(sac, ppo)]
        return claims.claim_6(sac, ppo)

    answer, text = answer_to(110, 120, 130)
    table = cells_of(text.partition("On the way")[0])
    assert answer == "supported" and {cells["SAC is"] for cells in table.values()} == {"better"}
    assert set(table) == {"Independent", "L2Soft", "VarShare"}
    assert table["VarShare"]["SAC minus PPO"].startswith("30.0 [")
    assert answer_to(110, 100, 130)[0] == "supported in 2 of 3 methods"
    assert answer_to(90, 80, 130)[0] == "supported in 1 of 3 methods, worse in 2"
    write_suite("ppo-2", {"l2soft": 100}, first_seed=2)  # of other seeds
    text = say()
    assert "## C6 on sac and ppo: supported in 1 of 3 methods" in text and text.count("## C6") == 1
    other = write_suite("reptile", {"varshare-reptile-sac": 1})
    assert claims.claim_6(other, ppo) is None
    assert claims.beside_ppo([ppo, write_suite("far", {"l2soft-sac": 1}, env="cartpole20")], "sac") == []


def test_verdicts_on_claim_9():
    """VarShare's alone, with Holm's correction for the others."""
    ppo = write_suite("ppo", {"task-blind": 10, "l2soft": 100, "varshare": 100})
    verdicts = {130: "supported", 100.1: "not supported: the same", 60: "not supported: worse"}
    wide = write_suite("vmpo", {"varshare-vmpo": 100}, scatter=90)
    assert claims.claim_9(wide, ppo)[0] == "not decided"
    for mean, expected in verdicts.items():
        means = {"task-blind-vmpo": 10, "l2soft-vmpo": 200, "varshare-vmpo": mean}
        vmpo = write_suite("vmpo", means)
        assert claims.beside_ppo([ppo, vmpo], "vmpo") == [(vmpo, ppo)]
        answer, text = claims.claim_9(vmpo, ppo)
        assert answer == expected and len(cells_of(text.partition("On the way")[0])) == 3
        assert f"## C9 on vmpo and ppo: {expected}" in say()
    assert claims.claim_9(write_suite("vmpo", {"l2soft-vmpo": 1}), ppo) is None


def test_evaluations_on_the_way_of_both_algorithms():
    """Interpolated to fifths of the steps; the figures show the seconds of each."""
    names = {"SAC": "varshare-sac", "PPO": "varshare"}
    both = []
    for slope, seconds, (label, method) in zip((1.0, 0.5), (50.0, 5.0), names.items()):
        x = write_suite(label, {method: 1})
        steps = np.arange(100, 1001, 300)
        x.by_method = {method: scores(np.full((6, 2), 9.0), np.tile(slope * steps, (6, 1)), steps)}
        x.runs.loc[x.runs.metric == SECONDS, "value"] = seconds
        both.append(x)
    assert (
        "| VarShare | 200 / 100 | 400 / 200 | 600 / 300 | 800 / 400 | 1000 / 500 |"
        in claims.claim_6(*both)[1]
    )
    end = both[0].runs[both[0].runs.metric == SECONDS][:1].assign(seed=99, step=1100, value=70.0)
    both[0].runs = pd.concat([both[0].runs, end])  # a run whose rollouts end later: all of them count
    assert claims.seconds_of(both[0], "varshare-sac") == 50
    for against, ends in (("steps", (1000, 1000)), ("time", (50, 5))):
        (ax,) = claims.plot_cost(*both, "SAC", against).axes
        assert {x.get_label(): x.get_xdata()[-1] for x in ax.get_lines()} == dict(zip(names, ends))


def test_no_verdict_where_task_blind_does_as_well():
    """However far the methods are apart among themselves; SAC has controls of its own."""
    for name, blind in (("even", 100), ("uneven", 60)):
        means = {"task-blind": blind, "varshare": 100, "l2soft": 99, "independent": 50}
        write_suite(name, means)
        write_suite(f"{name}-sac", {f"{method}-sac": x for method, x in means.items()})
    text = say()
    answers = {
        "C1 VarShare and L2Soft beat the other baselines": "supported, against Independent",  # alone
        "C2 VarShare and L2Soft are the same": "supported** |",
    }
    for claim, answer in answers.items():
        for suffix in ("", "-sac"):
            assert f"| {claim} | even{suffix} | **this suite cannot tell** |" in text
            assert f"| {claim} | uneven{suffix} | **{answer}" in text
    assert "- even: **cannot tell methods apart**: task-blind is not beaten" in text
    assert "- uneven: **can tell methods apart**" in text
    assert "## C1 on even: this suite cannot tell" in text and "## C1 on uneven: supported" in text


@pytest.mark.parametrize(
    ("size", "answer"),
    [
        (0.01, "supported"),
        (0.5, "not supported: smaller on identical tasks for 1 of 1 methods, but not small"),
    ],
)
def test_verdicts_on_claim_8(size, answer):
    means = {"task-blind": 100, "varshare": 100}
    different = write_suite("cartpole", means, seeds=3)
    same = write_suite("same", means, "cartpole-identical10", 3, "cartpole", size)
    write_suite("other", means, seeds=3)  # with settings of its own
    text = report()
    assert Path("results/studies/claims/table.md").read_text(encoding="utf-8") == text
    assert f"## C8 on same and cartpole: {answer}\n" in text and text.count("## C8") == 1
    assert f"quotient {size:.2f} [{size:.2f}, {size:.2f}]" in text
    (ax,) = claims.plot_residuals([same, different]).axes
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]  # others are runs
    curves = {line.get_label(): line.get_ydata()[-1] for line in named}
    means = {label: y for label, y in curves.items() if not label.startswith("_")}  # and not of single runs
    assert means == pytest.approx({"cartpole-identical10": size, "cartpole10": 1.0})
    write_suite("same", means, "cartpole-identical10", 1, "cartpole", size)  # too few runs
    assert "## C8" not in report()


def test_verdicts_on_claim_11():
    """By the correlation of each run, of each method."""
    write_suite("goals", {"varshare": 100, "l2soft": 99})
    path = Path("results/suites/goals/runs.csv")
    rows = pd.read_csv(path)
    ends = rows[rows.task == "mean"].drop_duplicates(["method", "seed"]).assign(metric=DIRECTION)
    for low, answer in ((0.5, "supported"), (-0.5, "supported for some methods")):
        found = ends.assign(value=np.where(ends.method == "varshare", 0.7, low) + 0.01 * ends.seed)
        pd.concat([rows, found]).to_csv(path, index=False)
        says, text = claims.claim_11(Result(path.parent))
        assert says == answer and "VarShare: 0.7" in text
    assert claims.claim_11(write_suite("none", {"varshare": 100})) is None


def test_a_variant_that_is_worse_is_so_where_sharing_gains_nothing():
    means = {
        "task-blind": 50,
        "independent": 100,
        "varshare": 100,
        "varshare-reptile": 80,
        "varshare-lora": 100,
    }
    write_suite("converged", means)
    text = report()
    assert (
        "| C4 Re-centring task by task, as its author wrote it, is the best variant | converged | **not"
        in text
    )
    assert (
        "| C1 VarShare and L2Soft beat the other baselines | converged | **this suite cannot tell** |" in text
    )
