"""The catalogue of bugs fits the code: each can be put in, and is tried on tests that exist."""

import ast

import mutants
import pytest

BUGS = mutants.read_mutants(mutants.ROOT / "tests/mutants.txt")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.number} {bug.file}")
def test_a_bug_can_be_put_in(bug):
    text = (mutants.ROOT / bug.file).read_text()
    assert text.count(bug.old) == 1, f"{bug.idea}: the old text must stand once in {bug.file}"
    assert ast.dump(ast.parse(text.replace(bug.old, bug.new))) != ast.dump(ast.parse(text))


def test_the_tests_that_should_notice_exist():
    assert {bug.tests for bug in BUGS} <= set(mutants.TESTS)
    for patterns in (*mutants.TESTS.values(), mutants.WIDER):
        mutants.files_of(patterns)
