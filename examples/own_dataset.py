"""Images of one's own: a torch Dataset that knows ids and labels, a timm encoder, a request of ten ids.

    python examples/own_dataset.py [OUT]
    distunlearn prepare examples/own_dataset.py:Digits --set data.forget=30 --out OUT    the same data, roles drawn

The sizes are those of a demonstration: under a minute on two cores, and too few steps for a verdict.
"""

import sys

from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

import distunlearn as du


class Digits(Dataset):
    """scikit-learn's digits as PIL images, one id each; `rows` of them."""

    def __init__(self, rows: range = range(1797)) -> None:
        self._digits = load_digits()
        self._rows = rows
        self.ids = [f"page-{row // 100:02d}/digit-{row:04d}" for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        row = self._rows[index]
        pixels = (self._digits.images[row] * 15.9).astype("uint8")
        return {"image": Image.fromarray(pixels), "label": int(self._digits.target[row])}


def main(out: str) -> None:
    """Forget thirty images."""
    run = du.unlearn(
        "resnet18",
        retain=Digits(range(300)),
        forget=Digits(range(300, 330)),
        third_party=Digits(range(400, 700)),
        holdout=Digits(range(800, 1200)),
        out=out,
        image_size=16,
        encoder={"stem": "deep", "args": {"stem_width": 8, "channels": [16, 32, 64, 128], "layers": [1, 1, 1, 1]}},
        pretrain={"epochs": 10},
        steps=20,
    )
    print(run.audit().verdict, run.figures["coverage"], run.report)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_dataset")
