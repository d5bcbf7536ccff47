"""State of everything in a folder, from plans, commits and events on the shared file system, and from SLURM's queue."""
