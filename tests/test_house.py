"""The house itself: floors, names, sizes, and that the documentation names files that exist.

The house is small enough to be held in one's head.  Each rule here keeps it so.  When it is broken,
it says where, and what to do.  The code is read as text, and not imported.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors, from below.  A room is a file of the root or a folder.
COMMANDS = {"train_c2i", "train_t2i", "sample", "report", "evaluate"}
FLOORS = [
    {"argrpo", "vqgan", "reward"},
    {"pretrained", "captions", "diversity"},
    {"toy"},
    {"rewards"},
    {"harness"},
    {*COMMANDS, "labs", "assignments", "benchmarks", "examples"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What the method may need besides Python itself.
PACKAGES = {"argrpo": {"torch", "einops"}, "vqgan": {"torch"}}

# The one way up: reward.py has a table of the modules of rewards/, and imports one of them when a
# user gives a name that is in it.
WAY_UP = (Path("reward.py"), "rewards.")
IMPORTERS = {"import_module", "find_spec", "__import__", "run_module"}


def git_files():
    """Every file of the repository, as a path from the root.  What a user keeps beside it, such as
    a reward or runs, is none of the house's."""
    if not (ROOT / ".git").exists():
        pytest.skip("a download without .git does not say which files are the repository's",
                    allow_module_level=True)
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--deduplicate"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


FILES = git_files()
MODULES = [path for path in FILES if path.suffix == ".py"]
HOUSE = [path for path in MODULES if path.parts[0] != "tests"]
NAMES = {".".join(path.with_suffix("").parts) for path in HOUSE if len(path.parts) > 1}


def room_of(path):
    return path.parts[0] if len(path.parts) > 1 else path.stem


def offenders(rule, found):
    """Fails with the rule, and what broke it, a line each."""
    assert not found, "\n".join([rule, *(f"  {line}" for line in found)])


# --- floors ------------------------------------------------------------------------------------

def names_a_module(text):
    """Whether this is such as "rewards.clip", or such as "rewards.", the beginning of one."""
    return text in NAMES or text in {f"{room}." for room in FLOOR_OF}


def imports(path):
    """(line, name) of all that a file imports, on top, inside functions and by name.

    By name: the text in `import_module("toy")`, and "rewards.clip" or f"rewards.{name}" anywhere,
    for a text that is a module's whole name has no other use."""
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module if node.level == 0 else room_of(path)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if getattr(node.func, "attr", getattr(node.func, "id", None)) in IMPORTERS:
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Constant) and names_a_module(node.value):
            if path != WAY_UP[0] or not node.value.startswith(WAY_UP[1]):
                yield node.lineno, node.value


@cache
def rooms_entered(path):
    """[(line, room)] of the imports of this house, other than of a room by itself."""
    own, script = room_of(path), not (ROOT / path.parent / "__init__.py").exists()
    entered = []
    for line, name in imports(path):
        room = name.split(".")[0]
        # A script's own folder is searched first.
        if len(path.parts) > 1 and script and (ROOT / path.parent / f"{room}.py").exists():
            room = own
        if room in FLOOR_OF and room != own:
            entered.append((line, room))
    return entered


def test_imports_are_seen_wherever_they_are(tmp_path):
    file = tmp_path / "doors.py"
    file.write_text('import toy.models, torch\ndef f(name):\n    from rewards import clip\n'
                    '    importlib.import_module("harness")\n    load(f"rewards.{name}")\n'
                    '    find_spec("report")\n    read("report")\n', "utf-8")
    assert list(imports(file)) == [(1, "toy.models"), (1, "torch"), (3, "rewards"), (4, "harness"),
                                   (6, "report"), (5, "rewards.")]


def test_every_module_has_its_floor():
    offenders("A file or folder of the root stands on no floor: FLOORS, above, and the table of "
              "DESIGN.md say which there are.",
              sorted({room_of(path) for path in HOUSE} - set(FLOOR_OF)))
    offenders("FLOORS names rooms that are not there.",
              sorted(set(FLOOR_OF) - {room_of(path) for path in HOUSE}))


