"""Hints, when you want one:  python hints.py 2.1      the second one:  python hints.py 2.1 2"""

import json
import sys
from pathlib import Path

HINTS = json.loads((Path(__file__).parent / "hints.json").read_text("utf-8"))


def main(argv):
    if not argv or argv[0] not in HINTS or argv[1:] not in ([], ["1"], ["2"]):
        print(__doc__ + f"\nThere are hints for {', '.join(HINTS)}.")
        return 1
    item, number = HINTS[argv[0]], int(argv[1]) if argv[1:] else 1
    print(f"{argv[0]} {item['name']}, hint {number} of {len(item['hints'])}:")
    print(item["hints"][number - 1])
    print(f"Read: {item['read']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
