"""Batches: a `TokenizedPair` for each row comes in, a `PairBatch` goes out."""
