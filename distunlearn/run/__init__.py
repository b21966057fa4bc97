"""The verbs, in order, on files of the run directory."""
