"""How do full rank and LoRA scale? Time and memory of a minibatch: results/studies/scaling/."""

from __future__ import annotations

import csv
import itertools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure

from bench.figures import STYLE, add_legend, color_of, save, start_figure
from bench.methods import METHODS, ROOT, title_of
from bench.tables import markdown
from studies import folder_of

WIDTHS, TASKS = (64, 256, 1024, 4096), (10, 100)
SAMPLES = 256  # of each task, as in the minibatches of the CartPoles
OBS, ACTIONS, RANK, STEPS = 4, 2, 4, 3
COPIES = 14  # of all weights that exist at some time: mu, sigma, squares, two moments, gradients, draws, ...
COLUMNS = ("method", "width", "tasks", "own", "seconds", "gigabytes")


def methods() -> list[str]:
    """VarShare of full rank, and of low rank."""
    first = {METHODS[m].family: m for m in reversed(METHODS) if METHODS[m].script.endswith("_ppo.py")}
    return [first["varshare"], first["lora"]]


def measure(method: str, width: int, tasks: int) -> None:
    """Print own parameters per task, seconds of a minibatch, and the process' peak memory in GB."""
    import torch

    from enjoy import load_script

    script = load_script(METHODS[method].script)
    torch.set_num_threads(1)
    options = {"rank": RANK} if hasattr(script.Args, "rank") else {}
    args = script.Args(hidden_sizes=(width, width), num_steps=SAMPLES, envs_per_task=1, **options)
    args.num_minibatches = args.update_epochs = 1
    envs = SimpleNamespace(num_tasks=tasks, envs_per_task=1, obs_dim=OBS, act_dim=ACTIONS, discrete=True)
    rng = torch.Generator().manual_seed(0)
    agent = script.Agent(envs, args, rng)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)
    obs = torch.randn(tasks, SAMPLES, OBS, generator=rng)
    actions = torch.zeros(tasks, SAMPLES, dtype=torch.long)
    logprobs, advantages, returns = torch.randn(3, tasks, SAMPLES, generator=rng)
    batch = script.Batch(obs, actions, logprobs, advantages, returns)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        script.update(agent, optimizer, batch, script.minibatch_backward, args, rng)
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(agent.mu.shape[1], sorted(seconds)[STEPS // 2], memory)


def full_parameters(width: int) -> int:
    """Weights of actor and critic."""
    return 2 * (OBS * width + width + width**2 + width) + (ACTIONS + 1) * (width + 1)


def run(out: Path) -> None:
    """Measure what fits into the memory of this machine, each in a process of its own."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for tasks in TASKS:
        for width in WIDTHS:
            for method in methods():
                copies = COPIES * (1 if METHODS[method].family == "lora" else tasks)
                needed = 4 * copies * full_parameters(width) / 2**30
                if needed > 0.9 * memory:
                    rows.append((method, width, tasks, full_parameters(width), "", f"{needed:.3g}"))
                else:
                    command = [
                        sys.executable,
                        "-m",
                        "studies.scaling",
                        "measure",
                        method,
                        str(width),
                        str(tasks),
                    ]
                    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT)
                    words = done.stdout.split()
                    rows.append((method, width, tasks, words[0], *(f"{float(x):.3g}" for x in words[1:])))
                print(*rows[-1], flush=True)
    with open(out / "scaling.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def report(out: Path) -> str:
    """table.md and scaling.png from scaling.csv; returns the table."""
    data = pd.read_csv(out / "scaling.csv")
    lines = []
    for x in data.itertuples():
        fits = x.seconds == x.seconds
        seconds = f"{1000 * x.seconds:,.0f} ms" if fits else "does not fit"
        memory = f"{x.gigabytes:.1f} GB" if fits else f"some {x.gigabytes:.0f} GB needed"
        lines.append([title_of(x.method), str(x.tasks), str(x.width), f"{x.own:,}", seconds, memory])
    columns = ["method", "tasks", "width", "own parameters per task", "a minibatch", "peak memory"]
    text = f"# A minibatch of {SAMPLES} samples of each task, one core\n\n{markdown(columns, lines)}"
    (out / "table.md").write_text(text)
    with rc_context(STYLE):
        save(plot(data), out / "scaling.png")
    return text


def plot(data: pd.DataFrame) -> Figure:
    """Time and memory against the width of the hidden layers, of what fits and what would not."""
    figure = start_figure("a minibatch on one core, each case measured once", 3.8)
    names = {"seconds": "seconds of a minibatch", "gigabytes": "peak memory, GB"}
    for ax, (column, label) in zip(figure.subplots(1, 2), names.items()):
        for (method, tasks), rows in data.groupby(["method", "tasks"], sort=False):
            fits, style = rows[rows.seconds.notna()], "-" if tasks == TASKS[0] else "--"
            name = f"{title_of(method)}, {tasks} tasks"
            ax.plot(fits.width, fits[column], style, marker="o", ms=4, color=color_of(method), label=name)
        if column == "gigabytes":
            lost = data[data.seconds.isna()]
            ax.plot(lost.width, lost.gigabytes, "x", color="black", label="would be needed, does not fit")
        ax.set(title=label.partition(",")[0], xlabel="width of the hidden layers", ylabel=label)
        ax.set(xscale="log", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xticks(WIDTHS, WIDTHS)
        ax.minorticks_off()
    add_legend(figure, columns=3)
    return figure


def main(dry_run: bool = False, report_only: bool = False) -> None:
    """Time and memory of a minibatch, with nothing else running.

    Args:
        dry_run: print the cases only
        report_only: of results/studies/scaling/scaling.csv
    """
    if dry_run:
        print(*itertools.product(methods(), WIDTHS, TASKS), sep="\n")
        return
    out = folder_of("scaling")
    if not report_only:
        run(out)
    print(report(out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:  # in a process of its own
        measure(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        tyro.cli(main)
