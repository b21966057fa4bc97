"""An encoder of one's own, trained elsewhere, forgets sixty of the images that it was trained on.

    python examples/own_encoder.py [OUT]

The sizes are those of a demonstration: under a minute on two cores, and too few steps for a verdict.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset

import distunlearn as du

MEAN, STD = 0.3, 0.35  # by which this encoder's images are normalised


class Encoder(nn.Sequential):
    """Three layers: images [n, 1, 8, 8] to embeddings [n, 64]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 64),
        )  # fmt: skip


def train(encoder: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Somebody's own training, which distunlearn never sees."""
    model = nn.Sequential(encoder, nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(30):
        for rows in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model((images[rows] - MEAN) / STD), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(out: str) -> None:
    """Train, forget, audit."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(digits.target)
    encoder = Encoder()
    train(encoder, images[:360], labels[:360])

    data = TensorDataset(images, labels)
    run = du.unlearn(
        encoder,
        retain=Subset(data, range(300)),
        forget=Subset(data, range(300, 360)),
        third_party=Subset(data, range(400, 700)),
        holdout=Subset(data, range(800, 1200)),
        mean=[MEAN],
        std=[STD],
        out=out,
        steps=30,
        pretrain={"epochs": 20},
    )
    print(run.audit().verdict, run.figures["coverage"])
    print(run.encoder((images[:2] - MEAN) / STD).shape, run.report)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_encoder")
