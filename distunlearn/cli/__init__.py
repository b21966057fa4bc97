"""The command line: one file for the verbs, one each for what hangs on them."""
