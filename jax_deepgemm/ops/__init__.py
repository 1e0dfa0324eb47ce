"""Families of ops: a folder each, with api, checks, reference, op, and its kernels by architecture."""
