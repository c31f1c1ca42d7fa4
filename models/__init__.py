"""One file per architecture, named by its model type, and `catalog.toml`."""
