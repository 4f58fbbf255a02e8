"""The log of a run: heartbeat.csv, TensorBoard's events and, if asked for, Weights & Biases."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


class Log:
    """Appends (global_step, metric, task, value) to heartbeat.csv, and the same to TensorBoard.

    TensorBoard has the settings as a table too, and the values of single tasks in groups of their own, as
    charts_by_task/episodic_return/{task}, so that charts/ can be looked at with any number of tasks.
    """

    def __init__(
        self, folder: Path, task_names: Sequence[str], settings: dict[str, Any], step: int, size: int
    ):
        """Open the files of a run's folder.

        Args:
            folder, task_names, settings: of the run.
            step: at which it starts or continues: what TensorBoard has of later steps is dropped.
            size: bytes of heartbeat.csv to keep, 0 to start anew.
        """
        self.task_names = task_names
        self.writer, self.scalars = SummaryWriter(str(folder), purge_step=step + 1), []
        self.file = open(folder / "heartbeat.csv", "a", newline="")
        self.file.truncate(size)
        self.file.seek(0, os.SEEK_END)  # truncating leaves the position, which `size` is read from
        self.csv = csv.writer(self.file)
        if not size:
            self.csv.writerow(("global_step", "metric", "task", "value"))
            rows = [f"|{name}|{value}|" for name, value in settings.items()]
            self.writer.add_text("hyperparameters", "\n".join(["|setting|value|", "|-|-|", *rows]))

    def add(self, step: int, metric: str, per_task: Iterable[float], overall: float) -> None:
        """Take in a value for each task (NaN: none yet), and one for all."""
        rows = [(task, float(x)) for task, x in zip(self.task_names, per_task) if not math.isnan(x)]
        self.csv.writerows((step, metric, *row) for row in [*rows, ("mean", overall)])
        self.scalars.append(Summary.Value(tag=metric, simple_value=overall))
        group, _, name = metric.partition("/")
        if group in ("charts", "eval"):  # of the rest TensorBoard gets the mean only
            tags = (f"{group}_by_task/{name}/{task}" for task, _ in rows)
            self.scalars += [Summary.Value(tag=tag, simple_value=x) for tag, (_, x) in zip(tags, rows)]

    def flush(self, step: int) -> int:
        """Write what was added, and return heartbeat.csv's size in bytes.

        TensorBoard gets all of it at once, because every event costs 0.1 ms.
        """
        if self.scalars:
            self.writer.file_writer.add_summary(Summary(value=self.scalars), step)
            self.scalars = []
        self.writer.flush()
        self.file.flush()  # for plots of a run that is going on
        return self.file.tell()

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        self.writer.close()
