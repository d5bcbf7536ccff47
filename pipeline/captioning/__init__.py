"""Captioners: transformers models, servers with OpenAI's interface, and trained runs."""
