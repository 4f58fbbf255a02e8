"""What is to be installed for what: pyproject.toml, requirements.txt, and runs with the core alone."""

import re
import signal
import subprocess
import sys
import time
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import probes
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # of Python 3.11 and later

PROJECT = tomllib.loads((probes.ROOT / "pyproject.toml").read_text())["project"]
CORE, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]


def parse(lines):
    return [Requirement(line) for line in lines]


def test_requirements_pins_every_package_of_the_project_within_its_range():
    text = (probes.ROOT / "requirements.txt").read_text()
    pins = parse(line for line in text.splitlines() if line and not line.startswith("#"))
    assert all(re.fullmatch(r"==[\d.]+", str(pin.specifier)) for pin in pins)
    (everything,) = parse(EXTRAS["all"])
    assert everything.name == PROJECT["name"] and everything.extras == EXTRAS.keys() - {"all"}
    ranges = {
        x.name: x for x in parse(CORE + [line for extra in everything.extras for line in EXTRAS[extra]])
    }
    assert ranges.keys() == {pin.name for pin in pins}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.version in ranges[pin.name].specifier, pin
        assert pin.extras == ranges[pin.name].extras


def test_the_citation_is_of_this_version():
    citation = (probes.ROOT / "CITATION.cff").read_text()
    keys = dict(re.findall(r"^([\w-]+): *(.*)$", citation, re.M))
    assert keys["version"] == PROJECT["version"] and keys["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= keys.keys()


def installed_with(requirements):
    """Names of the packages that these requirements bring with them, directly or not."""
    found, left = set(), list(requirements)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in found:
            continue
        found.add((name, *requirement.extras))
        for needed in parse(requires(name) or ()):
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(map(needed.marker.evaluate, environments)):
                left.append(needed)
    return {name for name, *_ in found}


WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {modules}:
            return super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
"""
EVERY_SCRIPT = """
for path in sys.argv:
    runpy.run_path(path, run_name="imported")
import envs
envs.make("lunarlander20", 1).reset(seed=0)
"""


@pytest.mark.slow
def test_the_core_alone_trains_resumes_and_evaluates(tmp_path):
    core = installed_with(parse(CORE))
    modules = {
        module
        for module, packages in packages_distributions().items()
        if not core & {canonicalize_name(package) for package in packages}
    }
    assert {"pandas", "pytest", "wandb", "metaworld", "imageio_ffmpeg"} <= modules
    code = WITHOUT.format(modules=modules, root=str(probes.ROOT))

    def start(*argv, code=code + 'runpy.run_path(sys.argv[0], run_name="__main__")'):
        command = [sys.executable, "-c", code, *map(str, argv)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)

    def finish(process):
        out, err = process.communicate()
        return process.returncode, out, err

    scripts = [probes.ROOT / name for name in probes.ALL_SCRIPTS]
    assert finish(start(*scripts, code=code + EVERY_SCRIPT)) == (0, "", "")
    train = [probes.ROOT / "varshare_ppo.py", "--total-timesteps", "400000", "--run-name", "run"]
    first = start(*train, "--checkpoint-interval", "0")
    while first.poll() is None and not (tmp_path / "runs/run/checkpoint.pt").exists():
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert finish(first)[0] == 128 + signal.SIGINT
    code, out, err = finish(start(*train, "--resume"))
    assert (code, err) == (0, "") and "saved  runs/run" in out
    enjoy = [probes.ROOT / "enjoy.py", "runs/latest", "--episodes", "2"]
    code, out, err = finish(start(*enjoy))
    assert (code, err) == (0, "") and "mean over tasks" in out
    code, out, err = finish(start(*enjoy, "--capture-video"))
    assert (code, out) == (2, "") and re.fullmatch("enjoy.py: error: films need .*\n", err)
    assert not Path(tmp_path, "runs/run/videos").exists()
