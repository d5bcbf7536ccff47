"""The engine: plans, attempts, commits, ledgers, and what is done to finished datasets."""
