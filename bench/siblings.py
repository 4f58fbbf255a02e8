"""How every script differs from its parent: python -m bench.siblings.

A script is taken apart into its definitions: functions, methods of Agent, fields of Args, imports, ...;
comments belong to what they precede. Definitions in `SEAMS`, and those that the parent does not have, are a
method's own. Of all others bench/siblings.csv says by how many lines they differ. So a line that is changed
in one script only, by accident, shows: `drifted` names it, and a test fails. After a change on purpose the
command above writes that file anew, and the tables of scripts in README and docs; look at the difference.
"""

import ast
import csv
import difflib
import re
from pathlib import Path

from bench.methods import ROOT, base_of, read_methods

LOCK = Path(__file__).with_name("siblings.csv")
TABLES = {  # names of scripts in each
    "README.md": r"[^/]*|baselines/.*_ppo.py",
    "docs/baselines.md": r"baselines/.*_ppo.py",
    "docs/sac.md": r".*_sac.py",
    "docs/variants.md": r"variants/.*_ppo.py",
    "docs/vmpo.md": r".*_vmpo.py",
}
MAX_CHANGED = 100  # lines
COUNTS = "docs/baselines.md"  # where the table of parameters is
LONGER = dict.fromkeys(("baselines/l2soft_ppo.py", "baselines/l2soft_sac.py"), 110)  # most drop sigma
LONGER |= {"variants/varshare_vmpo.py": 175, "baselines/l2soft_vmpo.py": 125}  # an algorithm of its own
LONGER |= {"baselines/soft_modularization_ppo.py": 130, "baselines/soft_modularization_sac.py": 140}
LONGER |= {"baselines/brc_sac.py": 325}  # networks of their own
Definitions = dict[str, list[str]]  # name -> lines

# what a method may change of its parent, and PPO's and SAC's trunk of each other
SEAMS = {"docstring", "Agent", "Agent.per_task", "Agent.weights", "Agent.draw_noise", "linear"}
SEAMS |= {"ENV_DEFAULTS", "gaussian_kl", "learn_sigma", "recentre", "minibatch_backward", "log_method"}
ALGORITHM = {"docstring", "imports", "LANDER", "LANDERS", "ENV_DEFAULTS", "Batch", "Agent", "Agent.per_task"}
ALGORITHM |= {f"Agent.{x}" for x in ("__init__", "init_weights", "actor", "policy")}
ALGORITHM |= {"learn_sigma", "minibatch_backward", "update", "log_method", "check", "train"}


def read_scripts() -> dict[str, tuple[str, str]]:
    """Parent and description of every script, of bench/methods.csv and of the studies' own lists."""
    scripts: dict[str, tuple[str, str]] = {}
    for path in (ROOT / "bench/methods.csv", *sorted(ROOT.glob("studies/*/methods.csv"))):
        for method in read_methods(path).values():
            scripts.setdefault(method.script, (method.parent, method.what))
    return scripts


def lines_of(script: str) -> list[str]:
    """The lines of a script, by its path below the project's folder."""
    return (ROOT / script).read_text().splitlines()


def name_of(node: ast.stmt) -> str:
    """The name of what a statement, of a module or a class, defines."""
    target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
    if isinstance(node, ast.Expr):
        return "docstring"
    if isinstance(node, ast.If):
        return "main"
    return getattr(node, "name", None) or getattr(target, "id", "imports")  # one of which is sys.path += ...


def definitions(script: str) -> Definitions:
    """name -> lines of everything that a script defines; a class is its header and docstring."""
    lines, found = lines_of(script), {}

    def add(nodes: list[ast.stmt], prefix: str, start: int) -> None:  # start: first line, from 0
        for node in nodes:
            key, end = prefix + name_of(node), node.end_lineno
            if isinstance(node, ast.ClassDef):
                first = node.body[0]
                has_docstring = isinstance(first, ast.Expr)
                end = first.end_lineno if has_docstring else node.lineno
                add(node.body[has_docstring:], f"{node.name}.", end)
            own = "\n".join(lines[start:end]).strip("\n").splitlines()
            heading = prefix == "Args." and own[0].lstrip().startswith("#")  # of a group of fields
            found[key] = found.get(key, []) + own[heading:]
            start = node.end_lineno

    add(ast.parse("\n".join(lines)).body, "", 0)
    return found


def count_changed(old: list[str], new: list[str]) -> int:
    """Fewest lines to drop and to add; `diff` shows as many, `difflib` more of long files.

    By the longest common subsequence, a bit for each line of new (Hyyro 2004): once all lines of old went by,
    the zeros are the lines of one.
    """
    places = {line: sum(1 << j for j, other in enumerate(new) if other == line) for line in set(new)}
    ones = row = (1 << len(new)) - 1
    for line in old:
        matches = row & places.get(line, 0)
        row = (row + matches | row - matches) & ones
    common = len(new) - row.bit_count()
    return len(old) + len(new) - 2 * common


