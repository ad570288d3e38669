"""Beam search and closed lists, by log-probabilities of next tokens."""
