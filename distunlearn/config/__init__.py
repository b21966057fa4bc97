"""Settings: their schema, how they are loaded and checked, and the recipes to start from."""
