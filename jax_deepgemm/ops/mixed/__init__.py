"""Mixed-input products: FP8 tokens times weights of four bits, dense or in groups."""
