"""Shards in an object store, and local copies of them."""
