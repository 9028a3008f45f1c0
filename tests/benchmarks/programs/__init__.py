"""Programs that train through Lightning by their own means, each with small data made on the spot; run by ``clients.py``."""
