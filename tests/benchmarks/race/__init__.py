"""The race: every way to a target share of zeros, on several problems and budgets."""
