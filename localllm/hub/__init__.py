"""Names to files: the catalog, the sources (`hf:`, `pypi:`, local paths) and the store."""
