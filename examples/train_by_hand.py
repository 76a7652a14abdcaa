"""Train a small convolutional network on scikit-learn's handwritten digits, with the loop written out.

    python examples/train_by_hand.py          (needs scikit-learn: pip install "minicnn[train]")

1,797 real digits of 8 x 8 pixels; a fifth is held out. `minicnn train` does the same with everything a real run wants.
"""
import time

import numpy as np

import minicnn as mc
from minicnn.layers import BatchNorm2d, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential

EPOCHS, BATCH, SEED = 8, 64, 0
PROMISED = 0.97         # the share of unseen digits that it must be right on


def conv_block(channels):
    """Helpers return lists of layers, and lists splice with *."""
    return [Conv2d(channels, 3, padding=1, bias=False), BatchNorm2d(), ReLU()]


def main() -> None:
    train, test = mc.data.digits()
    normalize = mc.data.Normalize(*mc.data.channel_statistics(train.images))        # uint8 pixels -> float32, mean 0, variance 1

    # Channels and image sizes are inferred: only in_shape, the shape of one image (C, H, W), is said.
    model = Sequential([*conv_block(16), *conv_block(16), MaxPool2d(2),             # 8 x 8 -> 4 x 4
                        *conv_block(32), *conv_block(32),
                        MaxPool2d(2), Flatten(), Linear(len(train.classes))], in_shape=(1, 8, 8), seed=SEED)
    print(model.summary())

    def accuracy() -> float:
        with mc.no_grad():                                                          # inference: nothing is recorded
            return float(np.mean(model(normalize(test.images)).numpy().argmax(1) == test.labels))

    steps = EPOCHS * mc.data.steps_per_epoch(len(train), BATCH)
    learning_rate = mc.optim.cosine_schedule(0.1, steps)
    optimizer = mc.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    start, step = time.perf_counter(), 0
    for epoch in range(EPOCHS):
        losses = []
        for images, labels in mc.data.batches(train, BATCH, seed=SEED, epoch=epoch):
            logits = model(normalize(images), train=True)                           # forward, with the batch's own statistics
            loss = mc.ops.cross_entropy(logits, labels)
            optimizer.zero_grad()                                                   # backward adds to what is there
            loss.backward()                                                         # dL/d(parameter), for every parameter
            optimizer.lr = learning_rate(step)
            optimizer.step()                                                        # downhill
            losses.append(loss.item())
            step += 1
        print(f"epoch {epoch + 1}   mean loss {np.mean(losses):.4f}   right on {accuracy():.2%} of the unseen digits")

    final = accuracy()
    print(f"right on {round(final * len(test))} of {len(test)} unseen digits ({final:.2%}) "
          f"after {time.perf_counter() - start:.1f} s of training")
    assert final >= PROMISED, f"accuracy {final:.2%} is below {PROMISED:.0%}"


if __name__ == "__main__":
    main()
