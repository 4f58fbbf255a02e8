"""How every script differs from its parent; `python tests/siblings.py` updates the table in the README.

A script is taken apart into its definitions: functions, methods of Agent, fields of Args, imports, ...;
comments belong to what they precede. Those in SEAMS are a method's own. Others that parent and script both
have are the same letter for letter, or the table below names them, with the number of lines that differ.
Which script has which parent is in bench/methods.csv.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench.methods import METHODS, ROOT, read_methods

MAX_CHANGED = 90  # lines
Definitions = dict[str, list[str]]  # name -> lines

SEAMS = {"docstring", "Agent", "Agent.per_task", "Agent.weights", "Agent.draw_noise", "linear"}
SEAMS |= {"gaussian_kl", "parameter_gradients", "learn_sigma", "recentre", "log_method"}


METHOD_OF = {}  # script -> the first method of bench/methods.csv that it is the script of
for method in (METHODS | read_methods(ROOT / "studies/posterior/methods.csv")).values():
    METHOD_OF.setdefault(method.script, method)
TRUNKS = [name for name, method in METHOD_OF.items() if not method.parent]
# how many lines, added and dropped, a script changes of its parent beside SEAMS
SIBLINGS = {
    "studies/posterior/varshare_samples_ppo.py": {"minibatch_gradients": 14, "update": 5},
    "studies/posterior/varshare_shuffled_sigma_ppo.py": {"update": 1},
    "variants/varshare_reptile_ppo.py": {"imports": 1, "Args.reptile_alpha": 2, "train": 4},
    "variants/varshare_lora_ppo.py": {
        "Agent.__init__": 10,
        "Agent.unpack": 6,
        "minibatch_gradients": 4,
        "update": 2,
    },
    "variants/varshare_trust_region_ppo.py": {"update": 3},
    "variants/varshare_horseshoe_ppo.py": {"Agent.__init__": 7, "update": 1},
    "variants/varshare_learned_prior_ppo.py": {
        "Args.sigma_prior": 2,
        "Args.reptile_alpha": 2,
        "Agent.__init__": 1,
        "update": 1,
        "check": 2,
    },
    "variants/varshare_annealed_ppo.py": {"Agent.__init__": 3, "check": 2, "train": 1},
    "studies/posterior/varshare_fixed_sigma_ppo.py": {
        "LUNARLANDER": 2,
        "LUNARLANDER_GOALS": 2,
        "METAWORLD": 1,
        "Agent.__init__": 5,
        "minibatch_gradients": 6,
        "update": 7,
    },
    "studies/posterior/varshare_fixed_sigma_sac.py": {
        "Agent.__init__": 5,
        "minibatch_gradients": 4,
        "update": 3,
    },
    "baselines/l2soft_ppo.py": {
        "imports": 1,
        "Agent.__init__": 1,
        "minibatch_gradients": 4,
        "update": 2,
        "train": 3,
    },
    "baselines/task_blind_ppo.py": {
        "LUNARLANDER": 2,
        "LUNARLANDER_GOALS": 1,
        "METAWORLD": 1,
        "Agent.__init__": 2,
        "update": 2,
    },
    "baselines/independent_ppo.py": {"Agent.__init__": 9, "minibatch_gradients": 2},
    "baselines/hard_sharing_ppo.py": {"Agent.__init__": 13},
    "baselines/contextual_ppo.py": {"mlp": 1, "Agent.__init__": 7},
    "baselines/pcgrad_ppo.py": {"minibatch_gradients": 6, "update": 2},
    "baselines/cagrad_ppo.py": {"imports": 1, "minibatch_gradients": 2, "train": 2},
}

# what the trunks do not share though both have it, and lines of it in which they differ otherwise
TRUNKS_DIFFER = {"docstring", "imports", "LUNARLANDER", "METAWORLD", "ENV_DEFAULTS", "Batch", "Agent"}
TRUNKS_DIFFER |= {"Agent.per_task"}
TRUNKS_DIFFER |= {f"Agent.{x}" for x in ("__init__", "init_weights", "act", "policy")}
TRUNKS_DIFFER |= {"minibatch_gradients", "update", "log_method", "check", "train"}
TRUNKS_CHANGES = {f"Args.{x}": 2 for x in ("total_timesteps", "learning_rate", "envs_per_task")}
TRUNKS_CHANGES |= {f"Args.{x}": 2 for x in ("hidden_sizes", "reptile_alpha", "rollout_weights")}
TRUNKS_CHANGES |= {"Args.beta": 2, "Args.sigma_prior": 2, "mlp": 7, "Agent.action_noise": 2}
TRUNKS_CHANGES |= {"parameter_gradients": 4, "learn_sigma": 14}


def lines_of(name: str) -> list[str]:
    """The lines of a script, by its path below ROOT."""
    return (ROOT / name).read_text().splitlines()


def name_of(node: ast.stmt) -> str:
    """The name of what a statement, of a module or a class, defines."""
    target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
    if isinstance(node, ast.Expr):
        return "docstring"
    if isinstance(node, ast.If):
        return "main"
    return getattr(node, "name", None) or getattr(target, "id", "imports")  # one of which is sys.path += ...


def definitions(name: str) -> Definitions:
    """name -> lines of everything that a script defines; a class is its header and docstring."""
    lines, found = lines_of(name), {}

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


def changed(old: list[str], new: list[str]) -> list[str]:
    """Dropped lines with "-" and added ones with "+" in front."""
    return [line for line in difflib.ndiff(old, new, linejunk=None) if line[0] in "+-"]


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


def compare(old: Definitions, new: Definitions, free: set[str], changes: dict[str, int]) -> list[str]:
    """What is wrong: definitions that both have are the same but for free ones and for these changes."""
    both = [name for name in old if name in new]
    order = zip(both, (name for name in new if name in old))
    wrong = [f"{x} and {y} are not in the same order" for x, y in order if x != y][:1]
    wrong += [f"{name} is no definition of both" for name in (*changes, *free) if name not in both]
    for name in both:
        found, expected = count_changed(old[name], new[name]), changes.get(name, 0)
        if found != expected and name not in free:
            wrong += [f"{name}: {found} lines differ, not {expected}", *changed(old[name], new[name])]
    return wrong


def drifted(sibling: str) -> list[str]:
    """Differences from the parent that are not the method's own, each a line or more."""
    parent = METHOD_OF[sibling].parent
    old, new = definitions(parent), definitions(sibling)
    wrong = compare(old, new, SEAMS & old.keys() & new.keys(), SIBLINGS[sibling])
    wrong += [f"{x} is gone" for x in old.keys() - new.keys() - SEAMS if not x.startswith("Args.")]
    total = count_changed(lines_of(parent), lines_of(sibling))
    return wrong + [f"{total} lines differ in total"] * (total > MAX_CHANGED)


