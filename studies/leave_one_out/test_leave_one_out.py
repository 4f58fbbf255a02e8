"""Leave-one-out: what its runs are, what they begin with, and what is made of them."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import probes
import pytest

from bench import launch
from bench.collect import EVALUATION, parameters, read
from bench.methods import METHODS
from bench.suites import SETTINGS
from envs.evaluation import evaluate
from studies.leave_one_out import report as loo_report
from studies.leave_one_out import runs as loo

SUITE = loo.SUITES["cartpole-goals-physics10"]
SMALL = "--num-steps 16 --num-minibatches 2 --hidden-sizes 8 --eval-episodes 3 --eval-interval-episodes 3"


@pytest.fixture(autouse=True)
def without_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loo, "ROOT", tmp_path)  # whose results/ has no choice of step sizes


def parse(job):
    script = probes.load_script(job.script)
    return script, probes.parse(script, *job.flags.split(), "--run-name", job.name)


def choose(name="cartpole-goals-physics10", rate="0.01"):
    """As if a search had."""
    loo.FOLDER.mkdir(parents=True, exist_ok=True)
    rows = [(name, regime, rate, 1.0, 1.0, True) for regime in loo.REGIMES]
    columns = ["suite", "regime", "rate", "mean", "final", "chosen"]
    pd.DataFrame(rows, columns=columns).to_csv(loo.SETTINGS, index=False)


def test_an_environment_may_take_the_step_sizes_of_another():
    """As it takes that one's settings: then it has no search of its own."""
    easy = loo.SUITES["cartpole10"]
    for suite in loo.SUITES.values():
        assert len(suite.reported) == 5 and not {*suite.reported} & {*suite.searched}
    first = loo.all_jobs(easy, (1,))[: 36 + 288]
    assert {parse(job)[1].env_id for job in first[::40]} == {SUITE.name}
    choose("cartpole10")
    assert not easy.rates()
    choose(SUITE.name, "0.03")
    jobs = loo.all_jobs(easy, (1,))
    assert set(easy.rates().values()) == {"0.03"} and len(jobs) == 5 * 6 + 5 * 8
    assert {parse(job)[1].env_id for job in jobs[::10]} == {"cartpole10"}


def test_adaptations_start_from_models_that_have_not_seen_their_task():
    jobs = loo.all_jobs(SUITE, (1,))
    assert len(jobs) == len({job.name for job in jobs}) == 3 * 2 * 6 + 3 * 2 * 8 * 6 + 5 * 6
    choose()
    models = {job.name: parse(job)[1] for job in SUITE.models(SUITE.reported, (1, 2))}
    assert len(models) == 5 * 6 * 2
    for args in models.values():
        assert len(args.tasks) == 9 and args.total_timesteps == 900_000 and not args.load
    cases, loads = SUITE.adaptations((1, 2)), {}
    assert len(cases) == 5 * 8 * 2
    for job, (regime, task, seed) in cases.items():
        script, args = parse(job)
        script.check(args)
        assert args.tasks == (task,) and args.seed == 1000 + seed and args.learning_rate == 0.01
        assert args.total_timesteps == 100_000 and args.eval_interval == 4096
        assert job.script == METHODS[loo.REGIMES[regime].method].script
        frozen = regime not in ("scratch", "fine-tuning", "task-blind")
        assert getattr(args, "freeze_theta", False) == frozen
        assert getattr(args, "reptile_alpha", 0) == 0
        if regime == "scratch":
            assert not args.load
            continue
        model = models[Path(args.load).name]
        assert task not in model.tasks and model.seed == seed and model.exp_name == loo.REGIMES[regime].method
        loads[task, seed, regime] = args.load
        for name in ("rank", "embedding_size", "hidden_sizes", "sigma_prior", "beta", "l2_coef"):
            assert getattr(args, name, None) == getattr(model, name, None)
    assert len({*loads.values()}) == 5 * 6 * 2
    assert all(loads[0, seed, "residual"] == loads[0, seed, "fine-tuning"] for seed in (1, 2))


def test_a_step_size_of_which_a_run_failed_is_not_chosen(monkeypatch):
    monkeypatch.setattr(loo, "REGIMES", {"scratch": loo.REGIMES["scratch"]})
    finished = [x for x, (_, rate) in SUITE.trials().items() if rate != "0.3"]
    monkeypatch.setattr(loo.Job, "finished", property(lambda x: x in finished))
    rates = {x.name: float(rate) for x, (_, rate) in SUITE.trials().items()}
    monkeypatch.setattr(loo, "curve_of", lambda x: pd.Series([rates[x.name]]))
    loo.choose(SUITE)
    assert SUITE.rates() == {"scratch": "0.1"}


