"""A layer of experts for few tokens, as one chain of launches."""
