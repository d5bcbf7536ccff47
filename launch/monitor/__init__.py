"""What is going on below a folder: read from plans, commits and events on the shared file system, and SLURM's queue."""
