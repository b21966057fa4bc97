"""The data layer: sources -> roles -> shards and manifest -> schedule -> stream -> batches.

| module | what it does |
|---|---|
| `sources` | reads images where they lie (scikit-learn, IDX, torchvision, a folder) |
| `forget_list` | reads a list of ids (txt, csv, jsonl) |
| `roles` | gives every image at most one role, by seed, class or list |
| `shards` | writes WebDataset tars and the manifest; reads one image by offset; verifies |
| `manifest` | sample id -> shard, offset, length, sha256, role, label |
| `schedule` | who sees what, when: pure functions of seed, epoch, step and rank |
| `stream` | shards through webdataset with every count and digest checked; decoded cache; batches |
| `decode` | untrusted bytes -> uint8 tensors |
| `views` | random views as tensor batches |

Nothing is imported here, so that a light command stays light.
"""
