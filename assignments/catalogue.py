"""The catalogue of bugs, bugs/*.txt: what students and tired maintainers get wrong.

    === argrpo.py
    == policy 1.7 | All rows share one random number, so that they are not independent: the images
    of a group would be alike.
    - uniform[:, None]
    + uniform[:1, None]

"===" names the file of the bugs below it.  "==" begins a bug: who needs it, and in one sentence
what is wrong, for the one who made it.  Then what is exchanged: old lines after "- ", new ones
after "+ ", and so on, if there is more than one place.  Who needs it:

    policy    tests/mutants.py, whose TESTS has the test files that must notice the bug;
    1.7       the grader: the bug is a classic wrong answer to this item, and is put into its body.
              Whoever computes the same as it does reads the sentence;
    @loo      the course's variant of that name: no bug, but text that is exchanged as for one.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple


class Bug(NamedTuple):
    file: str                                    # from the repository's root
    tests: str                                   # a word of tests/mutants.py, or ""
    item: str                                    # such as "1.7", or ""
    variant: str                                 # such as "loo", or ""
    says: str
    exchanges: list                              # [(old text, new text), ...]


def read_bugs(folder=Path(__file__).parent / "bugs"):
    bugs = []
    for path in sorted(folder.glob("*.txt")):
        for block in re.split(r"^(?==)", path.read_text("utf-8"), flags=re.M)[1:]:
            if block.startswith("==="):
                file = block.strip("= \n")
            else:
                bugs.append(read_bug(file, block.splitlines()))
    return bugs


def read_bug(file, lines):
    def sign(line):
        return line[:1] if line[:1] in ("-", "+") else ""
    groups = [(key, list(group)) for key, group in groupby(lines, key=sign)]
    words = " ".join(line for key, group in groups if not key for line in group).split()
    tags, _, says = " ".join(words)[3:].partition(" | ")
    texts = ["\n".join(line[2:] for line in group) for key, group in groups if key]
    kinds = {"tests": "", "item": "", "variant": ""}
    for tag in tags.split():
        kind = "variant" if tag[0] == "@" else "item" if tag[0].isdigit() else "tests"
        kinds[kind] = tag.removeprefix("@")
    return Bug(file, **kinds, says=says, exchanges=list(zip(texts[::2], texts[1::2])))


BUGS = read_bugs()
VARIANTS = {bug.variant: bug.says for bug in reversed(BUGS) if bug.variant}     # the first one says
