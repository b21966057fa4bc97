"""Two-sample distances between gradient sets, by name in `energy.DISTANCES`."""
