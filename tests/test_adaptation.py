"""docs/adaptation.md does what it says."""

from pathlib import Path

import probes
import pytest
import torch
from PIL import Image

import report


@pytest.mark.slow
def test_the_page_on_adaptation_does_what_it_says(monkeypatch, capsys, elsewhere, tmp_path):
    """Its file and its commands, with less of everything."""
    page = (probes.ROOT / "docs/adaptation.md").read_text()
    module, commands = (page.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "bash"))
    Path("my_poles.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    new, *lines = commands.split("new=")[1].splitlines()
    lines = [commands.splitlines()[0], *(line.replace("$new", new.strip('"')) for line in lines)]
    less = {
        "--total-timesteps 100000": "--total-timesteps 2048",
        "--eval-interval 4096": "--eval-interval 1024",
    }
    small = "--hidden-sizes 8 --eval-episodes 2 --eval-interval-episodes 2"
    for line in lines:
        for old, fewer in less.items():
            line = line.replace(old, fewer)
        line += " --total-timesteps 10240" * ("--run-name poles" in line)
        _, script, *argv = (line + f" {small}" * ("report.py" not in line)).split()
        if script == "report.py":
            report.main(tuple(map(Path, argv)))
        else:
            probes.main(probes.load_script(script), *argv)
    poles, residual, tuned, scratch = (
        probes.load(Path("runs", name))["agent"] for name in ("poles", "residual", "fine-tuning", "scratch")
    )
    assert torch.equal(residual["theta"], poles["theta"]) and residual["mu"].abs().sum() > 0
    assert not torch.equal(tuned["theta"], poles["theta"]) and not torch.equal(
        scratch["theta"], tuned["theta"]
    )
    assert "\nruns/residual/plots/compared.png\n| method | runs |" in capsys.readouterr().out
    with Image.open("runs/residual/plots/compared.png") as image:
        image.load()
