"""Fashion-MNIST for benchmarks/claims.py: the captioned set, and a small classifier that looks at drawings.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist.py set --source /usr/share/datasets/fashion-mnist --out data/fashion-mnist
    python benchmarks/fashion_mnist.py judge --data data/fashion-mnist --out runs/fashion-mnist/judge

The classifier sees grey pictures of 32x32; its share of held-out pictures is written beside its weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.data.fashion_mnist import CLASSES, write_fashion_mnist
from latteflow.data.loader import batch_indices
from latteflow.errors import UserError


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    written = verbs.add_parser("set")
    written.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    written.add_argument("--out", type=Path, default=Path("data/fashion-mnist"))
    judge = verbs.add_parser("judge")
    judge.add_argument("--data", type=Path, default=Path("data/fashion-mnist"))
    judge.add_argument("--out", type=Path, default=Path("runs/fashion-mnist/judge"))
    judge.add_argument("--steps", type=int, default=2000)
    judge.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.verb == "set":
        print(write_fashion_mnist(options.source, options.out))
        return
    torch.set_num_threads(options.threads)
    train_judge(options.data, options.out, options.steps)


def network() -> nn.Module:
    """Return the classifier's network, weights drawn from torch's own generator."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, len(CLASSES)),
    )  # fmt: skip


def train_judge(data: Path, out: Path, steps: int) -> None:
    """Train on the training pictures, mirrored half of the time; write weights and the share of held-out ones."""
    torch.manual_seed(0)
    images, heldout = (load_captioned_images(data, split) for split in ("train", "heldout"))
    model, wanted = network(), class_numbers(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        index = batch_indices(step, number=len(images), batch_size=128, seed=0)
        x = grey(images.pixels[index])
        x = x.flip(-1) if step % 2 else x
        loss = nn.functional.cross_entropy(model(x), wanted[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    hits = classified(model, heldout.pixels) == class_numbers(heldout)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors")
    figures = {"heldout_accuracy": float(hits.float().mean()), "heldout": len(heldout), "steps": steps}
    (out / "figures.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(figures)


def load_judge(folder: Path) -> nn.Module:
    """Return the trained classifier.

    Raises:
        UserError: there is none.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"no classifier in {folder}: train one with `python benchmarks/fashion_mnist.py judge`")
    model = network()
    model.load_state_dict(load_file(file))
    return model.eval()


def class_numbers(images: CaptionedImages) -> torch.Tensor:
    """Return each picture's class, int64."""
    return torch.tensor([CLASSES.index(record.label) for record in images.records])


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures (number, 3, height, width) as float32 in [-1, 1] of one channel."""
    return pixels.float().mean(dim=1, keepdim=True) / 127.5 - 1


@torch.no_grad()
def classified(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return what each picture is taken for, int64."""
    model.eval()
    return torch.cat([model(grey(some)).argmax(dim=1) for some in pixels.split(256)])


def accuracy(model: nn.Module, images: CaptionedImages, pixels: torch.Tensor) -> dict[str, float]:
    """Return the share of pictures taken for what they should show, over all and by class."""
    wanted = class_numbers(images)
    hits = (classified(model, pixels) == wanted).float()
    by_class = {name: hits[wanted == k] for k, name in enumerate(CLASSES)}
    return {
        "accuracy": float(hits.mean()),
        **{name: float(some.mean()) for name, some in by_class.items() if len(some)},
    }


if __name__ == "__main__":
    main()
