"""Programs that train through Lightning by their own means, with every callback."""
