"""All judges that come with the package: importing this registers them."""

from __future__ import annotations

from . import llm_judge, pair_model, rules

__all__ = ["llm_judge", "pair_model", "rules"]
