"""Which row each copy of each token has: a stable counting sort by expert."""
