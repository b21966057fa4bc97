"""The verbs on shards in an object store: index, prepare, plan, whole runs, and purge, which refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import zygote
from object_server import samples, serving

from distunlearn.cli.main import main
from distunlearn.config.load import load_config, save_config
from distunlearn.config.schema import DataConfig
from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.loading.verify import read_sample
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.storage.object_store_cache import verify_objects
from distunlearn.engine import run_directory
from distunlearn.engine.run_directory import find_manifest, refuse_other_settings, shards_remote
from distunlearn.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from hostile_tars import img2dataset  # noqa: E402
from pictures import indexed  # noqa: E402

# -- an index ------------------------------------------------------------------------------------------------------

ALL = DataConfig(
    source="webdataset", members=None, forget=6, holdout=6, calibration=4, third_party=4, third_party_audit=4
)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_an_index_of_a_store_is_that_of_the_local_shards(tmp_path, scheme):
    img2dataset(tmp_path / "there")
    here, expected = tmp_path / "here", tmp_path / "local"
    here.mkdir()
    shutil.copytree(tmp_path / "there", expected)
    with serving(tmp_path / "there") as server:
        url = server.url if scheme == "http" else (tmp_path / "there").as_uri()
        for workers in (1, 2):
            manifest = indexed(dataclasses.replace(ALL, store=url, prepare_workers=workers), 0, here)
        assert manifest.fingerprint == indexed(ALL, 0, expected).fingerprint
        assert sorted(path.name for path in here.iterdir()) == ["index.arrow", "summary.json"]
        assert (here / "summary.json").read_bytes() == (expected / "summary.json").read_bytes()
        verify_objects(manifest, deep=True)
        wanted = samples(manifest, "forget")
        assert Reader(manifest).read(wanted) == [read_sample(Manifest.load(expected), s.id) for s in wanted]
        (tmp_path / "there" / "00001.tar").write_bytes(b"no tar" * 1000)
        with pytest.raises(DataError, match="has an index of other shards"):
            indexed(dataclasses.replace(ALL, store=url), 0, here)
        for path in here.iterdir():
            path.unlink()
        with pytest.raises(DataError, match="^00001.tar"):
            indexed(dataclasses.replace(ALL, store=url), 0, here)
        for path in (tmp_path / "there").glob("*.tar"):
            path.unlink()
        with pytest.raises(DataError, match="lists no .tar files"):
            indexed(dataclasses.replace(ALL, store=url), 0, here)
    assert not (here / ".index.partial").exists()


def test_an_index_that_was_interrupted_goes_on(tmp_path):
    img2dataset(tmp_path / "there")
    here = tmp_path / "here"
    here.mkdir()

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with serving(tmp_path / "there") as server:
        cfg = dataclasses.replace(ALL, store=server.url, prepare_workers=1)
        first, second = server.folder / "00000.tar", server.folder / "00001.tar"
        with pytest.raises(KeyboardInterrupt):
            indexed(cfg, 0, here, interrupt)
        assert server.sent[first.name] == first.stat().st_size and not server.sent[second.name]
        assert not list(here.rglob("*.tar"))
        with pytest.raises(KeyboardInterrupt):  # what was read is known, unless the object is another now
            indexed(cfg, 0, here, interrupt)
        assert server.sent[first.name] == first.stat().st_size
        first.write_bytes(first.read_bytes() + bytes(512))
        indexed(cfg, 0, here)
        assert server.sent[first.name] == 2 * first.stat().st_size - 512
        assert server.sent[second.name] == second.stat().st_size


# -- the verbs -----------------------------------------------------------------------------------------------------


def prepared(tmp_path: Path) -> tuple[Path, Path]:
    """(local folder with the manifest alone, folder of its shards) of a tiny run."""
    folder, objects = tmp_path / "shards", tmp_path / "bucket"
    assert main(["prepare", "digits", "--out", str(tmp_path / "x"), *tiny.settings(f"data.shards={folder}")]) == 0
    objects.mkdir()
    for path in folder.glob("*.tar"):
        path.rename(objects / path.name)
    return folder, objects


def test_verbs_look_for_the_shards_where_they_are(tmp_path, capsys):
    folder, objects = prepared(tmp_path)
    there = tiny.settings(f"data.shards={folder}", f"data.store={objects.as_uri()}")
    out = tmp_path / "run"
    assert main(["plan", "digits", "--out", str(out), *there]) == 0
    assert main(["prepare", "digits", "--out", str(out), *there]) == 0
    capsys.readouterr()
    assert main(["plan", "digits", "--out", str(out), *tiny.settings(f"data.shards={folder}")]) == 3  # control
    assert "missing from" in capsys.readouterr().err
    save_config(load_config("digits", None, there[1::2]), out / "run.yaml")
    refuse_other_settings(load_config("digits", None, [*tiny.TINY]), out)  # shards may move, a seed may not
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        refuse_other_settings(load_config("digits", None, [*tiny.TINY, "seed=1"]), out)
    assert main(["purge", str(out), "--apply"]) == 2
    assert f"lie in {objects.as_uri()}, and only local shards can be purged" in capsys.readouterr().err
    reusing = load_config("digits", None, [*tiny.TINY, f"runtime.reuse={out}"])  # its shards, so its store too
    assert shards_remote(reusing).url == objects.as_uri() and find_manifest(reusing, tmp_path).remote is not None
    victim = sorted(objects.iterdir())[2]
    content = victim.read_bytes()
    for spoilt, told in ((content[:-512], "bytes; expected"), (content[:-1] + b"x", "does not have the sha256")):
        victim.write_bytes(spoilt)
        run_directory._VERIFIED.clear()
        assert main(["plan", "digits", "--out", str(out), *there]) == 3
        assert victim.name in (said := capsys.readouterr().err) and told in said
    for path in folder.iterdir():
        path.unlink()
    assert main(["prepare", "digits", "--out", str(out), *there]) == 3
    assert "holds no index of the shards in file:///" in capsys.readouterr().err and not any(folder.iterdir())


@pytest.mark.slow
def test_a_run_through_a_store_is_the_run_on_local_shards(tmp_path):
    """Training, audit and a run that is done again, to the bit; the streams go through two workers."""
    folder, objects = prepared(tmp_path)
    streamed = ("data.cache_mib=0", "data.workers=2", f"data.shards={folder}")
    with serving(objects) as server:
        out = tmp_path / "remote"
        done = tiny.run(out, *streamed, f"data.store={server.url}")
        assert done.returncode in (0, 6, 7) and "Traceback" not in done.stderr, done.stderr
        assert sum(server.sent.values()) > 2 * sum(path.stat().st_size for path in objects.iterdir())
        victim = sorted(objects.iterdir())[0]
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + b"x")
        again = tiny.run(out, *streamed, f"data.store={server.url}")
        assert again.returncode == 3 and "does not have the sha256 of the manifest" in again.stderr
        victim.write_bytes(content)
    for path in objects.iterdir():
        path.rename(folder / path.name)
    local = tiny.run(tmp_path / "local", *streamed)
    assert local.returncode == done.returncode, local.stderr
    for name in ("original", ".", "retrained"):
        there, here = (json.loads((tmp_path / run / name / "done.json").read_text()) for run in ("remote", "local"))
        assert there["state"] == here["state"], name
    there, here = (json.loads((tmp_path / run / "audit/summary.json").read_text()) for run in ("remote", "local"))
    assert there["gates"] == here["gates"]


@pytest.mark.slow
def test_ranks_share_a_cache(tmp_path):
    """Two ranks with a worker each fetch every shard once, and train what they train without a cache."""
    folder, objects = prepared(tmp_path)
    digests = []
    for cache in ([], [f"data.store_cache={tmp_path / 'copies'}"]):
        with serving(objects) as server:
            out = tmp_path / f"run{len(cache)}"
            settings = ("backend=ddp", "data.cache_mib=0", "data.workers=1", f"data.shards={folder}", *cache)
            command = ["pretrain", "digits", "--out", str(out), *tiny.settings(*settings, f"data.store={server.url}")]
            ranks = zygote.shared().start(2, command)
            assert ranks.wait() == [0, 0], ranks.said()
        digests.append(json.loads((out / "original" / "done.json").read_text())["state"])
        sizes = {path.name: path.stat().st_size for path in objects.iterdir()}
        assert server.sent == sizes if cache else sum(server.sent.values()) > 2 * sum(sizes.values())
    assert digests[0] == digests[1]
