"""The project's claims, each with a verdict and the numbers behind it: results/studies/claims/table.md.

Everything is made from the CSVs of the suites in results/suites, and for C7 of the study leave_one_out. Which
methods a claim compares is said by their families in methods.csv, not by their names.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.collect import DIRECTION, NORMS, SECONDS, read
from bench.figures import (
    CYCLE,
    STYLE,
    add_legend,
    begin_at,
    bounds_of,
    describe_runs,
    draw_curve,
    has_label_x,
    label_steps,
    make_panels,
    save,
    start_figure,
)
from bench.methods import METHODS, base_of, fail, title_of
from bench.statistics import (
    MARGIN,
    Interval,
    across,
    compare,
    difference,
    judge,
    margin,
    mean_interval,
    search_noise,
)
from bench.tables import Result, Scores, markdown
from studies import folder_of, report_study
from studies.leave_one_out.report import Adaptations, claim_7
from studies.leave_one_out.runs import LORA
from studies.many_tasks.__main__ import claim_10, read_suites
from studies.zero_shot.__main__ import claim_12

SMALL = 0.1  # residuals on identical tasks are small if below this share of those on different tasks


def of_family(by_method: dict[str, Scores], *families: str, variants: bool = False) -> list[str]:
    """Methods of these families, with or without variants by flags, with PPO, or what all methods have."""
    known = [METHODS[method] for method in by_method if method in METHODS]
    found = {Path(m.script).stem.rpartition("_")[2] for m in known}
    ending = f"_{found.pop() if len(found) == 1 else 'ppo'}.py"
    return [
        m.name
        for m in known
        if m.family in families and m.script.endswith(ending) and (variants or not m.variant)
    ]


def improvement(x: pd.DataFrame, y: pd.DataFrame) -> float:
    """P(a run of x scores above one of y on a task), ties half, mean over tasks; (run, task) each."""
    x, y = x.to_numpy()[:, None], y.to_numpy()[None]
    return float(np.mean((x > y) + 0.5 * (x == y)))


def compared(
    by_method: dict[str, Scores], pairs: list[tuple[str, str]], what: str = "means"
) -> tuple[list[str], str]:
    """Verdicts on pairs of methods, corrected for their number, and the table of them; what: or "area"."""
    values = {method: getattr(s, what) for method, s in by_method.items()}
    found = compare([(values[x], values[y]) for x, y in pairs], noise=search_noise(values))
    rows = []
    for (x, y), c in zip(pairs, found):
        chance = improvement(by_method[x].final, by_method[y].final)
        cells = [title_of(x), title_of(y), c.interval.text(), f"{c.p:.2g}", f"{c.within:.1f}"]
        rows.append([*cells, f"{chance:.2f}", c.verdict])
    columns = ["method", "and", "difference of means", "p (Holm)", "margin", "probability of improvement"]
    return [c.verdict for c in found], markdown([*columns, "verdict"], rows)


def answer_of(verdicts: list[str], what: str) -> str:
    """To a claim that all of these, called so, are "better"."""
    won, lost = verdicts.count("better"), verdicts.count("worse")
    if not won:
        return "not decided" if set(verdicts) == {"undecided"} else "not supported"
    if won == len(verdicts):
        return "supported"
    return f"supported in {won} of {len(verdicts)} {what}" + f", worse in {lost}" * (lost > 0)


def claim_1(by_method: dict[str, Scores]) -> tuple[str, str] | None:
    """VarShare and L2Soft beat the other baselines."""
    families = ("varshare", "l2soft")
    ours = of_family(by_method, *families) or of_family(by_method, *families, variants=True)  # all there is
    pairs = [(m, b) for m in ours for b in of_family(by_method, "rival")]
    if not pairs:
        return None
    verdicts, table = compared(by_method, pairs)
    answer = answer_of(verdicts, "comparisons")
    test = "p below 5 % in every comparison, and not the same within the margin"
    rivals = list(dict.fromkeys(title_of(b) for _, b in pairs))
    if len(rivals) == 1:  # the claim says "the other baselines"
        answer += f", against {rivals[0]} alone"
    text = f"Test: {test}. Baselines that ran: {', '.join(rivals)}.\n\n{table}"
    if all(by_method[m].timed for pair in pairs for m in pair):  # evaluated on the way
        verdicts, table = compared(by_method, pairs, "area")
        won, lost = verdicts.count("better"), verdicts.count("worse")
        text += "\nHow fast they get there, by the area under the evaluations: "
        text += f"better in {won} of {len(pairs)} comparisons, worse in {lost}.\n\n{table}"
    return answer, text


def claim_2(by_method: dict[str, Scores]) -> tuple[str, str] | None:
    """VarShare and L2Soft are the same."""
    ours, theirs = (of_family(by_method, family, variants=True) for family in ("varshare", "l2soft"))
    pairs = [(x, y) for x in ours for y in theirs if METHODS[x].flags == METHODS[y].flags]
    if not pairs:
        return None
    verdicts, table = compared(by_method, pairs)
    apart = {"better", "worse"} & set(verdicts)
    answer = "not supported" if apart else "supported" if set(verdicts) == {"the same"} else "not decided"
    test = f"the 95 % interval of the difference lies within {MARGIN:.0%} of the better mean"
    return answer, f"Test: {test}.\n\n{table}"


def claim_4(by_method: dict[str, Scores]) -> tuple[str, str] | None:
    """Re-centring task by task, as its author wrote it, is the best variant."""
    ours, others = (
        of_family(by_method, "reptile"),
        of_family(by_method, "varshare", "lora", "variant", variants=True),
    )
    if not (ours and others):
        return None
    verdicts, table = compared(by_method, [(ours[0], other) for other in others])
    answer = "not decided"
    if {"worse", "the same"} & set(verdicts):
        answer = "not supported"
    elif set(verdicts) == {"better"}:
        answer = "supported"
    return answer, f"Test: better than every other variant, p below 5 %.\n\n{table}"


def claim_5(by_method: dict[str, Scores], runs: pd.DataFrame) -> tuple[str, str] | None:
    """LoRA costs little return for far fewer task parameters."""
    pair = [*of_family(by_method, "lora"), *of_family(by_method, "varshare")]
    if len(pair) < 2:
        return None
    _, table = compared(by_method, [tuple(pair[:2])])
    noise = search_noise({m: s.means for m, s in by_method.items()})
    d = difference(*(by_method[m].means for m in pair[:2]), noise).interval
    within = margin(by_method[m].means.mean() for m in pair[:2])
    answer = "supported" if d.low > -within else "not supported" if d.high < -within else "not decided"
    own = [runs[(runs.method == m) & (runs.metric == "parameters/own")].value.median() for m in pair[:2]]
    text = f"Test: the 95 % interval of the difference lies above minus {MARGIN:.0%} of the better mean.\n\n"
    text += f"{table}\nOwn parameters per task: {own[0]:,.0f} and {own[1]:,.0f}.\n"
    return answer, text


def in_both(other: Result, ppo: Result) -> list[tuple[str, str]]:
    """Names of every method that two suites have, one of them with another algorithm than PPO."""
    pairs = [(method, base_of(method)) for method in other.by_method]
    return [(x, y) for x, y in pairs if y in ppo.by_method]


def seconds_of(x: Result, method: str) -> float:
    """Of a run, the median; how many steps it has depends on the length of its rollouts."""
    return float(x.logged(method, SECONDS).ffill(axis=1).iloc[:, -1].median())


def against_ppo(other: Result, ppo: Result, name: str) -> tuple[list[str], str]:
    """Verdicts on every method with another algorithm, of this name, minus the same with PPO; their table."""
    pairs = in_both(other, ppo)
    noises = [search_noise(x.values("means")) for x in (other, ppo)]
    values = [(other.by_method[x].means, ppo.by_method[y].means) for x, y in pairs]
    within = [margin((x.mean(), y.mean())) for x, y in values]
    judged = judge([across(x, y, *noises) for x, y in values], within)
    rows = []
    for names, means, c in zip(pairs, values, judged):
        seconds = [seconds_of(x, m) for x, m in zip((other, ppo), names)]
        numbers = [f"{mean.mean():.1f}" for mean in means]
        rows.append([title_of(names[1]), *numbers, *c.cells(), *(f"{s:.0f}" for s in seconds)])
    columns = ["method", name, "PPO", f"{name} minus PPO", "p (Holm)", f"{name} is"]
    table = markdown([*columns, f"seconds, {name}", "seconds, PPO"], rows)
    text = "Runs of the two are not paired; intervals are over the searches and the runs of both."
    return [c.verdict for c in judged], f"{text}\n\n{table}\n{on_the_way(other, ppo, name)}"


def on_the_way(other: Result, ppo: Result, name: str) -> str:
    """Means over runs of the evaluations on the way at fifths of the steps, with another algorithm / PPO."""
    steps = [ppo.steps * fifth // 5 for fifth in range(1, 6)]
    rows = []
    for names in in_both(other, ppo):
        curves = [x.by_method[m].curve.mean() for x, m in zip((other, ppo), names)]
        numbers = zip(*(np.interp(steps, curve.index, curve) for curve in curves))
        rows.append([title_of(names[1]), *(f"{x:.0f} / {y:.0f}" for x, y in numbers)])
    text = f"On the way, {name} / PPO. PPO's step size falls until the end of a run: a run of a fifth "
    text += "of the steps would end higher than its number here.\n\n"
    return text + markdown(["method", *(f"{step:,}" for step in steps)], rows)


def claim_6(sac: Result, ppo: Result) -> tuple[str, str] | None:
    """SAC needs fewer samples than PPO."""
    if not in_both(sac, ppo):
        return None
    verdicts, text = against_ppo(sac, ppo, "SAC")
    test = f"Test: better after {sac.steps:,} steps, p below 5 %, for every method."
    return answer_of(verdicts, "methods"), f"{test} {text}"


def claim_9(vmpo: Result, ppo: Result) -> tuple[str, str] | None:
    """VarShare with V-MPO is better than with PPO."""
    ours = [i for i, (x, _) in enumerate(in_both(vmpo, ppo)) if x in of_family(vmpo.by_method, "varshare")]
    if not ours:
        return None
    verdicts, text = against_ppo(vmpo, ppo, "V-MPO")
    verdict = verdicts[ours[0]]
    answer = {"better": "supported", "undecided": "not decided"}.get(verdict, f"not supported: {verdict}")
    return answer, f"Test: VarShare's difference, p below 5 % over all methods that both have. {text}"


def claim_8(different: Result, identical: Result) -> tuple[str, str] | None:
    """On identical tasks mu shrinks to 0, on different tasks, with the same settings, it does not."""
    lines, small, less = [], [], []
    for method in [m for m in identical.by_method if m in METHODS]:
        rows = [
            x.runs[(x.runs.method == method) & (x.runs.metric == "residual/ratio")]
            for x in (identical, different)
        ]
        ratios = [x.set_index("seed").value for x in rows]
        if min(map(len, ratios)) < 2:
            continue
        d = difference(*map(np.log, ratios))  # whose difference is the logarithm of a quotient
        share = Interval(*np.exp(d.interval))
        small.append(share.high < SMALL)
        less.append(share.high < 1)
        lines.append(
            f"- {title_of(method)}: mean |mu_m| / |theta| {ratios[0].mean():.4f} on identical and "
            f"{ratios[1].mean():.4f} on different tasks, quotient {share.text(2)}"
        )
    if not lines:
        return None
    answer = "supported" if all(small) else "not supported"
    if not all(small) and any(less):
        answer += f": smaller on identical tasks for {sum(less)} of {len(less)} methods, but not small"
    test = f"the quotient's 95 % interval lies below {SMALL}; what all mu_m have in common counts as theta"
    return answer, f"Test: {test}.\n\n" + "\n".join(lines) + "\n"


def claim_11(x: Result) -> tuple[str, str] | None:
    """Directions of residuals recover the hidden task."""
    rows, found = x.runs[x.runs.metric == DIRECTION], {}
    for method, of in rows.groupby("method", sort=False):
        key = "seed" if of.setting.nunique() == 1 else ["setting", "seed"]
        found[method] = of.set_index(key).value
    found = {method: values for method, values in found.items() if len(values) > 1}
    if not found:
        return None
    noise = search_noise(found)
    intervals = {method: mean_interval(values, noise) for method, values in found.items()}
    above = [interval.low > 0 for interval in intervals.values()]
    answer = (
        "supported" if all(above) else "not supported" if not any(above) else "supported for some methods"
    )
    test = "Test: the rank correlation, over pairs of tasks, of the cosine of two residuals with minus the "
    test += (
        "distance of their goals is above 0, 95 % interval over runs, and over searches if there are several."
    )
    lines = [
        f"- {title_of(m)}: {interval.text(2)}, above 0 in {(found[m] > 0).sum()} of {len(found[m])} runs"
        for m, interval in intervals.items()
    ]
    return answer, f"{test}\n\n" + "\n".join(lines) + "\n"


def beside_ppo(results: list[Result], algorithm: str) -> list[tuple[Result, Result]]:
    """Suites of "sac" or "vmpo", each with PPO's of the same environment, length and seeds, or more seeds."""

    def alike(x: Result, y: Result) -> bool:
        return (x.env, x.steps) == (y.env, y.steps) and set(x.configs.seed) <= set(y.configs.seed)

    suites = [x for x in results if all(m.endswith(f"-{algorithm}") for m in x.by_method)]
    of_ppo = [x for x in results if all(m == base_of(m) for m in x.by_method)]
    return [(x, y) for x in suites for y in of_ppo if alike(x, y)]


