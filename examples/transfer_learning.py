"""A body that learned on photographs, adapted to handwritten digits, beside the same model from scratch, on the same budget.

    python examples/transfer_learning.py --weights resnet20-12fca82f.th

The weights are a ResNet-20 for CIFAR-10 (https://github.com/akamaster/pytorch_resnet_cifar10); by default they are looked for in
the folder that MINICNN_DATA names. The digits are scikit-learn's, 8 x 8 and grey, enlarged to what the model reads, 32 x 32 in
three channels. Three ways, with the same images, steps and seed:

    frozen          the body stays as it is, and only a new last layer is trained
    tuned           everything is trained, the body at a third of the learning rate
    from scratch    the same model from random weights

Of 50 images (8 epochs, half a minute), tuning makes a model that is right on 70 % of the unseen digits, the frozen body one that
is right on 47 %; from scratch it is 16 %. What photographs teach is worth most where there is little to learn from: with all 1,437
images, 3 epochs from scratch come to the same as tuning, 98 % (--images 1437 --epochs 3 --batch-size 32).
"""
import argparse
import os
import sys
import time
from pathlib import Path

import minicnn as mc
from minicnn import train, transfer

WAYS = {"frozen": 0.0, "tuned": 0.3, "from scratch": 1.0}        # the body's share of the learning rate
PUBLISHED = mc.data.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))     # as its makers trained it


def adapt(state, way, sets, epochs, batch_size):
    """The history of one way to train: a row an epoch."""
    model = mc.models.resnet20(len(sets[0].classes))
    if way != "from scratch":
        transfer.load_body(model, state)
    config = train.Config(epochs=epochs, batch_size=batch_size, body_lr=WAYS[way], weight_decay=1e-3)
    trainer = train.trainer_of(model, *sets, config, PUBLISHED)
    start = time.perf_counter()
    trainer.fit(on_epoch=lambda t: print(f"  epoch {t.epoch} of {epochs}: {t.evaluation}", flush=True))
    print(f"{way}: {trainer.evaluation} in {time.perf_counter() - start:.0f} s\n")
    return trainer.history


def draw(path, histories):
    """Held-out accuracy over epochs, one line a way."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (way, history), style in zip(histories.items(), ("o-", "s-", "^--"), strict=True):
        axes.plot([row["epoch"] for row in history], [100 * row["test_accuracy"] for row in history], style, label=way)
    axes.set(xlabel="epoch", ylabel="held-out images that are right, %",
             title="ResNet-20 on digits, with and without CIFAR-10's body")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Adapt a ResNet-20 that was trained on photographs to handwritten digits.")
    default = Path(os.environ.get("MINICNN_DATA", ".")) / "resnet20-12fca82f.th"
    parser.add_argument("--weights", type=Path, default=default, help="of a CIFAR ResNet-20 (default: %(default)s)")
    parser.add_argument("--images", type=int, default=50, help="to train on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("transfer_learning.png"), help="where the curves go")
    args = parser.parse_args()
    try:
        state = mc.load(args.weights)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}\nname the weights with --weights FILE")
    train_set, test_set = (mc.data.fitted(part, (3, 32, 32)) for part in mc.data.digits())
    sets = train_set.subset(range(min(args.images, len(train_set)))), test_set
    histories = {}
    for way in WAYS:
        print(f"{way}, on {len(sets[0])} images")
        histories[way] = adapt(state, way, sets, args.epochs, args.batch_size)
    try:
        draw(args.out, histories)
        print(f"curves in {args.out}")
    except ImportError:
        print("no curves: matplotlib is not installed")


if __name__ == "__main__":
    main()
