"""Options: how they are declared, read from command lines and YAML files, and what a program does at its start."""
