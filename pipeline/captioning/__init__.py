"""Captioners: models of transformers, servers with OpenAI's interface, and trained runs."""
