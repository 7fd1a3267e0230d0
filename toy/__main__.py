"""Pretrains the toy's tokenizer and transformers from nothing: minutes on two cores.

    python -m toy                       # renders scenes, trains the tokenizer and the transformers
    python -m toy --out my_weights      # the same, somewhere else
    python -m toy --spread              # measures how varied their pictures are, into spread.json
"""

import argparse
from pathlib import Path

from toy.models import FOLDER
from toy.pretraining import measure_spread, pretrain_toy


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m toy",
        description="Pretrains the toy's tokenizer and transformers from nothing.")
    parser.add_argument("--out", type=Path, default=FOLDER,
                        help="folder for the three checkpoints (default: toy/weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=16000,
                        help="pictures per task (default: 16000)")
    parser.add_argument("--only", choices=("vq", "c2i", "t2i"),
                        help="remake this one, with the tokenizer in --out")
    parser.add_argument("--spread", action="store_true",
                        help="pretrain nothing: measure how varied the pictures of the weights in "
                             "--out are, the yardstick of a run's D")
    args = parser.parse_args(argv)
    if args.spread:
        measure_spread(args.out)
        print(f"wrote {args.out / 'spread.json'}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    pretrain_toy(args.out, args.seed, args.scenes, args.only)
    print(f"wrote {', '.join(str(path) for path in sorted(args.out.glob('toy_*.pt')))}")


if __name__ == "__main__":
    main()
