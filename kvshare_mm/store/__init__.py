"""Where donors' KV lives: host RAM over local disk, one checksummed file a node."""
