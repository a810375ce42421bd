"""This trainer beside TRL's on one dataset: a case of the suite by its data.

    python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt -r benchmarks/requirements-trl.txt
    python benchmarks/beside_trl.py --data hh --data-dir <folder>
    python benchmarks/beside_trl.py --data ultrafeedback --gradient-checkpointing

The same as `python benchmarks/suite.py hh-b8` or `ultrafeedback-b8-gc`; all other options are those of `suite.py`, which also
says what is measured and when it is void. Expect at least 4 times TRL's pairs per second on HH, 2.5 times on UltraFeedback,
and half its memory. About 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import sys

import suite
from cases import DATA


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--batch-size", type=int, choices=(1, 4, 8, 16), default=8)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    own, others = parser.parse_known_args()
    return suite.main([f"{own.data}-b{own.batch_size}{'-gc' * own.gradient_checkpointing}", *others])


if __name__ == "__main__":
    sys.exit(main())
