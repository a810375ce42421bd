"""Tokens: a `Pair` comes in; it is written by the chat template, encoded and truncated, and goes out as token ids."""
