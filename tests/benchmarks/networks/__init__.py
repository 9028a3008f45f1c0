"""Small networks of six kinds on generated data, to compare mask and penalty."""
