"""Reproduction of the paper's case study: its table and its two figures, from runs of the packaged recipes."""
