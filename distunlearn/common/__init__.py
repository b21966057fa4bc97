"""What every layer may use and that knows nothing of the project: files, text, devices, the launcher."""
