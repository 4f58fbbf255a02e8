"""`python -m bench COMMAND SUITE ...`: what benchmark.sh calls."""

import tyro

from bench import launch, tune
from bench.suites import Suite


def search(suite: tyro.conf.OmitArgPrefixes[Suite], storage: str = tune.STORAGE) -> bool:
    """Search the settings of a suite's methods.

    Args:
        suite: a line of benchmark.sh.
        storage: URL of the database of trials.
    """
    return tune.search(suite, storage)


def runs(suite: tyro.conf.OmitArgPrefixes[Suite]) -> bool:
    """Start or continue the reported runs of a suite."""
    return launch.launch(suite.jobs())


if __name__ == "__main__":
    launch.stop_on_signals()
    raise SystemExit(not tyro.extras.subcommand_cli_from_dict({"search": search, "runs": runs}))
