"""The report: one HTML file, made from a run directory, for people who decide and do not read code."""