def verdicts(results: list[Result], adaptations: list[Adaptations]) -> str:
    """All claims on all suites: a table of answers, then what they rest on."""
    rows, details = [], []

    def add(number: int, claim: str, suite: str, answer: str, text: str) -> None:
        rows.append([f"C{number} {claim.rstrip('.')}", suite, f"**{answer}**"])
        details.append(f"## C{number} on {suite}: {answer}\n\n{claim} {text}")

    for x in [x for x in results if "identical" not in x.env]:
        found_of = {claim: claim(x.by_method) for claim in (claim_1, claim_2, claim_4)}
        found_of[claim_5] = claim_5(x.by_method, x.runs)
        for claim, found in found_of.items():
            if found:
                # a variant that is worse than others is so whether or not sharing gains something
                able = x.tasks_matter if claim is claim_4 else x.able
                answer, text = found if able else ("this suite cannot tell", f"\n\n{x.why}\n\n{found[1]}")
                add(int(claim.__name__[-1]), claim.__doc__, x.name, answer, text)
    for claim, algorithm in ((claim_6, "sac"), (claim_9, "vmpo")):
        for other, ppo in beside_ppo(results, algorithm):
            if found := claim(other, ppo):  # which is not about sharing: no power is asked for
                add(int(claim.__name__[-1]), claim.__doc__, f"{other.name} and {ppo.name}", *found)
    for identical in [x for x in results if "identical" in x.env]:
        for different in [x for x in results if x.name == identical.searched_on and x is not identical]:
            if found := claim_8(different, identical):
                add(8, claim_8.__doc__, f"{identical.name} and {different.name}", *found)
    for x in [x for x in adaptations if len(x.runs)]:
        add(7, claim_7.__doc__, x.name, *claim_7(x))
        if LORA in x.regimes:
            add(7, claim_7.__doc__, f"{x.name}, low rank", *claim_7(x, LORA))
    for x in results:
        if found := claim_11(x):
            add(11, claim_11.__doc__, x.name, *found)
    if suites := read_suites():
        add(10, claim_10.__doc__.partition("\n")[0], f"many-tasks10 to {max(suites)}", *claim_10(suites))
    if (folder_of("zero_shot") / "runs.csv").exists():
        add(
            12,
            claim_12.__doc__.partition("\n")[0],
            "cartpole-goals20",
            *claim_12(read(folder_of("zero_shot"))[0]),
        )
    power = [f"- {x.name}: **{'can' if x.able else 'cannot'} tell methods apart**: {x.why}" for x in results]
    order = sorted(range(len(rows)), key=lambda i: int(rows[i][0].split()[0][1:]))
    table = markdown(["claim", "suite", "verdict"], [rows[i] for i in order])
    return "\n".join([table, *power, "", *(details[i] for i in order)])


