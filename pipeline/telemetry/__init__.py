"""What runs report: events, and what processes and hosts use."""
