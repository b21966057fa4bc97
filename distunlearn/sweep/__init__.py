"""Searches over settings: trials, choice, page."""
