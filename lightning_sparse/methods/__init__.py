"""Ways to train a network to zeros: what a method does at each moment of a step, and its formulas. Torch only.

Here are those that need no noise and no learned parameters: the penalty's gradient, its loss term, and proximal steps. The other
callbacks override eta, its terms or their steps in the package's Lightning layer.
"""
