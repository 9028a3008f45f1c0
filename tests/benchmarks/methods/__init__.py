"""The page of all methods."""
