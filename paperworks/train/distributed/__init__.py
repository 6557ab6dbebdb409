"""Training in several processes: replicas, shards, weights that each process keeps for itself."""
