"""Scripts stay readable and small, and what depends on what stays as it is."""

import ast
import re
import tokenize

import pytest
from probes import ALL_SCRIPTS, ROOT

TRUNKS = ("varshare_ppo.py", "varshare_sac.py")
TRUNK_TOKENS, TRUNK_LINES = 11.0, 450  # per line of code at most; in all
SCRIPT_TOKENS, SCRIPT_LINES = 11.5, 525
ENVS_LINES = 3_440  # of envs/*.py together
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def density(path):
    """Tokens per line of code, comments and docstrings left out."""
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    with open(path) as file:
        tokens = [t.start[0] for t in tokenize.generate_tokens(file.readline) if t.type not in LAYOUT]
    lines = [line for line in tokens if line not in docstrings]
    return len(lines) / len(set(lines))


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_scripts_are_short_and_have_few_tokens_a_line(name):
    tokens, lines = (TRUNK_TOKENS, TRUNK_LINES) if name in TRUNKS else (SCRIPT_TOKENS, SCRIPT_LINES)
    assert density(ROOT / name) <= tokens
    assert len((ROOT / name).read_text().splitlines()) <= lines


def test_envs_is_small():
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob("envs/*.py")) <= ENVS_LINES


def imported(path):
    """The packages and modules of this project that a file imports."""
    ours = {x.stem for x in ROOT.iterdir() if x.suffix == ".py" or (x.is_dir() and list(x.glob("*.py")))}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names} & ours


def test_scripts_import_envs_and_nothing_imports_studies():
    for name in ALL_SCRIPTS:
        assert imported(ROOT / name) == {"envs"}, name
    for folder in ("", "baselines/", "variants/", "envs/", "bench/", "tests/"):
        for path in ROOT.glob(f"{folder}*.py"):
            assert "studies" not in imported(path), path
    for path in ROOT.glob("envs/*.py"):
        assert imported(path) <= {"envs"}, path


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_have_no_holes_and_no_dead_links():
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("studies/**/*.md"),
        ROOT / "models/README.md",
    ]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "@@" not in text, page
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(path), f"{page}: {link}"
