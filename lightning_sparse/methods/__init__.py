"""Ways to train a network to zeros, one file each: what a method does at each moment of a step, and its formulas. Torch only."""
