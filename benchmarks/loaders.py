"""The contenders of benchmarks/dataloading.py: ways to get two random crops each out of the same photos."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distunlearn.config.schema import ViewsConfig
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.loading.stream import Batches, RoleFeeder
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.views.crops import Cutter

BATCH = 64
START = 16 * BATCH  # images of a turn that do not count: processes start, and memory is touched for the first time
LIMIT = 10**8
ROLES = ("retain", "forget")


VIEWS = ViewsConfig(recipe="mocov2")


def transform(size: int) -> Any:
    """Both crops as users of torchvision write them, uint8 [2, 3, size, size]; of a PIL image."""
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.2, 1)), v2.PILToTensor()])
    return v2.Lambda(lambda image: torch.stack([crop(image.convert("RGB")) for _ in range(2)]))


def work(data: Sequence[bytes], count: int, size: int) -> None:
    """The work that a worker has with `count` images: decoding and both crops. No reading, order or transport."""
    torch.set_num_threads(1)
    out = torch.empty((BATCH, 2, 3, size, size), dtype=torch.uint8)
    for start in range(0, count, BATCH):
        ids = [str(n) for n in range(start, start + BATCH)]
        crops = Cutter(size, VIEWS).crops(ids, np.zeros(BATCH, dtype=np.int64), (0, 1))
        for row in range(BATCH):
            photo = decode_image(data[(start + row) % len(data)], "x", LIMIT, 3, 4 * size)
            crops.crop(photo, row, out[row])


def pure(data: Sequence[bytes], size: int, workers: int, count: int, threads: bool = False) -> None:
    kind: Any = threading.Thread if threads else multiprocessing.get_context("fork").Process
    started = [kind(target=work, args=(data, count // workers, size)) for _ in range(workers)]
    for each in started:
        each.start()
    for each in started:
        each.join()


def streamed(manifest: Manifest, size: int, workers: int, count: int) -> None:
    with closing(ImageStore(manifest, Cutter(size, VIEWS), 3, 0, LIMIT, workers=workers)) as store:
        steps = count // BATCH
        with Batches({"all": RoleFeeder(store, manifest, ROLES, 0, BATCH)}, torch.device("cpu"), steps) as batches:
            for step in range(steps):
                assert batches.at(step)["all"].crops.shape == (BATCH, 2, 3, size, size)


def loader(dataset: Any, workers: int, count: int, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches: Iterator[Any] = iter(
            torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers, drop_last=True, **options)
        )
        for _ in range(count // BATCH):
            assert len(next(batches)[0]) == BATCH
        del batches


def imagefolder(root: Path, size: int, workers: int, count: int) -> None:
    from torchvision.datasets import ImageFolder

    loader(ImageFolder(str(root), transform=transform(size)), workers, count, shuffle=True)


def webdataset(manifest: Manifest, size: int, workers: int, count: int) -> None:
    import webdataset as wds

    urls = [str(manifest.shard_path(name)) for name in manifest.shards()]
    data = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000).decode("pil")
    data = data.slice(count // workers)  # each worker's share, so that it decodes no more
    loader(data.to_tuple("jpg", "cls").map_tuple(transform(size), int), workers, count)


def cost(act: Callable[[], None]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process and its ended children)."""

    def used() -> float:
        mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime

    cpu, wall = used(), time.perf_counter()
    act()
    return time.perf_counter() - wall, used() - cpu


DROP = Path("/proc/sys/vm/drop_caches")


def forget_pages() -> None:
    """Empty the operating system's cache of files; only root may."""
    os.sync()
    DROP.write_text("1")


def race(
    manifest: Manifest, root: Path, size: int, workers: int, count: int, rounds: int, only: Sequence[str] = (),
    cold: bool = False, start: int = START,
) -> dict[str, list[tuple[float, float, float]]]:  # fmt: skip
    """{contender: (images/s, CPU ms per image, CPU s of start and end) of every round; the first round warms up.

    Each turn is made twice, with `start` images and with `count` more: the rates are of the difference.
    cold: every turn begins with an empty page cache.
    """
    held = Reader(manifest).read([manifest.by_id[i] for i in manifest.ids(ROLES)[: 4 * BATCH]])
    contenders: dict[str, Callable[[int], None]] = {
        "pure": lambda images: pure(held, size, workers, images),
        "stream": lambda images: streamed(manifest, size, workers, images),
        "imagefolder": lambda images: imagefolder(root, size, workers, images),
        "webdataset": lambda images: webdataset(manifest, size, workers, images),
        "pure threads": lambda images: pure(held, size, workers, images, threads=True),
    }
    contenders = {name: act for name, act in contenders.items() if not only or name in only}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, act in contenders.items():
            (wall, cpu), (whole_wall, whole_cpu) = (_turn(act, images, cold) for images in (start, start + count))
            if turn:
                each = (whole_cpu - cpu) / count
                found[name].append((count / (whole_wall - wall), 1000 * each, cpu - start * each))
        print(size, workers, turn, {k: v[-1] for k, v in found.items() if v}, flush=True)
    return found


def _turn(act: Callable[[int], None], images: int, cold: bool) -> tuple[float, float]:
    if cold:
        forget_pages()
    return cost(lambda: act(images))
