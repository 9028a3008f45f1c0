"""What sparse training costs: arms that are run in turn, and what is read from their times."""
