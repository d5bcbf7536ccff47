"""Storage formats: how the samples of a partition lie on disk."""
