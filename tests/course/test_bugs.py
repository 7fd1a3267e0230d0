"""The catalogue of bugs fits the code: each can be put in, and none stands twice."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "assignments"))

import mutants  # noqa: E402
import source  # noqa: E402
from catalogue import BUGS, VARIANTS  # noqa: E402


@pytest.mark.parametrize("file", sorted({bug.file for bug in BUGS}))
def test_every_bug_can_be_put_in_and_none_stands_twice(file):
    """What it exchanges stands once in the file, or, for the course, in that of a variant."""
    texts, seen = [source.reference(variant, file) for variant in (None, *VARIANTS)], {}
    for bug in (bug for bug in BUGS if bug.file == file):
        text = next((text for text in texts if source.fits(text, bug)), texts[0])
        assert text is texts[0] or not bug.tests, bug.says
        changed = frozenset(blocks(source.with_bug(text, bug)) - blocks(text))   # or ValueError
        assert changed, f"it changes nothing: {bug.says}"
        assert changed not in seen, f"{bug.says}\nis the same as\n{seen[changed]}"
        seen[changed] = bug.says
        if file.endswith(".py") and not bug.variant:
            ast.parse("\n".join(changed))


def blocks(text):
    """What begins at the left margin, such as a function, without comments."""
    code = "\n".join(line.split("  #")[0].rstrip() for line in text.splitlines())
    return set(re.split(r"\n(?=\S)", code))


def test_who_needs_a_bug_exists():
    assert {bug.tests for bug in BUGS} - {""} <= set(mutants.TESTS)
    assert {bug.item for bug in BUGS} - {""} == set(source.CODE_ITEMS)
    for bug in BUGS:
        assert bug.tests or bug.item or bug.variant in VARIANTS, bug.says
    for patterns in (*mutants.TESTS.values(), mutants.WIDER):
        mutants.files_of(patterns)
