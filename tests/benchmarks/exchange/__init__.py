"""The exchange of the two forms in deep networks: what is run, how it is recorded, and what is read from it."""
