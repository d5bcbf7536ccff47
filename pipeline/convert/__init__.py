"""Conversion of a folder or a Python Dataset to a storage format."""
