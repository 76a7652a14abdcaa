"""A page to test with: a small model that has a bit of everything, and names that would like to be markup."""
import numpy as np

from minicnn.data import Normalize
from minicnn.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, MaxPool2d, ReLU, Residual, Sequential
from minicnn.study.subject import Subject

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=document.title="taken">"\'&amp;\u2028\u2029'
CLASSES = ["<b>cat</b>", "dog", HOSTILE, "eel"]


def model(seed=0):
    """(2, 9, 8) -> 4 classes: groups, dilation, a stride, padding, a pool that overlaps, a residual path."""
    return Sequential([Conv2d(6, 3, padding=1).named(HOSTILE), BatchNorm2d().named("bn"), ReLU(),
                       MaxPool2d(3, stride=2, padding=1).named("pool"),
                       Residual([Conv2d(6, 3, padding=1, groups=2, bias=False), BatchNorm2d()]).named("block"), ReLU(),
                       Conv2d(8, (3, 2), stride=(1, 2), padding=2, dilation=(2, 1)).named("dilated"), ReLU(),
                       GlobalAvgPool2d(), Linear(4).named("head")], in_shape=(2, 9, 8), seed=seed)


def subject():
    """A batch of three images for it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 2, 9, 8), dtype=np.uint8)
    return Subject("small", model(), Normalize((0.5, 0.5), (0.25, 0.25)), CLASSES, images,
                   np.array([2, 0, 1]), HOSTILE + ".png", "as you said", HOSTILE, model)
