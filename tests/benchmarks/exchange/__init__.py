"""Penalty and mask compared in deep networks: runs, records and tables."""