def test_a_room_imports_only_from_floors_below_and_from_itself():
    found = [f"{path}:{line} imports {room}, which is not below {room_of(path)}"
             for path in HOUSE for line, room in rooms_entered(path)
             if FLOOR_OF[room] >= FLOOR_OF.get(room_of(path), len(FLOORS))]
    offenders("A room imports only from floors below its own; imports inside functions and by name "
              "count.  Move what both need down, or hand it in from above as an argument.", found)


def test_nothing_imports_a_command():
    found = [f"{path}:{line} imports {room}" for path in HOUSE
             for line, room in rooms_entered(path) if room in COMMANDS]
    offenders("A command is the top of the house.  What others need of it belongs into harness/.",
              found)


@pytest.mark.parametrize("module", PACKAGES)
def test_the_method_needs_little(module):
    allowed = PACKAGES[module] | set(sys.stdlib_module_names)
    found = [f"{module}.py:{line} imports {name}" for line, name in imports(Path(f"{module}.py"))
             if name.split(".")[0] not in allowed]
    offenders(f"{module}.py imports {' and '.join(sorted(PACKAGES[module]))}, and what Python has.",
              found)


# --- packages ----------------------------------------------------------------------------------

NAMED_OTHERWISE = {"PIL": "pillow", "open_clip": "open_clip_torch"}
OWN = {part for path in MODULES for part in path.with_suffix("").parts}


def required(*names):
    """The packages that files of requirements name, without those of the files that they include.
    """
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines if line[:1].isalpha()}


def test_what_is_imported_is_required():
    """Also what another package happens to bring along: one day it may not, or not new enough."""
    always = required("requirements.txt")
    sometimes = always | required("requirements-dev.txt", "requirements-rewards.txt")
    found = []
    for path in MODULES:
        lines = (ROOT / path).read_text().splitlines()
        for line, name in imports(path):
            package = name.split(".")[0]
            if package in OWN or package in (*sys.stdlib_module_names, "tomllib"):
                continue
            at_the_top = lines[line - 1].startswith(("import", "from")) and path in HOUSE
            if NAMED_OTHERWISE.get(package, package) not in (always if at_the_top else sometimes):
                found.append(f"{path}:{line} imports {package}")
    offenders("requirements.txt names each package that is imported at the top of a file, and the "
              "oldest version that is known to do; what one option needs is imported where it is "
              "used, and stands in requirements-dev.txt or requirements-rewards.txt.", found)


# --- names -------------------------------------------------------------------------------------

def test_no_two_modules_share_a_name():
    places = {}
    for path in MODULES:
        handed_out = path.is_relative_to("assignments/handout")      # a tree of its own
        if path.stem not in ("__init__", "__main__", "conftest") and not handed_out:
            places.setdefault(path.stem, []).append(str(path))
    offenders("One name for one thing: a reader who searches for a module finds one.",
              [f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1])


def test_every_test_file_runs():
    options = (ROOT / "pyproject.toml").read_text("utf-8")
    folders = re.findall(r'"([^"]+)"', re.search(r"testpaths = \[(.*?)\]", options, re.S)[1])
    found = [str(path) for path in FILES if path.match("tests/**/test_*.py")
             and not any(path.is_relative_to(folder) for folder in folders)]
    offenders("testpaths of pyproject.toml, which gives the order, leaves out:", found)


# --- sizes -------------------------------------------------------------------------------------

@cache
def lines_of_code(path):
    """The lines of a file without blanks, comments and docstrings."""
    text = (ROOT / path).read_text("utf-8")
    docstrings, lines = set(), set()
    for node in ast.walk(ast.parse(text)):
        if (isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
                and ast.get_docstring(node) is not None):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings(tmp_path):
    file = tmp_path / "six.py"
    file.write_text('"""A docstring\nof two lines."""\n\n# a comment\nx = """a text,\n\nno '
                    'docstring"""\n\ndef f():\n    """Another."""\n    return (1,    # a comment\n'
                    '            2)\n', "utf-8")
    assert lines_of_code(file) == 6


