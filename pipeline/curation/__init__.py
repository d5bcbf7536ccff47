"""Selection of samples: rules, lists of keys, duplicates, scores and splits."""
