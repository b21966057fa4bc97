"""How training runs: backends, loop, phases, checkpoints, ledger, telemetry."""