def plot_cost(other: Result, ppo: Result, name: str, against: str) -> Figure:
    """Evaluations of every method with another algorithm and with PPO, against "steps" or "time"."""
    pairs = in_both(other, ppo)
    numbers = [len(x.by_method[m].curve) for names in pairs for x, m in zip((other, ppo), names)]
    figure = start_figure(f"{other.title}: {describe_runs(numbers)}", 1.0 + 2.0 * math.ceil(len(pairs) / 3))
    axes = make_panels(figure, len(pairs), 3, sharex=True, sharey=True)
    bounds = bounds_of(other.env, other.by_success)
    for ax, names in zip(axes, pairs):
        for label, color, x, method in zip((name, "PPO"), CYCLE, (other, ppo), names):
            curve = x.by_method[method].curve
            at = curve.columns.to_numpy(float)
            if against == "time":
                at *= seconds_of(x, method) / at[-1]
            draw_curve(ax, at, curve, label, color, bounds=bounds)
        ax.set_title(title_of(names[1]))
    for ax in axes:
        if against == "steps":
            label_steps(ax)
        else:
            ax.set(xlabel="seconds on one core" if has_label_x(ax) else "", xscale="log")
            ax.xaxis.set_major_formatter("{x:g}")
    begin_at(axes[0], bounds[0])
    figure.supylabel("return of the evaluation, mean over tasks")
    add_legend(figure)
    return figure


