"""Grouped GEMMs: many GEMMs of different row counts in one call, as mixtures of experts need them."""
