"""Options of commands and recipes: a YAML file first, the command line over it."""
