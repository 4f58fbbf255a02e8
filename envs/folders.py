"""runs/latest: a file with the name of the newest run, which stands for that run's folder.

A link would be the natural way, but TensorBoard follows it and shows the newest run twice.
"""

from __future__ import annotations

import os
from pathlib import Path


def point_latest_to(folder: Path) -> None:
    """Let `latest`, beside a run's folder, name that run, without a moment in which it names none."""
    unfinished = folder.with_name(f"latest-{folder.name}")
    unfinished.write_text(f"{folder.name}\n")
    os.replace(unfinished, folder.with_name("latest"))


def find_run(path: Path) -> Path:
    """The path itself, or the newest run's folder if it is runs/latest."""
    if path.name == "latest" and path.is_file():
        return path.with_name(path.read_text(encoding="utf-8").strip())
    return path
