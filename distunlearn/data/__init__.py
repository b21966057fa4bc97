"""The data layer: sources -> roles -> shards and manifest -> schedule -> stream -> batches.

| module | what it does |
|---|---|
| `sources` | reads images where they lie (scikit-learn, IDX, torchvision, a folder) |
| `forget_list` | reads a list of ids (txt, csv, jsonl) |
| `roles` | gives every image at most one role, by seed, class or list |
| `shards` | writes WebDataset tars and the manifest; reads one image by offset; verifies |
| `manifest` | sample id -> shard, offset, length, sha256, role, label |
| `schedule` | who sees what, when: pure functions of seed, epoch, step and rank |
| `reading` | encoded images by offset: neighbours in one read, digests checked, failed reads repeated |
| `decode` | untrusted bytes -> uint8 tensors |
| `workers` | reading and decoding ahead in processes |
| `undecodable` | images that are none: counted, limited, never passed over in silence |
| `stream` | the order of an epoch; cache of decoded images; batches |
| `tar_stream` | a whole shard through webdataset, every count and digest checked |
| `views` | random views as tensor batches |

Nothing is imported here, so that a light command stays light.
"""
