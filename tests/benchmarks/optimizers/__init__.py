"""Thirty optimisers with eight callbacks."""
