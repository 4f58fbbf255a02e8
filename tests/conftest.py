"""Fixtures of the tests that run scripts."""

import os
import signal
import sys
import tempfile

import probes
import pytest
import torch

torch.set_num_threads(1)  # as runs do; several processes test at a time

# torch.compile's own cache hands code for one instruction set, which ATEN_CPU_CAPABILITY chooses, to another
cache = f"torchinductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), cache))


@pytest.fixture(params=probes.TRUNKS + probes.SAC_SCRIPTS)
def trunk(request):
    return probes.load_script(request.param)


@pytest.fixture(
    params=probes.slow_but(probes.QUICK, probes.SCRIPTS + probes.SAC_SCRIPTS + probes.SAC_SIBLINGS)
)
def script(request):
    return probes.load_script(request.param)


@pytest.fixture(params=(*probes.TRUNKS, *probes.SAC_SCRIPTS, "baselines/cagrad_ppo.py"))
def either(request):
    """The trunks and the sibling least like them, for what takes a while and is the same in all scripts."""
    return probes.load_script(request.param)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Scripts write below the current folder, and a run that was stopped keeps its signal handlers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])  # probes.main sets it, errors name it
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
