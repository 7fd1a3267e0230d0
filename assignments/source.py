"""argrpo.py as text: its items found, blanked, exchanged, and put into a running module.

An item is a function ("rope_table", "Attention.forward") or a section of `train`, which begins at a
comment such as "# 4. Advantages" and ends at the next such comment.  argrpo.py carries no marker.
"""

import ast
import re
import textwrap
from functools import cache
from pathlib import Path

from catalogue import BUGS, VARIANTS

try:
    import tomllib
except ModuleNotFoundError:                      # Python 3.10, where pytest brings it along
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parent
NO_LINE = 10 ** 6                                # beyond it are the reference's lines of `train`
MARKER = re.compile(r" +# (\d+\. \w+|For the log)")


parse = cache(ast.parse)                         # nobody changes these trees


@cache
def read_toml(name):
    return tomllib.loads((HERE / name).read_text("utf-8"))


def label(item):
    """What an item is called in messages."""
    return item.get("function") or item.get("file") or f'section "{item["section"]}" of train'


def reference(variant=None, file="argrpo.py"):
    """The text of argrpo.py, or of another file, with the variant's exchanges."""
    if variant not in (None, *VARIANTS):
        raise ValueError(f"unknown variant {variant!r}: there are {', '.join(VARIANTS)}")
    text = (ROOT / file).read_text("utf-8")
    for bug in BUGS:
        if variant and (bug.variant, bug.file) == (variant, file):
            text = with_bug(text, bug)
    return text


@cache
def parts(variant=None):
    """parts.toml with the variant's exchanges, and its items by id."""
    told = tomllib.loads(reference(variant, "assignments/parts.toml"))
    return told | {"item": {item["id"]: item for item in told["item"]}}


def with_bug(text, bug):
    """The text of bug.file with the bug of the catalogue in it.  Raises ValueError unless what it
    exchanges stands once in the text or, if the bug has an item, in the item's body."""
    lines = text.splitlines(keepends=True)
    first, last = 1, len(lines)
    if bug.item:
        first, last, _ = body_lines(text, CODE_ITEMS[bug.item])
    before, part, after = lines[:first - 1], "".join(lines[first - 1:last]), lines[last:]
    for old, new in bug.exchanges:
        if part.count(old) != 1:
            raise ValueError(f"{old!r} stands {part.count(old)} times in {bug.file}, not once; has "
                             f"it changed?  The bug: {bug.says}")
        part = part.replace(old, new)
    return "".join([*before, part, *after])


def fits(text, bug):
    try:
        return bool(with_bug(text, bug))
    except ValueError:
        return False


ITEMS = parts()["item"]
CODE_ITEMS = {name: item for name, item in ITEMS.items() if "file" not in item}


# ---------------------------------------------------------------------------------------------
# Where an item is
# ---------------------------------------------------------------------------------------------

def find_function(tree, name):
    """The node of a function, or of a method "Class.method"."""
    *outer, last = name.split(".")
    nodes = tree.body
    for cls in outer:
        nodes = next((n.body for n in nodes if isinstance(n, ast.ClassDef) and n.name == cls), [])
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == last:
            return node
    raise ValueError(f"argrpo.py has no function {name}")


def section_lines(text, title):
    """First and last line of a section of `train`, numbered from 1, its comment included."""
    lines = text.splitlines()
    marks = [(i, m.group(1)) for i, line in enumerate(lines, 1) if (m := MARKER.match(line))]
    for (first, name), (following, _) in zip(marks, marks[1:]):
        if name == title:
            return first, following - 1
    raise ValueError(f'argrpo.py has no comment "# {title}", or none after it: the comments that '
                     "number the sections of train must stay")


def body_lines(text, item):
    """First and last line of what is blank in the handout, and its indentation."""
    lines = text.splitlines()
    if "section" in item:
        first, last = section_lines(text, item["section"])
        while lines[first - 1].lstrip().startswith("#"):
            first += 1
        while not lines[last - 1].strip():
            last -= 1
    else:
        node = find_function(parse(text), item["function"])
        statements = node.body[1:] if ast.get_docstring(node) else node.body
        before = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        first, last = before + 1, statements[-1].end_lineno
    return first, last, len(lines[first - 1]) - len(lines[first - 1].lstrip())


