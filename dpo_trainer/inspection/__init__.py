"""Inspect before you train: what is in a preference dataset, as the model of a run would see it.

rows.py        rows as training reads them, errors kept    collect.py   one pass over them; facts.py, checks.py, similar.py
measure.py     numbers from arrays                         estimate.py  steps and memory; shape.py, plan.py
show.py        rows token by token                         result.py    all of it
findings.py    what to know, in sentences                  chapters.py  the tables; terminal.py, page.py, plots.py
"""

from .arguments import InspectionArguments, parse
from .findings import findings
from .result import Inspection
from .run import inspect, run, write

__all__ = ["Inspection", "InspectionArguments", "findings", "inspect", "parse", "run", "write"]
