"""What people have in folders of images, and images that are there twice or cannot be used."""

from __future__ import annotations

import hashlib
import io
import json
import os

import numpy as np
import pytest
from pictures import jpeg
from PIL import Image

from distunlearn.cli.main import main
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.duplicates import drop_copies, perceptual_hash
from distunlearn.data.prepare.selection import check_selection, draw_request, request_facts
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.sources.image_folder import FolderSource
from distunlearn.data.sources.sources import open_source
from distunlearn.errors import ConfigError, DataError
from distunlearn.run.prepare import describe

SMALL = DataConfig(source="imagefolder", members=None, forget=6, holdout=12, calibration=4, third_party=4,
                   third_party_audit=4, copies="keep")  # fmt: skip


def folder(root, count=60, start=0):
    """Photos in class0, class1, class2."""
    for n in range(count):
        path = root / f"class{n % 3}" / f"{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(start + n))
    return root


def config(root, **changes):
    return DataConfig(**{**vars(SMALL), "root": str(root), **changes})


def encoded(image, kind, **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def photo(number, size=(120, 100)):
    """A picture with details, another for every number."""
    blocks = np.random.default_rng(number).integers(0, 256, (14, 16, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def bits_apart(first, second):
    return bin(perceptual_hash(first, "x", 10**6) ^ perceptual_hash(second, "x", 10**6)).count("1")


# -- what counts as an image -----------------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_no_images_and_move_no_class(tmp_path):
    """Case 01, a hidden class folder: it was class 0, so that class:1 forgot another class."""
    clean = open_source("imagefolder", str(folder(tmp_path / "clean")), 10**6)
    root = folder(tmp_path / "hid")
    for name in (".ipynb_checkpoints", "@eaDir/deep", "__MACOSX", "class1/.thumbs"):
        (root / name).mkdir(parents=True)
        (root / name / "x.jpg").write_bytes(jpeg(900))
    (root / "class0" / "._000.jpg").write_bytes(b"\0\5\26\7")
    found = open_source("imagefolder", str(root), 10**6)
    assert found.samples == clean.samples and found.classes == clean.classes == ["class0", "class1", "class2"]
    assert dict(found.skipped) == {"hidden": 5} and not clean.skipped
    roles = [open_and_draw(config(r, forget="class:1"), 0)[1].roles for r in (tmp_path / "clean", root)]
    assert roles[0] == roles[1] and {i[:6] for i, role in roles[1].items() if role == "forget"} == {"class1"}


def test_images_in_a_folder_that_begins_with_a_hash_are_forgotten(tmp_path):
    """Case 02, ids that begin with # in a .txt: they were taken for comments, and kept."""
    root = folder(tmp_path / "images")
    (root / "class0").rename(root / "#sunset")
    names = [f"{start}/{n:03d}.jpg" for start, first in (("#sunset", 0), ("class1", 1)) for n in range(first, 24, 3)]
    (tmp_path / "request.txt").write_text("\n".join(["# of May", *names]) + "\n")
    _, drawn = open_and_draw(config(root, forget=str(tmp_path / "request.txt")), 0)
    assert sorted(i for i, role in drawn.roles.items() if role == "forget") == sorted(names) and len(names) == 16
    assert drawn.facts["forget_list"]["entries"] == drawn.facts["forget_list"]["forget"] == 16
    assert "1 comment lines skipped" in drawn.facts["forget_list"]["understood"]


def test_what_is_left_out_is_counted_by_ending_in_plan_and_prepare(tmp_path, capsys):
    """Case 13, photos left out without a word; a list that names one says what was left out."""
    root = folder(tmp_path / "images")
    for number, name in enumerate(("a.txt", "b.TXT", "c.pdf", "Thumbs.db", "noending", "d.mp4")):
        (root / f"class{number % 3}" / name).write_bytes(b"x")
    os.mkfifo(root / "class0" / "pipe.png")
    os.symlink(root / "gone", root / "class0" / "link.png")
    expected = {".txt": 2, ".pdf": 1, ".db": 1, "without a usual ending": 1, ".mp4": 1, "special files": 1,
                "broken links": 1}  # fmt: skip
    assert dict(open_source("imagefolder", str(root), 10**6).skipped) == expected
    sets = [f"data.root={root}", "data.source=imagefolder", "encoder.in_chans=3", "data.members=null", "data.forget=6",
            "data.holdout=12", "data.calibration=4", "data.third_party=4", "data.third_party_audit=4",
            "pretrain.batch=16", "unlearn.retain_batch=16", "unlearn.forget_batch=4",
            "unlearn.third_party_batch=4"]  # fmt: skip
    words = ["digits", "--out", str(tmp_path / "run"), *[part for value in sets for part in ("--set", value)]]
    assert main(["plan", *words]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["skipped_files"] == expected
    assert main(["prepare", *words]) == 0
    assert "2 .txt" in capsys.readouterr().out
    assert main(["plan", *words]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["skipped_files"] == expected
    (tmp_path / "list.txt").write_text("class0/gone.mp4\n")
    assert main(["plan", *words[:2], str(tmp_path / "o"), *words[3:], "--set", f"data.forget={tmp_path}/list.txt"]) == 3
    assert "does not have" in (said := capsys.readouterr().err) and "left out: 2 .txt" in said


KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif", "HEIF": "heic"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_taken(tmp_path, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    colours = np.zeros((24, 32, 3), dtype=np.uint8)
    colours[:12, :16], colours[12:, 16:] = (200, 30, 30), (20, 120, 220)
    data = encoded(Image.fromarray(colours), kind, **({"quality": 100} if kind in ("JPEG", "HEIF", "WEBP") else {}))
    (tmp_path / f"a.{KINDS[kind].upper()}").write_bytes(data)
    source = open_source("imagefolder", str(tmp_path), 10**6)
    assert source.read(source.samples[0][0]) == (data, KINDS[kind])
    pixels = decode_image(data, "x", 10**6, 3).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels[2:10, 2:14] - colours[2:10, 2:14]).max() <= 6  # away from edges
    with pytest.raises(DataError, match="claims 32 x 24"):
        source_of_few = open_source("imagefolder", str(tmp_path), 100)
        source_of_few.read(source_of_few.samples[0][0])
    assert bits_apart(encoded(photo(1), kind), encoded(photo(1), "PNG")) <= 4


def test_heic_without_its_package_is_counted_and_told(tmp_path, monkeypatch):
    from distunlearn.data.sources import decode, image_folder

    monkeypatch.setattr(image_folder, "find_spec", lambda name: None)
    root = folder(tmp_path, 3)
    (root / "class0" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert dict(open_source("imagefolder", str(root), 10**6).skipped) == {".heic (install distunlearn[heif])": 1}
    monkeypatch.setattr(decode, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(DataError, match=r"'x' is HEIC, which needs pillow-heif; install distunlearn\[heif\]"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(100), "x", 10**6, 3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_orientation_is_applied_to_pixels_and_hashes(kind):
    upright = photo(2, (90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the viewer turns by 90 degrees clockwise
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)
    assert decode_image(turned, "x", 10**6, 3).shape == (3, 60, 90)
    assert bits_apart(turned, encoded(upright, "PNG")) <= 4


def test_a_picture_with_a_large_colour_profile_is_taken():
    """Of case 10. Other readers show it; PIL's own limit for a compressed chunk is 1 MiB."""
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    assert decode_image(encoded(image, "PNG", icc_profile=bytes(1_400_000)), "x", 100, 3)[:, 0, 0].tolist() == [9, 8, 7]


# -- images that cannot be used --------------------------------------------------------------------------------------


def test_all_damaged_images_in_one_answer(tmp_path):
    """Case 10, one damaged image at a time."""
    root = folder(tmp_path / "images")
    bad = {"empty.jpg": b"", "html.jpg": b"<html>404</html>", "half.jpg": jpeg(3)[:300], "x.heic": bytes(99)}
    for name, data in bad.items():
        (root / "class0" / name).write_bytes(data)
    with pytest.raises(DataError, match="^4 images cannot be used") as caught:
        prepare_shards(config(root), 0, tmp_path / "shards")
    assert all(f"'class0/{name}'" in str(caught.value) for name in bad) and "data.max_undecodable" in str(caught.value)
    assert not (tmp_path / "shards").exists()
    cfg = config(root, max_undecodable=1.0, forget=_listed(tmp_path, ["class0/000.jpg", "class1/001.jpg"]))
    manifest = prepare_shards(cfg, 0, tmp_path / "shards")
    assert len(manifest) == 60 and manifest.info["undecodable_ids"] == sorted(f"class0/{name}" for name in bad)
    assert "4 images that cannot be decoded" in describe(manifest)
    check_selection(cfg, 0, saved(manifest, tmp_path))
    gone = config(root, max_undecodable=1.0, forget=_listed(tmp_path, ["class0/html.jpg", "class1/001.jpg"]))
    with pytest.raises(DataError, match="1 of them to be forgotten.*'class0/html.jpg'"):
        prepare_shards(gone, 0, tmp_path / "other")


def saved(manifest, run):
    manifest.save_request(run)
    return Manifest.of_run(run)


def _listed(tmp_path, ids, header=""):
    path = tmp_path / f"list{len(list(tmp_path.glob('*.csv')))}.csv"
    path.write_text("\n".join([header or "id", *ids]) + "\n")
    return str(path)


# -- copies and non-members ------------------------------------------------------------------------------------------


def test_an_image_with_the_bytes_of_a_member_is_no_non_member(tmp_path):
    """Case 14, copies across roles."""
    root = folder(tmp_path / "images")
    for n in range(60):
        (root / f"class{n % 3}" / f"copy{n:03d}.jpg").write_bytes(jpeg(n))
    cfg = config(root, members=60, holdout=40)
    manifest = prepare_shards(cfg, 0, tmp_path / "shards")
    trained = {s.sha256 for s in manifest.samples if s.role in ("retain", "forget", "third_party")}
    left = [s for s in manifest.samples if s.role in ("holdout", "calibration")]
    assert left and not trained & {s.sha256 for s in left}
    drawn = open_and_draw(cfg, 0)[1].roles
    lost = {role: list(drawn.values()).count(role) - count for role, count in manifest.count_roles().items()}
    assert {r: n for r, n in lost.items() if n > 0} == manifest.facts["dropped_copies"] and lost["retain"] == 0
    assert "dropped, for they have the bytes" in describe(manifest)
    facts = request_facts(manifest.facts)
    assert facts["dropped_copies"] == manifest.facts["dropped_copies"] and facts["non_members"] == "drawn"
    check_selection(cfg, 0, saved(manifest, tmp_path))


def test_copies_are_dropped_as_a_comparison_of_all_pairs_says():
    rng = np.random.default_rng(0)
    sha256 = rng.integers(0, 256, (40, 32), dtype=np.uint8)[rng.integers(0, 40, 300)]
    sha256[::7, 31] += 1  # the first bytes alone decide nothing
    roles = rng.integers(0, 6, 300).astype(np.uint8)
    order = [(0, 1), (2,), (4,), (3,)]
    found = drop_copies(sha256, roles, order, 9)
    expected = roles.copy()
    for place in range(1, len(order)):
        earlier = {sha256[k].tobytes() for k in range(300) if expected[k] in sum(order[:place], ())}
        for k in range(300):
            if expected[k] in order[place] and sha256[k].tobytes() in earlier:
                expected[k] = 9
    assert (found == expected).all() and (found == 9).any() and (found[roles == 5] == 5).all()


def test_near_copies_of_members_are_counted(tmp_path):
    root, others = tmp_path / "images" / "x", tmp_path / "others" / "x"
    root.mkdir(parents=True), others.mkdir(parents=True)
    for n in range(40):
        (root / f"{n}.jpg").write_bytes(encoded(photo(n), "JPEG"))
    for n in range(30):  # the first five are in the members, re-encoded and smaller
        (others / f"{n}.png").write_bytes(encoded(photo(n if n < 5 else 500 + n).resize((96, 80)), "PNG"))
    cfg = config(root.parent, holdout_root=str(others.parent), holdout=18)
    manifest = prepare_shards(cfg, 0, tmp_path / "shards")
    assert sum(manifest.facts["near_copies_of_members"].values()) == 5 and manifest.facts["dropped_copies"] == {}


def test_non_members_from_a_folder_of_their_own(tmp_path):
    root, others = folder(tmp_path / "images"), folder(tmp_path / "others", 30, start=500)
    cfg = config(root, holdout_root=str(others))
    opened, drawn = open_and_draw(cfg, 0, foreign=True)
    roles = drawn.roles
    assert {i for i, r in roles.items() if r in ("retain", "forget")} == {i for i, _ in opened.members.samples}
    assert all(i.startswith("holdout/") for i, r in roles.items() if r not in ("retain", "forget"))
    assert list(roles.values()).count("holdout") == 12 and drawn.facts["non_members"] == "named"
    with pytest.raises(ConfigError, match="names no images that it never saw"):
        open_and_draw(config(root), 0, foreign=True)
    with pytest.raises(DataError, match="holdout source imagefolder has 30 images but 48 are needed"):
        open_and_draw(config(root, holdout_root=str(others), holdout=36), 0)
    with pytest.raises(ConfigError, match="the very images of the members"):
        open_and_draw(config(root, holdout_root=str(root)), 0)


def test_non_members_that_a_list_names(tmp_path):
    root = folder(tmp_path / "images")
    never = [f"class{n % 3}/{n:03d}.jpg" for n in range(30, 60)]
    rows = ["class0/000.jpg,forget", *[f"{i},non_member" for i in never]]
    cfg = config(root, forget=_listed(tmp_path, rows, "file,role"))
    roles = open_and_draw(cfg, 0, foreign=True)[1].roles
    members = {i for i, r in roles.items() if r in ("retain", "forget")}
    assert len(members) == 30 and not members & set(never) and roles["class0/000.jpg"] == "forget"
    assert list(roles.values()).count("holdout") == 12 and list(roles.values()).count("calibration") == 4
    rows = ["class0/000.jpg,forget", *[f"{i},holdout" for i in never[:9]], *[f"{i},non_member" for i in never[9:]]]
    roles = open_and_draw(config(root, forget=_listed(tmp_path, rows, "file,role")), 0, foreign=True)[1].roles
    assert {i for i, r in roles.items() if r == "holdout"} == set(never[:9])
    few = config(root, forget=_listed(tmp_path, rows[:12], "file,role"))
    with pytest.raises(DataError, match="names 2 images as non_member, but 12 are needed"):
        open_and_draw(few, 0, foreign=True)


def test_a_class_by_its_name(tmp_path):
    root = folder(tmp_path / "images")
    (root / "class2").rename(root / "1")  # a name that is also the number of another class
    _, drawn = open_and_draw(config(root, forget="class:1", max_forget_share=0.9), 0)
    assert {i.split("/")[0] for i, r in drawn.roles.items() if r == "forget"} == {"1"}
    assert drawn.facts["whole_classes"] == ["1"]
    _, drawn = open_and_draw(config(root, forget="class:class0", max_forget_share=0.9), 0)
    assert {i.split("/")[0] for i, r in drawn.roles.items() if r == "forget"} == {"class0"}
    with pytest.raises(DataError, match="the classes '1', 'class0', 'class1'"):
        open_and_draw(config(root, forget="class:dogs"), 0)


def test_images_named_by_their_digest(tmp_path, monkeypatch):
    """In prepared shards the index knows the digests: no image is read again."""
    root = folder(tmp_path / "images")
    cfg = config(root, forget=_listed(tmp_path, [hashlib.sha256(jpeg(7)).hexdigest()], "sha256"), forget_by="sha256")
    assert [i for i, r in open_and_draw(cfg, 0)[1].roles.items() if r == "forget"] == ["class1/007.jpg"]
    with pytest.raises(ConfigError, match="data.forget_by=url needs shards"):
        open_and_draw(config(root, forget=cfg.forget, forget_by="url"), 0)
    made = prepare_shards(cfg, 0, tmp_path / "shards")
    monkeypatch.setattr(FolderSource, "bytes_of", lambda *_: pytest.fail("an image was read again"))
    monkeypatch.setattr(FolderSource, "read", lambda *_: pytest.fail("an image was read again"))
    assert draw_request(cfg, 0, made).ids("forget") == ["class1/007.jpg"]


def test_batches_larger_than_their_roles_turned_out_to_be_are_refused(tmp_path, capsys):
    """Case 06: an image would be its own negative; it does not matter how the number of members was given."""
    root, others = folder(tmp_path / "images"), folder(tmp_path / "others", 30, start=500)
    sets = [f"data.root={root}", f"data.holdout_root={others}", "data.source=imagefolder", "encoder.in_chans=3",
            "data.holdout=12", "data.calibration=4", "data.third_party=4", "data.third_party_audit=4",
            "pretrain.batch=60", "unlearn.retain_batch=48", "unlearn.forget_batch=4", "unlearn.third_party_batch=4",
            "data.members=null", "data.forget=0.2"]  # fmt: skip
    words = ["digits", "--out", str(tmp_path / "run"), *[part for value in sets for part in ("--set", value)]]
    assert main(["plan", *words]) == 0  # 60 members, 48 of them retained: the largest that go
    for change, said in (("pretrain.batch=61", "larger than data.members=60"),
                         ("unlearn.retain_batch=49", "larger than the 48 images to retain"),
                         (f"data.forget={_listed(tmp_path, [f'class0/{n:03d}.jpg' for n in range(0, 60, 3)])}",
                          "larger than the 40 images to retain")):  # fmt: skip
        assert main(["plan", *words, "--set", change]) == 2
        assert said in capsys.readouterr().err
    assert main(["prepare", *words]) == 0
    assert main(["pretrain", *words, "--set", "pretrain.batch=80"]) == 2
    assert "larger than data.members=60" in capsys.readouterr().err
