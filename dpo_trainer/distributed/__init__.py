"""Several processes: what launchers, FSDP2 and DeepSpeed do to models and weights, and what losses exchange between ranks."""
