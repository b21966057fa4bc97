"""The data layer: sources -> roles -> shards and manifest -> schedule -> stream -> batches.

| module | what it does |
|---|---|
| `sources` | reads images where they lie (scikit-learn, IDX, torchvision, a folder, tar files of others) |
| `tars` | existing tar files walked strictly, their members grouped into samples |
| `ids` | the normal form of ids, and tables of them that are searched by hash |
| `forget_list` | reads a list of ids (txt, csv, jsonl) as a stream |
| `roles` | gives every image at most one role, by seed, class or list |
| `copies` | exact copies by digest, near-copies by a perceptual hash |
| `prepare`, `jobs` | writes WebDataset tars and the manifest, over processes, going on after a kill |
| `index` | a manifest for tar files that exist |
| `selection` | whether existing shards are those that the settings ask for |
| `shards` | reads one image by offset; verifies |
| `manifest`, `records`, `columns` | sample id -> shard, offset, length, sha256, role, label; text or mapped columns |
| `purge` | shards without the forgotten images |
| `schedule` | who sees what, when: pure functions of seed, epoch, step and rank |
| `reading` | encoded images by offset: neighbours in one read, digests checked, failed reads repeated |
| `stores`, `patience` | shards in an object store, read by ranges; which failures are worth another try |
| `store_cache` | local copies of such shards; what a run checks before it reads them |
| `decode` | untrusted bytes -> uint8 tensors |
| `workers` | reading and decoding ahead in processes |
| `undecodable` | images that are none: counted, limited, never passed over in silence |
| `stream` | the order of an epoch; cache of decoded images; batches |
| `tar_stream` | a whole shard through webdataset, every count and digest checked |
| `views` | random views as tensor batches |

Nothing is imported here, so that a light command stays light.
"""
