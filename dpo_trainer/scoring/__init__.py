"""Scoring: a `PairBatch` comes in; the model computes each token once, and `PairLogps` go out."""
