"""What is built once for a run: options and a model come in; its parts, its datasets, its micro-batches and its model card go out."""
