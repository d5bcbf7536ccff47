"""Telemetry of runs: events, and resource usage of processes and hosts."""
