"""Ranks that are kept warm and take one run folder after the other, and the client that hands them over."""
