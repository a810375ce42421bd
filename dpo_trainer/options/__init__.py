"""Options of the run as a whole, on top of those of transformers: in come their values, out go refusals and defaults."""
