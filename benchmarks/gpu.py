"""All that is to be checked and measured on a GPU, in one command, planned for ten minutes:

    python benchmarks/gpu.py --out DIR
    python benchmarks/gpu.py --out DIR --rehearsal     # at toy size, on the CPU

It has not run on a GPU yet.  Each part is a run of bench.py, in a process of its own: whatever
happens to one, the others go on.  After each, DIR/gpu.md holds what is known so far: what became of
the parts, and what they have printed.  DIR/PART.json has the figures, DIR/PART.log all the text.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

PAPER = "--prompts 4 --group 8 --cfg-scale 2 --micro-batch 0 --repeats 2"    # its c2i settings
PARTS = {                                        # name: options; in the order in which they run
    "parity": "--parts parity --tokens 64",
    "mismatch": "--parts mismatch --tokens 64",
    "rollout": f"--parts rollout {PAPER} --compile",
    "step-GPT-B": f"--parts step {PAPER}",
    "step-GPT-L": f"--parts step {PAPER} --size GPT-L --tokens 576",
    "step-GPT-XL": f"--parts step {PAPER} --size GPT-XL --tokens 576",
    "step-GPT-XXL": f"--parts step {PAPER} --size GPT-XXL --tokens 576",
}
REHEARSAL = "--device cpu --size toy --tokens 36 --no-compile"       # the last one given counts


def run_part(options, out, name, limit):
    """Runs a part for `limit` seconds at most: what became of it, and what it has printed."""
    command = [sys.executable, Path(__file__).with_name("bench.py"), *options.split()]
    log = out / f"{name}.log"
    with open(log, "wb") as file:
        try:
            done = subprocess.run([*command, "--out", out / f"{name}.json"], stdout=file,
                                  stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s", log.read_text("utf-8", errors="replace")
    text = log.read_text("utf-8", errors="replace")
    if done.returncode:
        last = text.strip().splitlines()[-1:] or ["no message"]
        return f"failed with status {done.returncode}: {last[0]}", text
    return "NOT OK" if "| False |" in text else "ok", text


def main(argv=None, parts=PARTS, run=run_part):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=10.0, help="that all may take")
    parser.add_argument("--rehearsal", action="store_true", help="at toy size, on the CPU")
    args = parser.parse_args(argv)
    device = REHEARSAL if args.rehearsal else "--device cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    end, lines, texts = time.perf_counter() + 60 * args.minutes, [], []
    for name, options in parts.items():
        start, status, text = time.perf_counter(), "left out: no time left", ""
        if start < end:
            status, text = run(f"{options} {device}", args.out, name, end - start)
        lines.append(f"| {name} | {status} | {time.perf_counter() - start:.0f} s |")
        print(lines[-1], flush=True)
        texts.append(f"## {name}\n\n{text}")
        head = "\n".join(["| part | status | time |", "| --- | --- | --- |", *lines])
        (args.out / "gpu.md").write_text("\n\n".join([head, *texts]) + "\n", "utf-8")
    print(f"look at {args.out}/gpu.md")


if __name__ == "__main__":
    main()
