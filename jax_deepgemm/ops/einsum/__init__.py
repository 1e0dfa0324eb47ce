"""Products of dense GEMMs that are written as einsum's strings: batches of heads, read as they are stored."""
