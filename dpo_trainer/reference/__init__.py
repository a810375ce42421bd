"""Where reference log-probs come from: one protocol, its strategies, and the only place that chooses between them."""

from .choose import choose_reference
from .strategies import DisabledAdapter, FrozenModel, NamedAdapter, NoReference, Reference

__all__ = ["DisabledAdapter", "FrozenModel", "NamedAdapter", "NoReference", "Reference", "choose_reference"]
