"""Pretrains the toy's tokenizer and transformers from nothing: minutes on two cores.

    python -m toy                       # renders scenes, trains the tokenizer and the transformers
    python -m toy --out my_weights      # the same, somewhere else
"""

import argparse
from pathlib import Path

from toy.models import FOLDER
from toy.pretraining import pretrain_toy


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
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pretrain_toy(args.out, args.seed, args.scenes, args.only)
    print(f"wrote {', '.join(str(path) for path in sorted(args.out.glob('toy_*.pt')))}")


if __name__ == "__main__":
    main()
