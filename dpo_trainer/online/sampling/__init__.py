"""Sampling: token ids of prompts come in, completions of the policy go out, by transformers or by vLLM."""
