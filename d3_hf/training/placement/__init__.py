"""Where the weights in training live: in the model itself, or in shards over the processes."""