def plot_residuals(results: list[Result]) -> Figure | None:
    """Size of the residuals over time, on identical and on different tasks with the same settings."""
    methods = [
        m for m in METHODS if all((x.runs[x.runs.method == m].metric == NORMS[0]).any() for x in results)
    ]
    if len(results) < 2 or not methods:
        return None
    norms = {m: [x.logged(m, NORMS[0]) for x in results] for m in methods}
    numbers = [len(values) for of_method in norms.values() for values in of_method]
    title = f"norm of the residuals, mean over tasks: {describe_runs(numbers)}"
    figure = start_figure(title, 1.0 + 2.3 * math.ceil(len(methods) / 2))
    axes = make_panels(figure, len(methods), 2, sharex=True, sharey=True)
    for ax, method in zip(axes, methods):
        for color, x, values in zip(CYCLE, results, norms[method]):
            draw_curve(ax, values.columns, values, x.env, color, bounds=(0, math.inf))
        ax.set_title(title_of(method))
    for ax in axes:
        label_steps(ax)
    begin_at(axes[0], 0)
    figure.supylabel(r"mean $|\mu_m|$")
    add_legend(figure)
    return figure


def report(out: Path) -> str:
    """table.md, and figures of residuals on identical tasks, and of SAC and V-MPO; returns the verdicts."""
    results = [Result(path.parent) for path in sorted(Path("results/suites").glob("*/configs.csv"))]
    if not results:
        fail("no suite has results in results/suites yet")
    held_out = [Adaptations(path.parent) for path in sorted(folder_of("leave_one_out").glob("*/runs.csv"))]
    out.mkdir(parents=True, exist_ok=True)
    text = verdicts(results, held_out)
    (out / "table.md").write_text(text)
    identical = [x for x in results if "identical" in x.env]
    same_settings = [x for x in results if identical and x.searched_on == identical[0].searched_on]
    with rc_context(STYLE):
        if figure := plot_residuals(same_settings):
            save(figure, out / "residuals.png")
        for name, algorithm in (("SAC", "sac"), ("V-MPO", "vmpo")):
            for other, ppo in beside_ppo(results, algorithm):
                for against in ("steps", "time"):
                    save(plot_cost(other, ppo, name, against), out / f"{other.name}_{against}.png")
    return text


if __name__ == "__main__":
    report_study("claims", report)
