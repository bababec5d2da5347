"""Make one written call of a stage: the program of every process that launch.py starts."""

import sys

from orpo_distill.launch import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
