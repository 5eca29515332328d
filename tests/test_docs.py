"""README.md and docs/: the functions, tests, flags and pages that they name are there."""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {
    "fomaml.py": ROOT / "fomaml.py",
    "meta_lora.py": ROOT / "meta_lora.py",
    "amft.py": ROOT / "amft.py",
    "data.py": ROOT / "data.py",
    "eval.py": ROOT / "eval.py",
    "plots.py": ROOT / "plots.py",
    "bench.py": ROOT / "bench.py",
    "bench_gpu.py": ROOT / "bench_gpu.py",
    "studies/few_shot/run.py": ROOT / "studies" / "few_shot" / "run.py",
    "studies/balance/run.py": ROOT / "studies" / "balance" / "run.py",
    "studies/real_model/run.py": ROOT / "studies" / "real_model" / "run.py",
    "-m tiny.train": ROOT / "tiny" / "train.py",
    "-m tiny.conditions": ROOT / "tiny" / "conditions.py",
    "-m games": ROOT / "games" / "__main__.py",
}
# Flags of torchrun, pip and sbatch that the pages name
FOREIGN = {
    "--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr",
    "--master_port", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--shutdown-timeout",
    "--index-url", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal",
}  # fmt: skip
NAMED = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@functools.cache
def names_in(file: Path) -> set[str]:
    """Functions, classes, Class.methods and constants of a file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_functions_exist(page):
    """`file.py: name` is a function, class or method of the file, or a test."""
    for name, function in NAMED.findall(page.read_text()):
        assert (ROOT / name).exists(), f"{name}: no such file"
        assert function in names_in(ROOT / name), f"{name} has no {function}"


def test_every_equation_has_a_function_and_a_test():
    """Each row of docs/equations.md names a function and a test."""
    rows = 0
    for line in (ROOT / "docs" / "equations.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| paper"):
            continue
        files = [name for name, _ in NAMED.findall(line)]
        assert any(not name.startswith("tests/") for name in files), f"no function: {line}"
        assert any(name.startswith("tests/") for name in files), f"no test: {line}"
        rows += 1
    assert rows > 30


# --------------------------------------------------------------------------------------------------
# Commands


@functools.cache
def flags_of(file: Path) -> set[str]:
    """The options of a program whose command line is made from its class Args."""
    classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    (args,) = [node for node in classes if node.name == "Args"]
    fields = [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]
    words = [field.replace("_", "-") for field in fields]
    return {f"--{word}" for word in words} | {f"--no-{word}" for word in words} | {"--help"}


def commands_in(text: str) -> list[tuple[str, str]]:
    """(program, what follows it) of the commands in a text: what is in backticks, and whole lines,
    continued ones put together."""
    text = re.sub(r"\\\n\s*", " ", text)
    pieces = re.findall(r"`([^`\n]+)`", text) + text.splitlines()
    found = []
    for piece in pieces:
        for command in re.split(r"&&|[|#`;]", piece):
            for program in PROGRAMS:
                if match := re.search(rf"(?:^|\s){re.escape(program)}(?=\s|$)(.*)", command):
                    found.append((program, match[1]))
    return found


COMMAND_TEXTS = [*PAGES, *sorted(set(PROGRAMS.values()))]


@pytest.mark.parametrize("source", COMMAND_TEXTS, ids=page_name)
def test_flags_of_commands_exist(source):
    """Of the commands in the pages and in the programs' own docstrings."""
    text = source.read_text()
    if source.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    for program, rest in commands_in(text):
        unknown = set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)) - flags_of(PROGRAMS[program])
        assert not unknown, f"{program} has no {unknown}:{rest}"


def test_flags_are_of_some_program():
    """Also those named outside of commands; from_the_originals.md names those of other programs."""
    known = FOREIGN.union(*map(flags_of, PROGRAMS.values()))
    for page in PAGES:
        if page.name != "from_the_originals.md":
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - known
            assert not unknown, page_name(page)


def test_pytest_commands_find_tests():
    """pytest FILE -k NAME: the file is there, and has such a test."""
    commands = 0
    for page in PAGES:
        for line in page.read_text().splitlines():
            for file, words in re.findall(r"pytest (?:-s )?(\w[\w/]*\.py)(?: -k (\w+))?", line):
                assert (ROOT / file).exists(), f"{page_name(page)}: {file}"
                names = [n for n in names_in(ROOT / file) if n.startswith("test_")]
                assert any(words in n for n in names), f"{page_name(page)}: {file} -k {words}"
                commands += 1
    assert commands > 0


# --------------------------------------------------------------------------------------------------
# Links


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them from the headings."""
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.M):
        kept = re.sub(r"[^\w\s-]", "", heading.lower())
        anchors.add(kept.strip().replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        assert linked.is_relative_to(ROOT), f"{target} is outside of the repository"
        if anchor:
            assert anchor in anchors_of(linked), f"{target}: no such heading"


def test_every_page_is_linked():
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
            linked.add((page.parent / target).resolve())
    for page in PAGES[1:]:
        assert page in linked, f"no page links to {page_name(page)}"
