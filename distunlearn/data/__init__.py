"""The data layer: sources -> roles -> shards and manifest -> schedule -> stream -> batches.

| room | what it does |
|---|---|
| `sources` | reads images where they lie, decodes untrusted bytes |
| `prepare` | gives every image one role, finds copies, writes or indexes WebDataset shards |
| `manifest` | sample id -> shard, offset, length, sha256, role, label |
| `storage` | shards in an object store, and local copies |
| `loading` | encoded images by offset, digests checked, decoded, cropped, in the order of the schedule |
| `schedule` | who sees what, when: pure functions of seed, epoch, step and rank |
| `views` | draws by counter, crops of a photo, colour operations on batches |
| `purge` | shards without the forgotten images |

Nothing is imported here, so that a light command stays light.
"""
