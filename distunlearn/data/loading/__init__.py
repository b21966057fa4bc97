"""From shards and a manifest to batches: reading, checking, decoding, caching, ordering."""
