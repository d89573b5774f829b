"""Where donors' KV lives: host RAM over local disk, one checksummed file per node."""
