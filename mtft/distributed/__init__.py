"""Several processes: how they were launched, how weights are sharded, how they stop together."""
