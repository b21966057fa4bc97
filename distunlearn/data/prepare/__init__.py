"""From sources to shards and a manifest: roles, forget lists, duplicates, writing, indexing."""
