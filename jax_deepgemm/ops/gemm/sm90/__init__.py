"""GEMMs on compute capability 9.0: configurations, their cost, source text and launch plans."""
