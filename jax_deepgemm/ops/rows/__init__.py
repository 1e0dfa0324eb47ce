"""Rows by their index, moved at the rate of memory."""
