"""Train one configuration with several callbacks, targets and seeds, side by side, and compare the results."""