def write_settings(suite="small"):
    SETTINGS.parent.mkdir(parents=True)
    methods = {how.method for how in loo.REGIMES.values()}
    rows = [(suite, method, f"{SMALL} --learning-rate 0.01") for method in methods]
    pd.DataFrame(rows, columns=["suite", "method", "settings"]).assign(search=1).to_csv(SETTINGS, index=False)


@pytest.mark.slow
def test_from_search_to_report(monkeypatch):
    """The whole of it, tiny: searched, trained, adapted, collected; the second time nothing is run again."""
    write_settings("cartpole-goals10")
    few = {name: loo.REGIMES[name] for name in ("scratch", "residual")}
    for name, value in {"REGIMES": few, "STEPS_OF_TASK": 512, "INTERVAL": 128, "SEEDS": (101,)}.items():
        monkeypatch.setattr(loo, name, value)
    monkeypatch.setattr(loo, "RATES", ("0.001", "1e-30"))
    monkeypatch.setattr(loo_report, "REGIMES", few)
    suite = loo.LeaveOneOut("cartpole-goals10", "cartpole-goals10", (4,), (5,))
    monkeypatch.setitem(loo.SUITES, suite.name, suite)
    assert loo.run(suite, (1,))
    table = pd.read_csv(loo.SETTINGS, dtype={"rate": str})
    assert len(table) == 2 * 2 and table.chosen.sum() == 2
    best = table.loc[table.groupby("regime")["mean"].idxmax()]
    assert dict(zip(best.regime, best.rate)) == suite.rates()
    loo.collect_runs(suite, (1,))
    text = loo_report.report(suite.name)
    assert Path(loo.FOLDER, suite.name, "table.md").read_text(encoding="utf-8") == text
    runs, configs = read(loo.FOLDER / suite.name)
    assert list(configs.setting) == ["scratch-4", "residual-4"]
    before = runs[runs.step == 0].groupby("metric").setting.apply(list)
    assert before[EVALUATION] == before[loo.TRAINED] == ["scratch-4", "residual-4"]
    assert before[loo.WITH_MEAN] == ["residual-4"]
    started = []
    monkeypatch.setattr(launch, "_run", lambda job, folder: started.append(job) or 1)
    assert loo.run(suite, (1,)) and not started
    shutil.rmtree("runs")  # runs that are gone stay in the CSVs, and the report is made of these
    loo.collect_runs(suite, (1,))
    assert loo_report.report(suite.name) == text
    panels = loo_report.plot(loo_report.Adaptations(loo.FOLDER / suite.name)).axes
    assert {ax.get_ylim()[0] for ax in panels} == {0.0}


@pytest.mark.parametrize("regime", ["scratch", "residual", "lora", "task-blind"])
def test_before_is_what_a_run_that_does_not_move_ends_with(regime, monkeypatch):
    write_settings()
    monkeypatch.setattr(loo, "STEPS_OF_TASK", 512)
    suite = loo.LeaveOneOut("cartpole10", "small", (4,), (5,))
    how = loo.REGIMES[regime]
    if how.start != "scratch":
        script, args = parse(suite.model(how.method, 4, 1))
        script.train(args)
        saved = probes.load(Path("runs", args.run_name))["agent"]
    job = suite.adaptation(regime, "1e-30", 4, 1)
    script, args = parse(job)
    folder = script.train(args)
    alone, with_mean = loo.before(folder)
    assert alone == pytest.approx(loo.curve_of(job).iloc[-1], rel=1e-4)
    assert np.isnan(with_mean) == (regime != "residual")
    own, every = parameters(probes.load(folder)["agent"])
    theta = 0 if regime == "scratch" else probes.load(folder)["agent"]["theta"].numel()
    assert every - own == theta and (own > 0) == (regime != "task-blind")
    if regime == "residual":  # by hand
        agent, _ = probes.load_agent(script, folder)
        agent.mu.zero_()
        agent.theta.copy_(saved["theta"] + saved["mu"].mean(0))
        assert evaluate(agent, probes.envs.make("cartpole10", 3, (4,)), 1001).returns.mean() == with_mean


