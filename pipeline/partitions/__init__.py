"""The engine: plans, attempts, commits, ledgers, and operations on finished datasets."""
