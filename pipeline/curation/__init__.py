"""Selection of samples by rules, key lists, duplicates, scores and splits."""
