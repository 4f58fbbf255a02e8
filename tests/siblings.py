"""How every script differs from its trunk; `python tests/siblings.py` updates the table in the README.

A sibling may change its method's own part of the trunk, which METHOD names, and nothing else.
"""

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# trunk -> its method's own definitions, and single lines elsewhere (what they contain)
METHOD = {
    "varshare_ppo.py": (
        "VarShare Args Agent.draw_noise Agent.weights gaussian_kl objective recentre method_metrics".split(),
        [
            "import Literal",
            "LUNARLANDER |= ",
            "per_task = ",
            "self.theta = ",
            "self.mu = ",
            "self.logvar = ",
            "may_be_0",
            "reptile_alpha",
            "--reptile-alpha",
            "recentre(",
            "noise = agent.draw_noise(rng)",
            "agent.weights(noise)",
            "loss, minibatch_stats = ",
        ],
    ),
    "varshare_sac.py": ([], []),
}

# sibling -> its trunk, what it is, and further lines of the trunk that it changes, or adds something below
SIBLINGS = {
    "baselines/independent_ppo.py": (
        "varshare_ppo.py",
        "an agent of its own for every task",
        ["freeze_theta", "--freeze-theta", "clip_grad_norm_"],
    ),
    "baselines/hard_sharing_ppo.py": ("varshare_ppo.py", "shared hidden layers, a head per task", []),
    "baselines/contextual_ppo.py": (
        "varshare_ppo.py",
        "all shared, a learned task embedding as input",
        ["widths = ", "the order of `shapes`", "*parts, logstd = ", "for o, i in", "layers = [(w.view"],
    ),
    "baselines/l2soft_ppo.py": ("varshare_ppo.py", "a residual per task, with a squared penalty", []),
    "baselines/pcgrad_ppo.py": (
        "varshare_ppo.py",
        "Hard sharing, conflicting gradients projected",
        ["loss.backward()", "in method_metrics("],
    ),
    "baselines/cagrad_ppo.py": (
        "varshare_ppo.py",
        "Hard sharing, the least helped task helped",
        ["import torch", "loss.backward()", "in method_metrics("],
    ),
}


def lines_of(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def hunks(trunk: str, sibling: str) -> list[tuple[range, list[str]]]:
    """Where they differ: lines of the trunk (from 0), and the lines that stand there in the sibling."""
    old, new = lines_of(trunk), lines_of(sibling)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [(range(i, j), new[a:b]) for kind, i, j, a, b in matcher.get_opcodes() if kind != "equal"]


def method_lines(sibling: str) -> set[int]:
    """The lines of the trunk (from 0) that a sibling may change or add something next to."""
    trunk, _, further = SIBLINGS[sibling]
    definitions, contents = METHOD[trunk]
    lines, tree = lines_of(trunk), ast.parse((ROOT / trunk).read_text())
    own = set(range(tree.body[0].end_lineno))  # the docstring
    named = [(node.name, node) for node in tree.body if hasattr(node, "name")]
    for parent, node in list(named):
        named += [(f"{parent}.{child.name}", child) for child in node.body if hasattr(child, "name")]
    for name, node in named:
        if name in definitions:
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            own |= set(range(start - 1, node.end_lineno))
    own |= {i for i, line in enumerate(lines) if any(x in line for x in (*contents, *further))}
    return own | {i for i, line in enumerate(lines) if not line and (i - 1 in own or i - 2 in own)}


def drifted(sibling: str) -> list[str]:
    """Differences from the trunk that are not of the method's own part."""
    trunk, own = SIBLINGS[sibling][0], method_lines(sibling)
    lines, wrong = lines_of(trunk), []
    for old, new in hunks(trunk, sibling):
        wrong += [f"{trunk}:{i + 1} is changed: {lines[i]}" for i in old if i not in own]
        if not old and not {old.start - 1, old.start} & own:
            wrong += [f"below {trunk}:{old.start} is added: {line}" for line in new]
    return wrong


def table() -> str:
    """The scripts and their changed lines, for the README."""
    rows = ["| script | method | lines | of its own | of the trunk dropped |", "|---|---|---|---|---|"]
    for trunk in METHOD:
        rows.append(f"| `{trunk}` | the trunk | {len(lines_of(trunk))} | | |")
        for sibling, (its_trunk, method, _) in SIBLINGS.items():
            if its_trunk == trunk:
                changes = hunks(trunk, sibling)
                added, dropped = (sum(map(len, side)) for side in zip(*((n, o) for o, n in changes)))
                rows.append(f"| `{sibling}` | {method} | {len(lines_of(sibling))} | {added} | {dropped} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    start = re.search(r"\| script \| method \|.*\n(\|.*\n)+", text)
    readme.write_text(text[: start.start()] + table() + text[start.end() :])
    print(table())


if __name__ == "__main__":
    main()