def compared() -> dict[str, tuple[str, set[str]]]:
    """What every script is compared with, and the definitions that may differ freely."""
    scripts = read_scripts()
    ppo, sac = (script for script, (parent, _) in scripts.items() if not parent)
    pairs = {script: (parent, SEAMS) for script, (parent, _) in scripts.items() if parent}
    return {sac: (ppo, ALGORITHM)} | pairs


def differences(script: str) -> dict[str, int]:
    """Definitions of the parent that are other lines here, or gone, and by how many lines."""
    parent, free = compared()[script]
    old, new = definitions(parent), definitions(script)
    counts = {name: count_changed(old[name], new.get(name, [])) for name in old if name not in free}
    # settings of another method may be gone, and functions of another algorithm
    gone = {name for name in old.keys() - new.keys() if name.startswith("Args.") or free is ALGORITHM}
    return {name: count for name, count in counts.items() if count and name not in gone}


def read_lock() -> dict[str, dict[str, int]]:
    """script -> definition -> lines that differ, as agreed upon."""
    found: dict[str, dict[str, int]] = {}
    with open(LOCK, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["script"], {})[row["definition"]] = int(row["changed"])
    return found


def drifted(script: str) -> list[str]:
    """What is not as agreed upon, each a line or more; empty if nothing has drifted."""
    parent, _ = compared()[script]
    old, new = definitions(parent), definitions(script)
    agreed, found, wrong = read_lock().get(script, {}), differences(script), []
    both = [name for name in old if name in new]
    for x, y in zip(both, [name for name in new if name in old]):
        if x != y:
            wrong.append(f"{x} and {y} are not in the same order")
            break
    for name in sorted(agreed.keys() | found.keys()):
        if agreed.get(name, 0) != found.get(name, 0):
            wrong.append(
                f"{name}: {found.get(name, 0)} lines differ from {parent}, not {agreed.get(name, 0)}"
            )
            delta = difflib.ndiff(old.get(name, []), new.get(name, []), linejunk=None)
            wrong += [line for line in delta if line[0] in "+-"]
    total = count_changed(lines_of(parent), lines_of(script))
    most = LONGER.get(script, MAX_CHANGED)
    if read_scripts()[script][0] and total > most:
        wrong.append(f"{total} lines differ from {parent}, more than {most}")
    return wrong


def table(names: str) -> str:
    """The scripts with these names, their parents, and how many lines differ from theirs."""
    rows = ["| script | method | parent | lines | changed lines |", "|---|---|---|---|---|"]
    for script, (parent, what) in read_scripts().items():
        if re.fullmatch(names, script) and not script.startswith("studies/"):
            lines = lines_of(script)
            changed = count_changed(lines_of(parent), lines) if parent else ""
            cells = (f"`{script}`", what, f"`{parent}`" if parent else "", len(lines), changed)
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def count_parameters(script: str) -> tuple[int, int]:
    """What a script trains by gradients on cartpole-goals10 by default: numbers shared, and per task."""
    import torch  # slow imports

    import envs
    from enjoy import load_script

    module, vector_env = load_script(script), envs.make("cartpole-goals10", 1)
    agent = module.Agent(vector_env, module.make_args("cartpole-goals10"), torch.Generator())
    sizes = {name: x.numel() for name, x in agent.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.partition(".")[0] in agent.per_task)
    return sum(sizes.values()) - own, own // vector_env.num_tasks


def parameter_table() -> str:
    """Shared and per-task parameters of every method, with PPO and with SAC."""
    rows = ["| method | PPO, shared | PPO, per task | SAC, shared | SAC, per task |", "|---|---|---|---|---|"]
    methods = {name: x for name, x in read_methods(ROOT / "bench/methods.csv").items() if not x.variant}
    for name, method in methods.items():
        if name == base_of(name) or base_of(name) not in methods:  # BRC is with SAC only
            name = base_of(name)
            found = (methods.get(x) for x in (name, f"{name}-sac"))
            counts = (count_parameters(x.script) if x else ("", "") for x in found)
            cells = (f"{x:,}" if x != "" else "" for pair in counts for x in pair)
            rows.append(f"| {' | '.join((method.title, *cells))} |")
    return "\n".join(rows) + "\n"


def replace_table(page: str, header: str, new: str) -> None:
    """Write the table that begins with `header` on a page anew."""
    text = (ROOT / page).read_text()
    old = re.search(rf"\| {header} \|.*\n(\|.*\n)+", text)
    (ROOT / page).write_text(text[: old.start()] + new + text[old.end() :])


def main() -> None:
    """Write what scripts change of their parents, and the tables of scripts and of parameters."""
    rows = [(script, *row) for script in compared() for row in differences(script).items()]
    with open(LOCK, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("script", "definition", "changed"), *rows])
    for name, names in TABLES.items():
        replace_table(name, r"script \| method", table(names))
    replace_table(COUNTS, r"method \| PPO, shared", parameter_table())


if __name__ == "__main__":
    main()
