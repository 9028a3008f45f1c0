"""The paper's case study again: its table and its two figures from runs of the packaged recipes."""
