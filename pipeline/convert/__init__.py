"""From a folder or a Dataset in Python into a storage format."""
