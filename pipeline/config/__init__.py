"""Declaration of options, parsing of command lines and YAML files, and startup of programs."""
