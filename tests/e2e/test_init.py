"""`distunlearn init`: settings for somebody's images, encoder and list, and warnings of what is doubtful about them.

The whole way is walked on 600 photos with a checkpoint in MoCo's form, as README says: init, plan, run.
"""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image

from distunlearn.config.load import load_config
from distunlearn.run.find import Gallery

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.photos import jpeg  # noqa: E402

NARROW = {"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}
SIZE = (60, 52)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def written(root: Path, count: int, start: int, classes: int = 4) -> Path:
    for n in range(count):
        path = root / f"class{n % classes}" / f"{n:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(start + n, SIZE))
    return root


def moco_file(path: Path, epochs: int = 1) -> Path:
    """As facebookresearch/moco saves: query and key encoder with their heads, and the queue."""
    torch.manual_seed(0)
    encoder = timm.create_model("resnet18", num_classes=0, **NARROW).state_dict()
    head = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 16)).state_dict()
    parts = {**encoder, **{f"fc.{name}": value for name, value in head.items()}}
    state = {f"module.encoder_{copy}.{name}": value.clone() for copy in "qk" for name, value in parts.items()}
    torch.save(
        {"epoch": epochs, "arch": "resnet18", "state_dict": state | {"module.queue": torch.randn(16, 256)}}, path
    )
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Mapping[str, Path]:
    """480 photos that an encoder was trained on, 120 that it never saw, and a list of 30."""
    folder = tmp_path_factory.mktemp("given")
    written(folder / "members", 480, 0)
    written(folder / "never", 120, 10_000)
    (folder / "encoder").mkdir()
    moco_file(folder / "encoder/checkpoint.pth.tar")
    (folder / "encoder/config.json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    rows = [f"{n};class{n % 4}/{n:04d}.jpg" for n in range(0, 120, 4)]
    (folder / "request.csv").write_text("\n".join(["ticket;file", *rows]))
    return {"images": folder / "members", "non-members": folder / "never", "request": folder / "request.csv",
            "checkpoint": folder / "encoder/checkpoint.pth.tar"}  # fmt: skip


def init(given: Mapping[str, Path], *more: str):
    return tiny.command("init", *(part for key, path in given.items() for part in (f"--{key}", str(path))), *more)


def test_three_commands_from_photos_to_a_verdict(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = init(given)
    assert written.returncode == 0, written.stderr[-3000:]
    (tmp_path / "run.yaml").write_text(written.stdout)
    planned = tiny.command("plan", "--config", "run.yaml")
    assert planned.returncode == 0, planned.stderr[-3000:]
    plan = json.loads(planned.stdout)
    assert plan["roles"]["forget"] == 30 and plan["roles"]["retain"] == 450 and plan["objective"] == "moco"
    assert plan["encoder"]["mean"] == MEAN and any(
        "own heads were taken" in note for note in plan["encoder"]["checkpoint"]
    )
    done = tiny.command("run", "--config", "run.yaml", "--out", "runs/request1")
    assert done.returncode in (0, 6, 7) and "Verdict: " in done.stdout, done.stderr[-3000:]
    verdict = json.loads((tmp_path / "runs/request1/audit/summary.json").read_text())["gates"]["verdict"]
    assert {"pass": 0, "fail": 6, "inconclusive": 7}[verdict] == done.returncode
    check_report((tmp_path / "runs/request1/report.html").read_text())


def check_report(page: str) -> None:
    """What it says of an encoder from elsewhere: all of it is so, and nothing stands beside its contrary."""
    shown = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))
    for sentence in (
        "30 images, out of 480 the encoder was trained on",
        "The original encoder was handed in as a file of weights; it was not trained here.",
        "The backbone was read from below state_dict.module.encoder_q in the checkpoint.",
        "The checkpoint's own heads were taken: the projector from below state_dict.module.encoder_q.fc.",
        "The momentum encoder was taken from below state_dict.module.encoder_k.",
        "The backbone fits; 1 tensor outside it was left out: state_dict.module.queue.",
        "Its images are normalised by mean 0.485, 0.456, 0.406 and standard deviation 0.229, 0.224, 0.225.",
        "Third-party images from the images that were named as never trained on",
        "Which images the original encoder was never trained on was stated with the request.",
        "The retrained encoder was trained by the settings of this run",
        "The original was not trained in this run.",
    ):
        assert sentence in shown, sentence
    for wrong in ("were not taken", "same source as the members", "Training the original took", "by which the dose"):
        assert wrong not in shown, wrong
    assert "/never" not in page and "/members" not in page, "a folder may have somebody's name"


