"""The command `python -m toy`, which is `main` of pretraining.py."""

from toy.pretraining import main

main()
