"""Packages that train through Lightning, each with small generated data; run by ``clients``."""
