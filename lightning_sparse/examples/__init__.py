"""Small models and data modules for the packaged recipes. Import the module you need."""
