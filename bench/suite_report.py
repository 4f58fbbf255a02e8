"""What is made of the CSVs in results/: tables and figures of a suite and of its search."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context

from bench.figures import SUITE_FIGURES
from bench.style import STYLE
from bench.tables import Result, make_table, provenance


def write_suite(folder: Path) -> str:
    """table.md and the figures of a suite, from its CSVs in results/suites/NAME; returns the table."""
    x = Result(folder)
    able = f"**This suite {'can' if x.able else 'cannot'} tell methods apart**: {x.why}."
    note = "In brackets 95 % intervals over runs: Student's t, of medians order statistics."
    text = f"# {x.title}\n\n{able}\n\n{provenance(x.configs)} {note}\n\n{make_table(x)}"
    (folder / "table.md").write_text(text)
    with rc_context(STYLE):
        for name, plot in SUITE_FIGURES.items():
            if figure := plot(x):
                figure.savefig(folder / f"{name}.png")
    return text
