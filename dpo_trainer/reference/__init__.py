"""Where reference log-probs come from: one protocol, its strategies, and the only place that chooses between them."""

from .cache import Record
from .cached import CachedReference, cached
from .choose import choose_reference
from .hashing import WeightsElsewhere
from .identity import Identity, identify
from .moving import MovingAdapter, MovingModel
from .strategies import DisabledAdapter, FrozenModel, NamedAdapter, NoReference, OnCopy, Reference, UntrainedPolicy

__all__ = [
    "CachedReference",
    "DisabledAdapter",
    "FrozenModel",
    "Identity",
    "MovingAdapter",
    "MovingModel",
    "NamedAdapter",
    "NoReference",
    "OnCopy",
    "Record",
    "Reference",
    "UntrainedPolicy",
    "WeightsElsewhere",
    "cached",
    "choose_reference",
    "identify",
]