def warned(given: Mapping[str, Path], **changes: Path | None) -> str:
    chosen = {**given, **{key.replace("_", "-"): path for key, path in changes.items()}}
    done = init({key: path for key, path in chosen.items() if path is not None})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_what_is_doubtful_is_told(given, tmp_path):
    """Each of what people overlook, and nothing of it where it is in order."""
    calm = warned(given)
    few = written(tmp_path / "few", 20, 20_000)
    (few / "class0/scan.pdf").write_bytes(b"x")
    (tmp_path / "three.txt").write_text("class0/0000.jpg\nclass0/0004.jpg\nclass0/gone.jpg\n")
    bare = moco_file(tmp_path / "moco.pth.tar")
    twice = written(tmp_path / "twice", 60, 30_000)
    shutil.copy(given["images"] / "class1/0001.jpg", twice / "class1/again.jpg")
    kept = tmp_path / "kept"
    shutil.copytree(given["images"], kept)
    shutil.copy(kept / "class0/0004.jpg", kept / "class2/copy.jpg")
    for changes, said in (
        ({"non_members": few}, "20 non-members leave 9 to be held out: never a pass below 20"),
        ({"non_members": few}, "files in {few} are no images that can be read (left out: 1 .pdf)"),
        ({"non_members": None}, "no image is named that the encoder never saw"),
        ({"non_members": None}, "`plan` will refuse these settings as they are: "),
        ({"request": tmp_path / "three.txt"}, "1 of 3 entries of the list name no image, such as 'class0/gone.jpg'"),
        ({"request": tmp_path / "three.txt"}, "a request of 2 can fail but never pass"),
        ({"images": few, "request": tmp_path / "three.txt"}, "18 images stay, so that batches have 4 images"),
        ({"checkpoint": bare}, "nothing says by which mean and standard deviation"),
        ({"request": None}, "no --request"),
        ({"non_members": twice}, "1 of the non-members have the very bytes of images to keep, such as"),
        ({"images": kept}, "1 of the images to keep have the very bytes of images to forget, such as"),
    ):
        found = warned(given, **changes)
        assert said.format(few=few) in found, found
        assert said.format(few=few) not in calm


def test_a_classifier_cannot_be_trained_again_without_labels(tmp_path):
    for folder, start in (("flat", 0), ("never", 500)):
        (tmp_path / folder).mkdir()
        for n in range(40):
            (tmp_path / folder / f"{n}.jpg").write_bytes(jpeg(start + n, SIZE))
    (tmp_path / "list.txt").write_text("3.jpg\n")
    torch.save(timm.create_model("resnet18", num_classes=5, **NARROW).state_dict(), tmp_path / "w.pth")
    given = {"images": tmp_path / "flat", "non-members": tmp_path / "never", "request": tmp_path / "list.txt"}
    done = init(given | {"checkpoint": tmp_path / "w.pth"}, "--encoder", "resnet18")
    assert done.returncode == 0 and "trained with supervised: objective.name is a guess" in done.stderr, done.stderr
    assert 'name: "simclr"' in done.stdout and 'trained_with: "supervised"' in done.stdout


def test_settings_for_a_new_encoder_and_for_shards_are_complete(given, tmp_path):
    """Without a checkpoint the encoder is trained here, and non-members are drawn."""
    done = init({"images": given["images"], "request": given["request"]})
    assert done.returncode == 0 and "240 of the 480 images are drawn as non-members" in done.stderr
    assert "verdict: " in done.stderr and "refuse" not in done.stderr
    (tmp_path / "run.yaml").write_text(done.stdout)
    cfg = load_config(None, tmp_path / "run.yaml", [])
    assert cfg.encoder.checkpoint is None and cfg.encoder.image_size == 32 and cfg.data.root == str(given["images"])


def test_copies_of_a_photo_are_found_among_600(given, tmp_path):
    """Resized, cropped and re-encoded copies of 100 photos: at least 95 of 100 within the first 20, of each kind."""
    root = given["images"].parent
    yaml = tmp_path / "run.yaml"
    yaml.write_text(init(given).stdout)
    gallery = Gallery(load_config(None, yaml, [f"data.root={root}"]))
    rng = np.random.default_rng(0)
    places: dict[str, list[int]] = {"resized": [], "cropped": [], "re-encoded": []}
    for n in rng.choice(480, 100, replace=False).tolist():
        photo = Image.open(root / "members" / f"class{n % 4}" / f"{n:04d}.jpg")
        width, height = photo.size
        side = rng.uniform(0.6, 0.9) ** 0.5
        wide, high = int(side * width), int(side * height)
        left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1))
        made = {"resized": (photo.resize((width * 7 // 10, height * 7 // 10)), 90), "re-encoded": (photo, 35),
                "cropped": (photo.crop((left, top, left + wide, top + high)), 90)}  # fmt: skip
        for kind, (copy, quality) in made.items():
            buffer = io.BytesIO()
            copy.save(buffer, "JPEG", quality=quality)
            found = [like.id for like in gallery.most_like(buffer.getvalue(), "copy")]
            assert len(found) == 600
            places[kind].append(found.index(f"members/class{n % 4}/{n:04d}.jpg"))
    recall = {kind: sum(place < 20 for place in at) / len(at) for kind, at in places.items()}
    assert min(recall.values()) >= 0.95, recall
    copy.save(tmp_path / "copy.png")
    listed = tiny.command("find", "--config", str(yaml), "--image", str(tmp_path / "copy.png"), "--count", "3")
    assert listed.returncode == 0 and listed.stdout.splitlines()[0] == "id,cosine,bits", listed.stderr
    assert len(listed.stdout.splitlines()) == 4 and f"class{n % 4}/{n:04d}.jpg" in listed.stdout
    by_hash = init({"images": given["images"]})
    yaml.write_text(by_hash.stdout)
    listed = tiny.command(
        "find", "--config", str(yaml), "--image", str(tmp_path / "copy.png"), "--set", "data.forget=9"
    )
    assert listed.returncode == 0 and "by hash alone" in listed.stderr and f"{n:04d}.jpg" in listed.stdout
