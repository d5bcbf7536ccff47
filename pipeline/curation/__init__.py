"""Which samples stay: rules, lists of keys, duplicates, splits."""