# The aim for the house is 4,400: lower its number with every line that goes.
SIZES = {                                        # what: (the most lines of code, its modules)
    "the house": (4705, lambda path: room_of(path) not in ("labs", "assignments", "benchmarks",
                                                           "examples")),
    "benchmarks/": (450, lambda path: room_of(path) == "benchmarks"),
}


@pytest.mark.parametrize("what", SIZES)
def test_the_house_stays_small(what):
    most, belongs = SIZES[what]
    sizes = {path: lines_of_code(path) for path in HOUSE if belongs(path)}
    total, largest = sum(sizes.values()), sorted(sizes, key=sizes.get)[-8:]
    assert total <= most, (
        f"{what} has {total} lines of code, and is to have {most} at most: look for one idea where "
        f"there are two, not for denser lines.  The largest: {', '.join(map(str, largest))}")


def most_lines(path):
    if str(path) == "argrpo.py":
        return 430
    return 99 if str(path.with_suffix("")) in COMMANDS else 280


def test_no_file_outgrows_its_reader():
    found = [f"{path} has {lines_of_code(path)}, at most {most_lines(path)}" for path in HOUSE
             if lines_of_code(path) > most_lines(path)]
    offenders("Lines of code.  Look for the simpler idea before the second file.", found)


@pytest.mark.parametrize("name, most", {"argrpo.py": 720, "README.md": 150}.items())
def test_what_is_read_in_one_sitting_stays_so(name, most):
    lines = len((ROOT / name).read_text("utf-8").splitlines())
    assert lines <= most, f"{name} has {lines} lines, all counted, and is to have {most} at most"


def test_the_harness_has_few_rooms():
    files = sorted(path.name for path in HOUSE
                   if room_of(path) == "harness" and path.stem != "__init__")
    offenders("harness/ has at most 14 files.", files if len(files) > 14 else [])


# --- documentation -----------------------------------------------------------------------------

FOLDERS = {path.parts[0] for path in FILES if len(path.parts) > 1}
TEXTS = [path for path in FILES if path.suffix == ".md"
         or (path.suffix == ".py" and len(path.parts) == 1)]
A_FILE_OF_OURS = re.compile(r"[\w./-]+\.(py|md|toml|sh|j2|ini)")
OTHERS = {                                       # files that are somebody else's
    "my_rewards.py",                             # a user's
    "answers.toml",                              # a student's
    "results.md",                                # what evaluate.py writes
    "summary_scores.py",                         # GenEval's
    "toy.py",                                    # what `python -m toy` was called once
}


def paths_named(path):
    """The paths that a text names: in code, in links and, in a docstring, anywhere."""
    text = (ROOT / path).read_text("utf-8")
    if path.suffix == ".py":
        code = ast.get_docstring(ast.parse(text)) or ""
        links = []
    else:
        code = " ".join(re.findall(r"```.*?```|`[^`]+`", text, re.S))
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)
                 if "://" not in link]
    words = [word.rstrip(".") for word in re.findall(r"[\w./-]+", re.sub(r"\w+://\S+", "", code))]
    files = [word for word in words if A_FILE_OF_OURS.fullmatch(word)
             or ("/" in word and word.split("/")[0] in FOLDERS)]
    commands = [f"{folder}/__main__.py" for folder in re.findall(r"python -m (\w+)", code)
                if folder in FOLDERS]
    return [link for link in links if link] + files + commands


def exists(name, text):
    """Whether there is such a file: from the root, from the text's folder, or anywhere if the name
    has no folder.  Capitals such as the N of partN.py stand for anything, and so does FILE/."""
    if name in OTHERS or re.match(r"[A-Z]+/", name):
        return True
    places = [ROOT, ROOT / text.parent]
    if any((place / name).exists() for place in places):
        return True
    if "/" not in name:
        return any(path.name == name for path in FILES)
    pattern = re.sub(r"[A-Z]+(?=\.\w+$)", "*", name)
    return pattern != name and any(any(place.glob(pattern)) for place in places)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_the_documentation_names_files_that_exist(text):
    missing = [name for name in dict.fromkeys(paths_named(text)) if not exists(name, text)]
    offenders(f"{text} names files that are not there.", missing)
