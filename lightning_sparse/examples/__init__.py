"""The small models and data modules that the packaged recipes use; import the file you need."""