def trunks_drifted() -> list[str]:
    """Differences of the trunks that are of neither algorithm."""
    return compare(*map(definitions, TRUNKS), TRUNKS_DIFFER, TRUNKS_CHANGES)


def table(variants: bool) -> str:
    """The scripts in variants/, or the others, and how many of their lines are not those of their parents."""
    rows = ["| script | method | parent | lines | changed lines |", "|---|---|---|---|---|"]
    for name, method in METHOD_OF.items():
        if name.startswith("studies/") or name.startswith("variants/") != variants:
            continue
        parent, lines = method.parent, lines_of(name)
        cells = f"`{parent}`" if parent else "", len(lines)
        diff = count_changed(lines_of(parent), lines) if parent else ""
        rows.append(f"| `{name}` | {method.what} | {cells[0]} | {cells[1]} | {diff} |")
    return "\n".join(rows) + "\n"


TABLES = {"README.md": False, "docs/variants.md": True}  # where they stand


def main() -> None:
    """Update the tables in README and docs."""
    for name, variants in TABLES.items():
        text, new = (ROOT / name).read_text(), table(variants)
        start = re.search(r"\| script \| method \|.*\n(\|.*\n)+", text)
        (ROOT / name).write_text(text[: start.start()] + new + text[start.end() :])
        print(new)


if __name__ == "__main__":
    main()
