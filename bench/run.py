"""Benchmarks: `python bench/run.py`, or `make bench`. `--help` lists cases and options."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from bench.command import main

    sys.exit(main())
