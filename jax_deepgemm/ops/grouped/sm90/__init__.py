"""Grouped GEMMs on compute capability 9.0: rules, cost, source text and launch plans."""
