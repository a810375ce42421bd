"""A reference whose log-probs are on disk: computed once, found again by what they are the log-probs of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..distributed.sharding import is_sharded
from ..storage.folders import cache_folder
from ..types import PairBatch, PairLogps, TokenLogps
from .cache import Record, Store, keep_within
from .identity import Identity
from .strategies import Reference


class CachedReference(Reference):
    """Reads log-probs from a store, and writes what it computes there.

    The reference itself, the source, is asked only for what the store lacks. If it is a model of its own, or the policy
    before it moves, it is let go before training begins (`release`), and made again from where it was loaded if rows come
    later that were not seen before (`revive`). If it is the policy with another adapter, or none, it is always there.

    Args:
        source: computes what is missing.
        store: of exactly this reference, see `identity`.
        identity: what `source` is, as a hash; `precision`: what it computes in (see `identify`).
        tokens: whether log-probs per token are needed, and not only their sums.
        remake: loads the source again; None where it was never loaded by name.
    """

    keyed = True

    def __init__(
        self,
        source: Reference,
        store: Store,
        identity: Identity,
        *,
        precision: str,
        tokens: bool,
        remake: Callable[[], Reference] | None = None,
    ):
        self.source: Reference | None = source
        self.store = store
        self._identity = identity
        self.precision = precision
        self.tokens = tokens
        self.remake = remake
        self.own = source.own
        self.lasting = source.lasting
        self.description = f"{source.description}; its log-probs are cached in {store.path}"

    def identity(self, policy: nn.Module, precision: str) -> Identity:
        return self._identity

    def logps(self, policy: nn.Module, batch: PairBatch) -> PairLogps:
        if batch.keys is None:
            raise ValueError(
                "--precompute_ref_log_probs looks reference log-probs up by the content of completions, and this batch does "
                "not say it: use DataCollatorForPreference(..., keyed=True), or leave the option off."
            )
        found = self.store.get(batch.keys, tokens=self.tokens)
        records = [record for record in found if record is not None]
        if len(records) < len(found):
            records = self._compute_missing(policy, batch)
        return _as_logps(records, batch)

    def _compute_missing(self, policy: nn.Module, batch: PairBatch) -> list[Record]:
        cut = any(map(is_sharded, policy.parameters()))  # other ranks lack nothing, and would not answer
        if self.source is None or cut:
            why = "an engine has cut the model between ranks" if cut else "the reference is no longer in memory"
            raise ValueError(
                f"Rows with the example_ids {batch.example_ids.unique().tolist()} have no cached reference log-probs, and {why}: "
                "they were not in the data when training began (a stream that comes otherwise the second time?), or a file of "
                "the cache was damaged since. Start again, or leave --precompute_ref_log_probs off."
            )
        records = self.compute(policy, batch)
        self.store.put(records)
        return [records[key] for key in batch.keys or ()]

    def compute(self, policy: nn.Module, batch: PairBatch) -> dict[bytes, Record]:
        """The records of all completions of a batch, from the source, which is there. Nothing is written."""
        assert self.source is not None
        assert batch.keys is not None
        # Not through DDP: other ranks may have nothing to compute, and would not answer.
        logps = self.source.logps(extract_model_from_parallel(policy), batch)
        assert logps is not None
        assert logps.tokens is not None
        return dict(zip(batch.keys, _records(logps.tokens, with_tokens=self.tokens), strict=True))

    def missing(self, keys: Sequence[bytes]) -> list[bool]:
        """For each key, whether the store lacks it."""
        return [record is None for record in self.store.get(keys, tokens=self.tokens)]

    def place(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        if self.source is not None:
            self.source.place(prepare)
            self.own = self.source.own

    def release(self) -> Reference:
        """Let the source go, where it would be a second model in memory, or moves from now on."""
        if self.source is not None:
            self.source = self.source.release()
            self.own = [] if self.source is None else self.source.own
        return self

    def revive(self) -> None:
        """Make the source again.

        Raises:
            ValueError: where it was never loaded by name, or another model is there now.
        """
        if self.remake is None:
            raise ValueError(
                "These rows have no cached reference log-probs, and the reference is no longer in memory: it was the model "
                "itself before training, or was given as an object. Give the rows before training (as eval_dataset, or to "
                "evaluate()), give the model and ref_model by name, or leave --precompute_ref_log_probs off."
            )
        source = self.remake()
        found = source.identity(source.own[0][1], self.precision)
        assert found is not None
        if found.digest != self._identity.digest:
            raise ValueError(
                f"These rows have no cached reference log-probs, and the reference that is loaded again from "
                f"{found.about['source']} is another than the run began with ({found.digest[:12]}, not "
                f"{self._identity.digest[:12]}): its files have changed, or it was changed after it was loaded."
            )
        self.source, self.own = source, source.own


def cached(
    source: Reference,
    policy: nn.Module,
    *,
    folder: str | None,
    quota_gb: float,
    precision: str,
    tokens: bool,
    remake: Callable[[], Reference] | None,
) -> CachedReference:
    """`source`, with its log-probs on disk, in the file of what it is. Older files are deleted beyond the quota."""
    identity = source.identity(policy, precision)
    assert identity is not None
    where = cache_folder(folder, "reference")
    store = Store(where, identity.digest, identity.about)
    keep_within(where, int(quota_gb * 1e9), sparing=identity.digest)
    return CachedReference(source, store, identity, precision=precision, tokens=tokens, remake=remake)


def _records(tokens: TokenLogps, *, with_tokens: bool) -> list[Record]:
    """One per completion, on the host."""
    sums = tokens.sum_by_completion(tokens.logps).tolist()
    lengths = tokens.lengths.tolist()
    if not with_tokens:
        return [Record(logp, count) for logp, count in zip(sums, lengths, strict=True)]
    split = np.split(tokens.logps.float().cpu().numpy(), np.cumsum(lengths)[:-1])
    return [Record(*values) for values in zip(sums, lengths, split, strict=True)]


def _as_logps(records: Sequence[Record], batch: PairBatch) -> PairLogps:
    """[C] records -> what the reference would have returned, float32 on the device of the batch."""
    device = batch.lengths.device

    def to_device(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).to(device, non_blocking=True)

    sums = to_device([record.logp for record in records])
    per_token = [record.tokens for record in records if record.tokens is not None]
    tokens = None
    if len(per_token) == len(records):
        tokens = TokenLogps(
            logps=to_device(np.concatenate(per_token)),
            completion=batch.completion,
            position=batch.completion_position,
            chosen=batch.chosen,
            rejected=batch.rejected,
            lengths=batch.lengths,
        )
    return PairLogps(
        chosen=sums[batch.chosen],
        rejected=sums[batch.rejected],
        chosen_lengths=batch.lengths[batch.chosen],
        rejected_lengths=batch.lengths[batch.rejected],
        tokens=tokens,
    )
