"""Attention to keys in pages on compute capability 9.0: configurations, cost, source texts and launches."""
