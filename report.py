"""The page of a run: what it did to the pictures, its curves, and what the doctor says.

    python report.py runs/train_c2i-toy                # writes report.html into the run's folder
    python report.py runs/one runs/two                 # compares runs: comparison.html
    python report.py --doctor runs/train_c2i-toy       # only what the doctor says

For one run it makes anew all that is drawn at the end of a run: curves.png, before_after.png and
progress.gif, too.  With --out it writes only the page, there.

It reads the run's files and loads no model: it works while a run is going, and after it was killed.
"""

import argparse
from pathlib import Path

from harness import doctor
from harness.logs import one_line_errors, say, write_bytes
from harness.page import page, read_run, show


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run", type=Path)
    parser.add_argument("--doctor", action="store_true", help="print what is wrong, if anything")
    parser.add_argument("--out", type=Path, help="the page; default RUN/report.html, or "
                                                 "comparison.html for several runs")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.doctor:
            for folder in args.runs:
                run = read_run(folder)
                say(f"{folder}:", *doctor.report(run.metrics, run.settings, run.summary))
        elif args.out or len(args.runs) > 1:
            path = args.out or Path("comparison.html")
            if path.suffix != ".html":
                raise ValueError(f"--out {path}: the page's name must end with .html")
            say(f"wrote {write_bytes(path, page(*map(read_run, args.runs)))}")
        else:
            say(*(f"wrote {path}" for path in show(args.runs[0])))


if __name__ == "__main__":
    main()