def write_results(name="cartpole-goals10", tasks=(0, 4), seeds=10, **gains):
    """Made-up runs: Scratch reaches 100 at step 40, the others so many steps earlier or later."""
    folder = loo.FOLDER / name
    folder.mkdir(parents=True)
    configs, rows = [], []
    for regime, gain in {"scratch": 0, **gains}.items():
        for task in tasks:
            for seed in range(1, seeds + 1):
                key = {"env": name, "method": loo.REGIMES[regime].method, "setting": f"{regime}-{task}"}
                configs.append(key | {"seed": seed, "steps": 100, "commit": "abc", "hardware": "abacus"})
                first = {EVALUATION: 0.0, loo.RATE: 0.1, loo.TRAINED: 7}
                if regime == "residual":
                    first[loo.WITH_MEAN] = 5.0
                when = 40 + 10 * (seed % 2) - gain
                points = [(metric, 0, x) for metric, x in first.items()]
                points += [(EVALUATION, s, 100.0 * (s >= when)) for s in range(10, 101, 10)]
                rows += [(*key.values(), seed, metric, "mean", s, x) for metric, s, x in points]
    columns = ["env", "method", "setting", "seed", "metric", "task", "step", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "runs.csv", index=False)
    pd.DataFrame(configs).to_csv(folder / "configs.csv", index=False)
    return loo_report.Adaptations(folder)


def test_steps_count_from_the_task_and_a_run_that_never_learns_counts_as_long_as_it_is():
    x = write_results(residual=20, **{"fine-tuning": -1000, "task-blind": 0})
    assert x.target == {0: 90.0, 4: 90.0}
    assert x.steps("scratch", 0).tolist() == [50, 40] * 5
    assert x.steps("residual", 4).tolist() == [30, 20] * 5
    assert np.isinf(x.steps("fine-tuning", 0)).all()
    assert x.mean_steps("fine-tuning").tolist() == [100] * 10
    found = x.comparisons()
    assert [c.verdict for c in found.values()] == ["faster"] * 3 and found["scratch"].interval.center == -20
    answer, text = loo_report.claim_7(x)
    assert answer.startswith("supported; against full fine-tuning: faster")
    assert "| Scratch | -20 [-20, -20] |" in text
    table = loo_report.make_table(x)
    assert "- [-, -] (10)" in table and "| 0 of 20 |" in table and "| 20 of 20 |" in table
    assert "Residual adaptation, before, with the other tasks' mean residual added to theta: 5.0 [" in table


def test_no_verdict_where_a_task_blind_network_can_do_it_at_once():
    x = write_results(residual=20, **{"task-blind": 20})
    before = (x.runs.regime == "task-blind") & (x.runs.step == 0) & (x.runs.metric == EVALUATION)
    for rows, answer in ((before & (x.runs.held_out == 0), "supported"), (before, "this suite cannot tell")):
        x.runs.loc[rows, "value"] = 95.0  # of 90, on one task of two, then on both
        assert loo_report.claim_7(x)[0].startswith(answer)


def test_what_is_known_before_training_counts_as_no_steps():
    x = write_results(residual=20)
    x.curves["residual", 0].loc[:, 0] = 95.0
    assert x.steps("residual", 0).tolist() == [30, 20] * 5  # not by an evaluation alone
    x.curves["residual", 0].loc[:, 10] = 95.0
    assert x.steps("residual", 0).tolist() == [0] * 10
    x.curves["residual", 0].loc[:, 20:90] = 0.0
    x.curves["residual", 0].loc[:, :10] = 0.0
    assert np.isinf(x.steps("residual", 0)).all()  # nor by the last alone


def test_faster_in_fewer_runs_is_not_faster():
    x = write_results(tasks=range(5), residual=20)
    assert x.comparisons()["scratch"].verdict == "faster"
    for task in range(5):
        x.curves["residual", task].loc[:] = 0.0 if task == 4 else 100.0
    assert x.mean_steps("residual").tolist() == [20] * 10
    fewer = "faster, but Residual adaptation gets there in fewer runs"
    assert x.comparisons()["scratch"].verdict == fewer


def test_seeds_that_are_not_complete_do_not_count():
    write_results(residual=20, seeds=3)
    path = loo.FOLDER / "cartpole-goals10/runs.csv"
    runs = pd.read_csv(path)
    lost = ((runs.seed == 3) & (runs.setting == "residual-4")) | (
        (runs.seed == 2) & (runs.setting == "scratch-0")
    )
    runs[~lost].to_csv(path, index=False)
    x = loo_report.Adaptations(path.parent)
    assert set(x.runs.seed) == set(x.steps("residual", 0).index) == {1}


def test_novelty_is_a_range_of_the_other_tasks():
    params = [{"gravity": g, "goal": x} for g, x in ((1.0, 0.5), (2.0, -1.0), (9.0, 0.0))]
    assert loo_report.novelty(0, params) == "goal beyond, gravity beyond"
    assert loo_report.novelty(1, params) == "goal beyond, physics between"
    assert loo_report.novelty(2, [x | {"gravity": 1.0} for x in params]) == "goal between"
