"""A cache on disk of reference log-probs: one SQLite file per reference, one record per completion.

SQLite over LMDB and Parquet shards: it is in the standard library, a transaction survives a kill at any moment, several
processes may write at once, and a reference is one file that can be copied or deleted. The rollback journal over WAL:
WAL needs memory that all processes share, which network file systems do not have.
"""

from .housekeeping import Summary, keep_within, prune, summaries
from .records import Record
from .store import Store

__all__ = ["Record", "Store", "Summary", "keep_within", "prune", "summaries"]
