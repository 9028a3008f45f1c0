"""Cost of sparse training: arms that run in turn, and statistics of their times."""
