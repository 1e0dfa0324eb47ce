"""Small matrices whose rows and columns have sums of 1."""
