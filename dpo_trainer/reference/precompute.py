"""Reference log-probs of a whole dataset, ahead of training: what the cache lacks is computed, packed by length."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..data.batches.collate import inputs_of, read_row
from ..data.batches.packs import packs
from ..data.content import completion_keys
from ..scoring.layout import Layout
from ..types import PairBatch, TokenizedPair
from . import CachedReference, Record

WINDOW = 4096  # rows that are sorted by length at a time, and looked up in the cache together
WINDOW_OF_IMAGES = 128  # the same where they have images, which are all in memory then
# On a CPU, the arrays of larger packs are above 32 MiB, which glibc gives back after each use: up to a fifth of the time goes
# into mapping them anew (benchmarks/reference_cache.py). Not measured on accelerators.
TOKENS = {"cpu": 2048, "others": 16_384}
FLUSH_SECONDS = 2.0  # what a kill can cost; a write waits for the disk


class Filled(NamedTuple):
    """What became of the completions of a dataset, on all ranks."""

    name: str
    found: int
    computed: int
    tokens: int  # that went through the model
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.computed else ""
        return (
            f"Reference log-probs of {self.name}: {self.found + self.computed:,} completions, {self.found:,} found in the "
            f"cache, {self.computed:,} computed ({self.seconds:.1f} s{rate})."
        )


@dataclass(kw_only=True)
class Precompute:
    """Fills the cache of a reference. Draws no random numbers, and leaves dataset and policy as they are.

    Args:
        max_tokens: of one forward pass; None for `TOKENS` of the device. A row that is longer goes by itself.
        in_step: whether every rank must make as many forward passes as the others, because the weights are sharded.
        place: puts a reference that was made again where it belongs.
    """

    reference: CachedReference
    layout: Layout
    pad_token_id: int
    accelerator: Accelerator
    max_tokens: int | None
    disable_tqdm: bool
    in_step: bool
    place: Callable[[], None]

    def __call__(self, policy: nn.Module, dataset: Iterable[dict[str, Any]], name: str, limit: int | None) -> Filled:
        """Every completion of the first `limit` rows (None: of all) is in the cache afterwards. All ranks must call."""
        began = time.perf_counter()
        gone = self.reference.source is None
        # Before training, nothing has wrapped the model in autocast; engines that cut weights compute without.
        with nullcontext() if self.in_step else self.accelerator.autocast():
            self._settle_layout(policy, dataset)
            counts = torch.zeros(3, dtype=torch.int64)
            for share, shares in self._shares():
                counts += self._fill(policy, dataset, name, limit, share, shares)
                self.accelerator.wait_for_everyone()
        if gone:
            self.reference.release()  # what had to be fetched for this
        found, computed, tokens = self.accelerator.reduce(counts.to(self.accelerator.device), "sum").tolist()
        self.reference.store.note_use(hits=int(counts[0]), computed=int(counts[1]))
        return Filled(name, found, computed, tokens, time.perf_counter() - began)

    def _shares(self) -> list[tuple[int, int]]:
        """(number, of how many): which rows this rank computes. Nodes whose disks are their own need a second round, in
        which each computes for itself what the others wrote elsewhere."""
        ranks = self.accelerator.num_processes
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        shares = [(self.accelerator.process_index, ranks)]
        return shares if on_this_node == ranks else [*shares, (self.accelerator.local_process_index, on_this_node)]

    def _settle_layout(self, policy: nn.Module, dataset: Iterable[dict[str, Any]]) -> None:
        """On all ranks alike, for it ends in one verdict; the first batch of training would do the same."""
        if self.layout.settled:
            return
        rows = [read_row(row, place) for place, row in enumerate(itertools.islice(dataset, 2))]
        if rows and self.in_step:  # the policy is not sharded yet, and perhaps too large for this device
            self.layout.verify_references(rows, self.accelerator.device)
        elif rows:
            self.layout.verify(policy, rows, self.accelerator.device)

    def _fill(
        self,
        policy: nn.Module,
        dataset: Iterable[dict[str, Any]],
        name: str,
        limit: int | None,
        share: int,
        shares: int,
    ) -> torch.Tensor:
        """[found, computed, tokens] of this rank's rows."""
        counts = torch.zeros(3, dtype=torch.int64)
        rows = itertools.islice(dataset, limit)
        hide = self.disable_tqdm or not self.accelerator.is_local_main_process
        with (
            _Flushed(self.reference) as write,
            tqdm(desc=f"Reference log-probs of {name}", unit=" rows", total=_length(dataset), disable=hide) as bar,
        ):
            place = 0
            size = WINDOW if self.layout.images is None else WINDOW_OF_IMAGES
            while window := list(itertools.islice(rows, size)):
                mine = [self._loaded(row, at) for at, row in enumerate(window, start=place) if at % shares == share]
                missing = self._missing(mine)
                counts[0] += sum(len(row.completions) for row in mine) - sum(len(r.completions) for r in missing)
                for pack, wanted in self._turns(missing, spare=self._loaded(window[0], place)):
                    batch = self._batch(pack)
                    records = self.reference.compute(policy, batch)
                    if not wanted:
                        continue
                    write(records)
                    counts[1] += len(batch.lengths)
                    counts[2] += batch.num_tokens
                    bar.update(len(pack) * shares)
                place += len(window)
                bar.update(place - bar.n)
        return counts

    def _loaded(self, row: Mapping[str, Any], place: int) -> TokenizedPair:
        """With its images, for they are part of what a completion is known by."""
        read = read_row(row, place)
        return read if self.layout.images is None else self.layout.images.load(read)

    def _turns(
        self, missing: Sequence[TokenizedPair], spare: TokenizedPair
    ) -> Iterator[tuple[list[TokenizedPair], bool]]:
        """Packs of what is missing, with True; then `spare`, with False, as long as ranks in step have more to do."""
        most = self.max_tokens or self._tokens_of_device()
        packed = list(packs(missing, most, padded=self.layout.name == "padded"))
        turns = self._most_of_all_ranks(len(packed)) if self.in_step else len(packed)
        if turns and self.reference.source is None:
            self.reference.revive()
            self.place()
        yield from ((pack, True) for pack in packed)
        yield from (([spare], False) for _ in range(turns - len(packed)))

    def _most_of_all_ranks(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _tokens_of_device(self) -> int:
        return TOKENS.get(self.accelerator.device.type, TOKENS["others"])

    def _missing(self, rows: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """Rows of which the cache lacks a completion, each content once."""
        keys = [completion_keys(row) for row in rows]
        lacks = iter(self.reference.missing([key for own in keys for key in own]))
        wanted = [(row, own) for row, own in zip(rows, keys, strict=True) if any([next(lacks) for _ in own])]
        return list({tuple(own): row for row, own in wanted}.values())

    def _batch(self, rows: Sequence[TokenizedPair]) -> PairBatch:
        inputs = inputs_of(rows, self.layout.name, self.pad_token_id, keyed=True, images=self.layout.images)
        return PairBatch.from_inputs(inputs, self.accelerator.device)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


class _Flushed:
    """Collects records, and writes them every few seconds and at the end, also at that of an exception."""

    def __init__(self, reference: CachedReference):
        self.store = reference.store
        self.waiting: dict[bytes, Record] = {}
        self.written = time.monotonic()

    def __enter__(self) -> _Flushed:
        return self

    def __call__(self, records: dict[bytes, Record]) -> None:
        self.waiting |= records
        if time.monotonic() - self.written > FLUSH_SECONDS:
            self._write()

    def _write(self) -> None:
        if self.waiting:
            self.store.put(self.waiting)
        self.waiting, self.written = {}, time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._write()