def body(text, item):
    first, last, _ = body_lines(text, item)
    return textwrap.dedent("\n".join(text.splitlines()[first - 1:last]))


def with_body(text, item, new):
    """The text with the item's body exchanged; signature, docstring and comment stay."""
    first, last, indent = body_lines(text, item)
    lines = text.splitlines()
    lines[first - 1:last] = textwrap.indent(new.strip("\n"), " " * indent).splitlines()
    return "\n".join(lines) + "\n"


def with_docstring(text, item, docstring):
    """The text with the docstring of the item's function exchanged."""
    node = find_function(parse(text), item["function"])
    lines, old = text.splitlines(), node.body[0]
    new = textwrap.indent(f'"""{docstring.strip()}\n"""', " " * old.col_offset)
    lines[old.lineno - 1:old.end_lineno] = new.splitlines()
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# Blanks
# ---------------------------------------------------------------------------------------------

def blank_body(text, item):
    """What stands in the handout in the place of a body: an error, and the shapes on the way."""
    shapes = re.findall(r"^ *([\w, ]+?) = .*# (\(.*)$", body(text, item), re.M)
    notes = "".join(f"\n#     {name}  # {shape}" for name, shape in shapes)
    if notes:
        notes = "\n# Shapes on the way, as the reference has them:" + notes
    says = f"part {item['id']}: {item.get('function') or item['section']}"
    return f'raise NotImplementedError("{says}"){notes}'


def with_blank(text, item):
    """The text with the item blank, and with the handout's docstring for it, if there is one."""
    blank = blank_body(text, item)
    if "section" in item:
        told = textwrap.wrap(" ".join(item["docstring"].split()), 88)
        blank = "".join(f"# {line}\n" for line in told) + blank
    text = with_body(text, item, blank)
    if "function" in item and "docstring" in item:
        text = with_docstring(text, item, item["docstring"])
    return text


# ---------------------------------------------------------------------------------------------
# Grafting: a submission's item, in a module that is right otherwise
# ---------------------------------------------------------------------------------------------

def names_of(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}


def run_nodes(nodes, module):
    tree = ast.Module(nodes, type_ignores=[])
    exec(compile(tree, "argrpo.py", "exec"), vars(module))


def graft(module, text, item):
    """Puts the item of a submission's text into `module`, which is the reference, loaded.

    What else the submission defines anew at the top level (helpers, imports) comes along; its
    answers to other items do not."""
    tree = ast.parse(text, "argrpo.py")
    for node in tree.body:
        if (names := names_of(node)) and not names & vars(module).keys():
            run_nodes([node], module)
    if "section" in item:
        run_nodes([with_section(module, text, tree, item)], module)
        return
    node, (*outer, name) = find_function(tree, item["function"]), item["function"].split(".")
    if not outer:
        run_nodes([node], module)
        return
    kept = vars(module).get(name)
    cls = getattr(module, outer[0])
    theirs = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    for method in theirs.body:                   # and its helpers
        if isinstance(method, ast.FunctionDef) and (method is node
                                                    or method.name not in vars(cls)):
            run_nodes([method], module)
            setattr(cls, method.name, vars(module).pop(method.name))
    if kept is not None:
        setattr(module, name, kept)


def with_section(module, text, tree, item):
    """The reference's `train`, with one section's statements from the submission."""
    mine = find_function(ast.parse(module.__source__), "train")
    loop = next(node for node in mine.body if isinstance(node, ast.For))
    first, last = section_lines(module.__source__, item["section"])
    places = [i for i, node in enumerate(loop.body) if first <= node.lineno <= last]
    first, last = section_lines(text, item["section"])
    theirs = [node for node in ast.walk(find_function(tree, "train")) if isinstance(node, ast.For)]
    statements = [node for node in theirs[0].body if first <= node.lineno <= last]
    ast.increment_lineno(mine, NO_LINE)
    loop.body[places[0]:places[-1] + 1] = statements or [ast.Pass(lineno=first, col_offset=0)]
    return ast.fix_missing_locations(mine)
