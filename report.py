"""The page of a run: what it did to the pictures, its curves, and what the doctor says.

    python report.py runs/train_c2i-toy                # writes report.html into the run's folder
    python report.py runs/one runs/two                 # compares runs: comparison.html
    python report.py --doctor runs/train_c2i-toy       # only what the doctor says

It reads the run's files and loads no model: it works while a run is going, and after it was killed.
"""

import argparse
import sys
from pathlib import Path

from harness import doctor
from harness.page import read_run, write_page


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--doctor", action="store_true", help="print what is wrong, if anything")
    parser.add_argument("--out", type=Path, help="the page; default RUN/report.html, or "
                                                 "comparison.html for several runs")
    args = parser.parse_args(argv)
    try:
        if args.doctor:
            for folder in args.runs:
                run = read_run(folder)
                lines = doctor.report(run.metrics, run.settings, run.summary)
                print(f"{folder}:", *lines, sep="\n")
            return
        single = Path(args.runs[0]) / "report.html"
        path = args.out or (single if len(args.runs) == 1 else Path("comparison.html"))
        write_page(args.runs, path)
        print(f"wrote {path}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
