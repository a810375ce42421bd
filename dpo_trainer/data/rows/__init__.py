"""Rows: a row of any accepted form comes in, a `Pair` goes out."""
