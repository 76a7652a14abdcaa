"""The models: counts and names as published, arithmetic as PyTorch's, any input size and number of classes."""
import io
import os
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import minicnn as mc
from minicnn import cli, models
from minicnn.layers import BatchNorm2d, Conv2d, Dropout, Linear
from minicnn.models.resnet import PadShortcut, cifar_resnet

# name: (parameters, multiply-adds of convolutions and matrix products), at 3 x 224 x 224 and 1000 classes
VGG = {"vgg11": (132_863_336, 7_609_090_048), "vgg11_bn": (132_868_840, 7_609_090_048),
       "vgg13": (133_047_848, 11_308_466_176), "vgg13_bn": (133_053_736, 11_308_466_176),
       "vgg16": (138_357_544, 15_470_264_320), "vgg16_bn": (138_365_992, 15_470_264_320),
       "vgg19": (143_667_240, 19_632_062_464), "vgg19_bn": (143_678_248, 19_632_062_464)}
RESNET = {"resnet18": (11_689_512, 1_814_073_344), "resnet34": (21_797_672, 3_663_761_408),
          "resnet50": (25_557_032, 4_089_184_256), "resnet101": (44_549_160, 7_801_405_440),
          "resnet152": (60_192_808, 11_513_626_624)}
# depth: (parameters with option A, with option B, multiply-adds with A), at 3 x 32 x 32 and 10 classes
CIFAR = {20: (269_722, 272_474, 40_551_040), 32: (464_154, 466_906, 68_862_592), 44: (658_586, 661_338, 97_174_144),
         56: (853_018, 855_770, 125_485_696), 110: (1_727_962, 1_730_714, 252_887_680)}

BATCH_NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def images(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layers_of(model, kind):
    return {path: layer for path, layer in model.walk() if isinstance(layer, kind)}


# ---------------------------------------------------------------- counts
def check_counts(model, parameters, multiply_adds):
    summary = model.summary()
    assert (summary.parameters, summary.multiply_adds) == (parameters, multiply_adds)
    assert sum(p.size for p in model.parameters()) == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", VGG)
def test_vgg_counts_are_the_published_ones(name):
    check_counts(models.build(name), *VGG[name])        # 550 MB each


# ---------------------------------------------------------------- names and layouts, from the rules of torchvision's classes
def vgg_state(depth, batch_norm, hidden, num_classes, pool):
    """{name: shape}: one index for every module of the list, those without parameters included."""
    stages = {11: "1 1 2 2 2", 13: "2 2 2 2 2", 16: "2 2 3 3 3", 19: "2 2 4 4 4"}[depth].split()
    state, index, before = {}, 0, 3
    for channels, convolutions in zip((64, 128, 256, 512, 512), map(int, stages), strict=True):
        for _ in range(convolutions):
            state |= {f"features.{index}.weight": (channels, before, 3, 3), f"features.{index}.bias": (channels,)}
            if batch_norm:
                state |= batch_norm_state(f"features.{index + 1}", channels)
            index += 3 if batch_norm else 2         # the convolution, its batch norm, its ReLU
            before = channels
        index += 1                                  # the pool
    for index, (n, m) in {0: (512 * pool * pool, hidden), 3: (hidden, hidden), 6: (hidden, num_classes)}.items():
        state |= {f"classifier.{index}.weight": (m, n), f"classifier.{index}.bias": (m,)}
    return state


def batch_norm_state(name, channels):
    return {f"{name}.{part}": () if part == "num_batches_tracked" else (channels,) for part in BATCH_NORM}


def resnet_state(depths, kernels, widths, num_classes, head, first, shortcut):
    """{name: shape}. kernels: of a block's convolutions; shortcut: its name where a first block projects, None where none does."""
    channels, kernel = first
    state = {"conv1.weight": (channels, 3, kernel, kernel), **batch_norm_state("bn1", channels)}
    before = channels
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for j in range(depth):
            block, c = f"layer{i + 1}.{j}", before
            for k, size in enumerate(kernels):
                out = width if k == len(kernels) - 1 else width // (4 if len(kernels) == 3 else 1)
                state |= {f"{block}.conv{k + 1}.weight": (out, c, size, size), **batch_norm_state(f"{block}.bn{k + 1}", out)}
                c = out
            if before != width and shortcut:
                state |= {f"{block}.{shortcut}.0.weight": (width, before, 1, 1), **batch_norm_state(f"{block}.{shortcut}.1", width)}
            before = width
    return state | {f"{head}.weight": (num_classes, before), f"{head}.bias": (num_classes,)}


def check_state(model, expected):
    state = model.state_dict()
    assert {name: array.shape for name, array in state.items()} == expected
    assert list(state) == list(expected)
    assert all((array.dtype == np.int64) == name.endswith("num_batches_tracked") for name, array in state.items())


@pytest.mark.parametrize("name", VGG)
def test_vgg_states_are_torchvisions_and_so_are_the_counts(name):
    """With a narrow classifier; its weights are counted here, and put in place of the 123,642,856 published ones."""
    sizes = [512 * 7 * 7, 8, 8, 1000]
    products = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    model = models.build(name, hidden=8)
    check_counts(model, VGG[name][0] - 123_642_856 + products + sum(sizes[1:]), VGG[name][1] - 123_633_664 + products)
    check_state(model, vgg_state(int(name[3:5]), name.endswith("_bn"), 8, 1000, 7))


@pytest.mark.parametrize("name, depths, kernels, expansion", [
    ("resnet18", [2, 2, 2, 2], [3, 3], 1), ("resnet34", [3, 4, 6, 3], [3, 3], 1), ("resnet50", [3, 4, 6, 3], [1, 3, 1], 4),
    ("resnet101", [3, 4, 23, 3], [1, 3, 1], 4), ("resnet152", [3, 8, 36, 3], [1, 3, 1], 4)])
def test_resnet_states_are_torchvisions_and_so_are_the_counts(name, depths, kernels, expansion):
    widths = [64 * expansion, 128 * expansion, 256 * expansion, 512 * expansion]
    model = models.build(name)
    check_counts(model, *RESNET[name])
    check_state(model, resnet_state(depths, kernels, widths, 1000, "fc", (64, 7), "downsample"))


@pytest.mark.parametrize("depth", CIFAR)
def test_cifar_resnet_states_are_those_of_public_checkpoints_and_so_are_the_counts(depth):
    n = (depth - 2) // 6
    parameters, parameters_b, multiply_adds = CIFAR[depth]
    for option, count, name in (("A", parameters, None), ("B", parameters_b, "shortcut")):
        model = models.build(f"resnet{depth}", shortcut=option)
        projections = 32 * 16 * 16 * 16 + 64 * 32 * 8 * 8 if option == "B" else 0
        check_counts(model, count, multiply_adds + projections)
        check_state(model, resnet_state([n, n, n], [3, 3], [16, 32, 64], 10, "linear", (16, 3), name))


def test_vgg16_convolutions_stand_where_they_are_known_to():
    known = {"vgg16": "0 2 5 7 10 12 14 17 19 21 24 26 28", "vgg16_bn": "0 3 7 10 14 17 20 24 27 30 34 37 40"}
    for name, indices in known.items():
        model = models.build(name, 10, (3, 32, 32), hidden=8, pool=1)
        assert [path.split(".")[1] for path in layers_of(model, Conv2d)] == indices.split()
        assert list(layers_of(model, Linear)) == ["classifier.0", "classifier.3", "classifier.6"]
        assert list(layers_of(model, Dropout)) == ["classifier.2", "classifier.5"]


def test_a_bottleneck_has_its_stride_on_the_3x3():
    model = models.resnet50(10, (3, 64, 64))
    strided = {path for path, layer in layers_of(model, Conv2d).items() if layer.stride == 2}
    assert strided == {"conv1", *(f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0"))}


# ---------------------------------------------------------------- arithmetic, against PyTorch's own layers
def torch_twin(name, model):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    import torch_models as nets
    classes = model.out_shape[0]
    if name.startswith("vgg"):
        hidden, flat = model.named_parameters()["classifier.0.weight"].shape
        twin = nets.VGG(int(name[3:5]), name.endswith("bn"), classes, hidden, round((flat / 512) ** 0.5))
    elif name in RESNET:
        depths = [len(model[i]) for i in range(4, 8)]
        bottleneck = "layer1.0.conv3.weight" in model.named_parameters()
        twin = nets.ResNet(nets.Bottleneck if bottleneck else nets.Basic, depths, 4 if bottleneck else 1, classes)
    else:
        option = "B" if "layer2.0.shortcut.0.weight" in model.named_parameters() else "A"
        twin = nets.CifarResNet(int(name[6:]), classes, option, model.in_shape[0])
    return nets.take_over(twin, model).eval()


@pytest.mark.parametrize("name, in_shape, options", [
    ("vgg11", (3, 32, 32), {"pool": 7, "hidden": 32}), ("vgg13_bn", (3, 45, 38), {"pool": 2, "hidden": 32}),
    ("vgg16_bn", (3, 32, 32), {"pool": 1, "hidden": 32}), ("vgg19", (3, 33, 64), {"pool": 1, "hidden": 32}),
    ("resnet18", (3, 65, 47), {}), ("resnet34", (3, 32, 33), {}), ("resnet50", (3, 65, 47), {}),
    ("resnet20", (3, 32, 32), {}), ("resnet20", (1, 8, 8), {}), ("resnet20", (3, 31, 17), {"shortcut": "B"}),
    ("resnet32", (4, 9, 12), {"shortcut": "A"})])
def test_a_model_computes_what_pytorchs_of_the_same_weights_does(name, in_shape, options):
    model = models.build(name, 5, in_shape, dtype=np.float64, **options)
    randomize_statistics(model)
    twin = torch_twin(name, model)
    import torch
    x = images(2, *in_shape, dtype=np.float64)
    with torch.no_grad():
        expected = twin(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model(x).numpy(), expected, rtol=0, atol=1e-12 * abs(expected).max())
    assert list(model.state_dict()) == list(twin.state_dict())


def randomize_statistics(model):
    """Running statistics and affine numbers that a wrong order of mean and variance, or a lost one, cannot survive."""
    rng = np.random.default_rng(9)
    state = model.state_dict()
    for name, array in state.items():
        if array.ndim == 1 and "classifier" not in name and not name.startswith(("fc", "linear")):
            array[...] = rng.uniform(0.5, 1.5, array.shape)
    model.load_state_dict(state)


# Every VGG and every ResNet, each with weights drawn anew under torchvision's names; some of them by default.
QUICK = ["vgg11", "resnet18", "resnet20 A", "resnet20 B"]
each_model = pytest.mark.parametrize("which", [
    pytest.param(which, marks=() if which in QUICK else pytest.mark.slow)
    for which in [*VGG, *RESNET, *(f"resnet{depth} {option}" for depth in CIFAR for option in "AB")]])


def lively_pair(which, dtype):
    """The model with numbers that tell every parameter apart, and PyTorch's of the same ones; neither with dropout."""
    name, _, option = which.partition(" ")
    options = {"hidden": 32, "pool": 2, "dropout": 0.0} if name in VGG else {"shortcut": option} if option else {}
    in_shape = (3, 32, 32) if option or which in QUICK else (3, 64, 48)
    model = models.build(name, 5, in_shape, dtype=dtype, **options)
    rng, state = np.random.default_rng(9), model.state_dict()
    for key, array in state.items():
        if array.ndim > 1:
            array[...] = rng.standard_normal(array.shape) * (2 / array[0].size) ** 0.5
        elif array.ndim:
            low, high = (0.7, 1.3) if key.endswith(("var", "weight")) else (-0.2, 0.2)
            array[...] = rng.uniform(low, high, array.shape)
    model.load_state_dict(state)
    twin = torch_twin(name, model)
    for module in twin.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
    return model, twin


def logits_and_gradients(model, x, dy, train):
    """{name: array}: the logits, and the gradients of <logits, dy> by the images and every parameter."""
    for parameter in model.parameters():
        parameter.grad = None
    seen = mc.Tensor(x, requires_grad=True)
    y = model(seen, train=train)
    y.backward(mc.Tensor(dy))
    found = {"logits": y, "images": seen.grad, **{name: p.grad for name, p in model.named_parameters().items()}}
    return {name: value.numpy() for name, value in found.items()}


def torch_logits_and_gradients(twin, x, dy, train):
    """The same of PyTorch's."""
    import torch
    twin.zero_grad()
    seen = torch.from_numpy(x.copy()).requires_grad_()
    y = twin.train(train)(seen)
    y = y.to(seen.dtype)                            # where autocast left it in half precision
    y.backward(torch.from_numpy(dy))
    found = {"logits": y.detach(), "images": seen.grad, **{name: p.grad for name, p in twin.named_parameters()}}
    return {name: value.numpy() for name, value in found.items()}


def largest_error(ours, theirs):
    """Of any array over its largest number; of those that are next to nothing beside the others (a bias that a batch norm takes off
    again has the gradient 0, and rounding is all there is) over a thousandth of the largest gradient."""
    floor = 1e-3 * max(abs(array).max() for name, array in theirs.items() if name != "logits")
    assert ours.keys() == theirs.keys()
    return max(abs(ours[name] - array).max() / max(abs(array).max(), floor) for name, array in theirs.items())


@each_model
def test_logits_and_gradients_are_pytorchs(which):
    """In float64 to 1e-10, at inference and in training, with batch norm by the batch's own statistics."""
    model, twin = lively_pair(which, np.float64)
    x, dy = images(4, *model.in_shape, dtype=np.float64), images(4, 5, dtype=np.float64, seed=1)
    for train in (False, True):
        ours, theirs = logits_and_gradients(model, x, dy, train), torch_logits_and_gradients(twin, x, dy, train)
        assert largest_error(ours, theirs) <= 1e-10
    for name, array in model.state_dict().items():              # the running statistics moved alike
        np.testing.assert_allclose(array, twin.state_dict()[name].numpy(), rtol=1e-10, atol=1e-12, err_msg=name)


@each_model
def test_logits_and_gradients_are_pytorchs_in_float32(which):
    """To 1e-4, on every image. In a hundred layers some ReLU's input is 0 but for rounding, or two pixels of a window are equal but
    for it: then one library lets the gradient through, here or there, and the other does not. The logits do not feel it; for the
    gradients PyTorch takes our decisions, and where it would have decided otherwise, rounding is all that lay between."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model, twin = lively_pair(which, np.float32)
    x, dy = images(3, *model.in_shape), images(3, 5, seed=9)
    with mc.study.record() as tape:
        ours = logits_and_gradients(model, x, dy, train=False)
    with torch.no_grad():
        logits = twin.eval()(torch.from_numpy(x)).numpy()
    assert abs(ours["logits"] - logits).max() <= 1e-4 * abs(logits).max()
    with our_decisions(tape) as margins:
        theirs = torch_logits_and_gradients(twin, x, dy, train=False)
    assert max(margins) <= 1e-5
    assert abs(ours["logits"] - theirs["logits"]).max() <= 1e-4 * abs(theirs["logits"]).max()
    assert largest_error(ours, theirs) <= 1e-4


@contextmanager
def our_decisions(tape):
    """Inside the block PyTorch's ReLUs let through what ours did, and its max-pools take the pixels that ours took.

    Yields a list that is filled with what this changed: for each such layer, the largest difference over its largest number.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    ours = iter([step for step in tape.steps if step.op in ("relu", "max_of_windows")])
    margins = []

    def relu(x, inplace=False):
        return x * torch.from_numpy(next(ours).output.array > 0)

    def max_pool2d(x, *window, **options):
        seen = torch.from_numpy(np.ascontiguousarray(next(ours).inputs["x"].array))
        _, places = torch.nn.functional.max_pool2d_with_indices(seen, *window, **{**options, "return_indices": True})
        return x.flatten(2).gather(2, places.flatten(2)).view(places.shape)

    class Deciding(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            own = function(*args, **(kwargs or {}))
            decided = {"relu": relu, "max_pool2d": max_pool2d}.get(function.__name__)      # torch's or torch.nn.functional's
            if decided is None:
                return own
            taken = decided(*args, **(kwargs or {}))
            margins.append(float((taken - own).detach().abs().max() / own.detach().abs().max()))
            return taken

    with Deciding():
        yield margins
    assert next(ours, None) is None


# ---------------------------------------------------------------- any input size that works, any number of classes
@pytest.mark.parametrize("name, classes, in_shape, options", [
    ("resnet18", 3, (3, 65, 47), {}), ("resnet18", 1, (1, 7, 9), {}), ("resnet50", 11, (2, 33, 31), {}),
    ("vgg11", 4, (3, 32, 32), {"pool": 1, "hidden": 8}), ("vgg11_bn", 2, (1, 61, 32), {"pool": 3, "hidden": 8}),
    ("resnet20", 100, (1, 8, 8), {}), ("resnet20", 2, (3, 5, 3), {"shortcut": "B"}), ("resnet44", 10, (3, 28, 28), {})])
def test_odd_sizes_and_any_number_of_classes(name, classes, in_shape, options):
    model = models.build(name, classes, in_shape, **options)
    assert (model.in_shape, model.out_shape, model.dtype) == (in_shape, (classes,), np.float32)
    assert model(images(2, *in_shape)).shape == (2, classes)
    loss = mc.ops.cross_entropy(model(images(3, *in_shape), train=True), np.arange(3) % classes)
    loss.backward()
    assert all(p.grad.shape == p.shape and np.isfinite(p.grad.numpy()).all() for p in model.parameters())


@pytest.mark.parametrize("make, words", [
    (lambda: models.vgg11(10, (3, 16, 16), hidden=8), "features.20 (MaxPool2d): an image of 1 x 1"),
    (lambda: models.vgg16_bn(10, (3, 32, 31), hidden=8), "features.43 (MaxPool2d): an image of 2 x 1"),
    (lambda: models.resnet20(10, (32, 32)), "conv1 (Conv2d): Conv2d reads images (C, H, W), not (32, 32)"),
    (lambda: models.resnet20(0), "Linear: out_features=0 must be an integer of at least 1"),
    (lambda: models.resnet20(shortcut="C"), """shortcut='C' must be "A" (zero channels) or "B" (1x1 convolution)"""),
    (lambda: cifar_resnet(21), "depth=21 must be 6 n + 2"), (lambda: cifar_resnet(2), "depth=2 must be 6 n + 2"),
    (lambda: models.vgg11(10, (3, 32, 32), hidden=8, pool=0), "output_size=0"),
    (lambda: models.vgg11(10, (3, 32, 32), hidden=8, dropout=2.0), "p=2.0 must be a share between 0 and 1"),
    (lambda: models.build("resnet19"), "no model is called 'resnet19'; did you mean 'resnet1"),
    (lambda: models.build("unknown"), "The models are vgg11, ")])
def test_what_cannot_be_is_said_in_one_line(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_errors():
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropuot'"):
        models.vgg11(10, (3, 32, 32), dropuot=0.1)


def test_the_names_of_the_models():
    assert set(models.names()) == {*VGG, *RESNET, *(f"resnet{depth}" for depth in CIFAR), "nin", "googlenet"}
    assert all(getattr(models, name).__name__ == name for name in models.names())
    assert models.build("resnet20").out_shape == (10,)
    assert models.build("resnet18", in_shape=(3, 32, 32)).out_shape == (1000,)


# ---------------------------------------------------------------- the options, the beginning
def test_vggs_options_reach_their_layers():
    model = models.vgg11(10, (3, 32, 32), dropout=0.25, hidden=24, pool=2)
    assert [layer.p for layer in layers_of(model, Dropout).values()] == [0.25, 0.25]
    assert [layer.weight.shape for layer in layers_of(model, Linear).values()] == [(24, 2048), (24, 24), (10, 24)]


def test_models_begin_as_documented_and_from_the_seed():
    vgg, resnet = models.vgg11_bn(10, (3, 32, 32), hidden=256, pool=1), models.resnet18(1000, (3, 32, 32))
    for model in (vgg, resnet):
        for path, conv in layers_of(model, Conv2d).items():
            k, window = conv.weight.shape[0], np.prod(conv.weight.shape[2:])
            assert conv.weight.numpy().std() == pytest.approx((2 / (k * window)) ** 0.5, rel=0.03), path
            assert conv.bias is None or not conv.bias.numpy().any()
        for norm in layers_of(model, BatchNorm2d).values():
            assert (norm.weight.numpy() == 1).all() and (norm.running_var == 1).all()       # noqa: PT018
            assert not (norm.bias.numpy().any() or norm.running_mean.any())
    for linear in layers_of(vgg, Linear).values():                                          # torchvision's: normal(0.01), zeros
        assert linear.weight.numpy().std() == pytest.approx(0.01, rel=0.05)
        assert not linear.bias.numpy().any()
    fc = dict(resnet.walk())["fc"]
    assert abs(fc.weight.numpy()).max() <= 512 ** -0.5
    assert fc.weight.numpy().std() == pytest.approx((512 * 3) ** -0.5, rel=0.03)

    def weights(seed):
        return b"".join(a.tobytes() for a in models.resnet20(seed=seed).state_dict().values())
    assert weights(1) == weights(1) != weights(2)


@pytest.mark.parametrize("h, w", [(4, 4), (5, 3), (1, 1)])
def test_option_a_takes_every_second_pixel_and_pads_channels_on_both_sides(h, w):
    layer = PadShortcut(10, 2)
    assert layer.build((6, h, w), np.random.default_rng(0), np.float64) == (10, (h + 1) // 2, (w + 1) // 2)
    x = images(2, 6, h, w, dtype=np.float64)
    y = layer(x).numpy()
    assert not y[:, :2].any() and not y[:, 8:].any()                                        # noqa: PT018
    np.testing.assert_array_equal(y[:, 2:8], x[:, :, ::2, ::2])


@pytest.mark.parametrize("channels", [5, 3])
def test_option_a_needs_an_even_number_of_new_channels(channels):
    with pytest.raises(ValueError, match='from 4 to . it cannot; use shortcut="B"'):
        PadShortcut(channels, 2).build((4, 8, 8), np.random.default_rng(0), np.float64)


# ---------------------------------------------------------------- real weights, real images
def outside(name):
    root = os.environ.get("MINICNN_DATA")
    if not root:
        pytest.skip("MINICNN_DATA is not set")
    if not Path(root, name).exists():
        pytest.skip(f"no {name} in MINICNN_DATA")
    return Path(root, name)


def cifar_test_images(archive, count):
    """The first `count` test images as the archive gives them, one class after the other: (N, 3, 32, 32) in 0..1, labels."""
    image = pytest.importorskip("PIL.Image", reason="JPEG files need Pillow")
    pixels, names = [], []
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if member.isfile() and "/test/" in f"/{member.name}" and len(pixels) < count:
                with image.open(io.BytesIO(tar.extractfile(member).read())) as picture:
                    pixels.append(np.asarray(picture.convert("RGB")))
                names.append(Path(member.name).parent.name)
            elif len(pixels) == count:
                break
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255, np.array([classes.index(name) for name in names])


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_public_checkpoint_loads_by_name_and_predicts_as_in_pytorch(count):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    path, archive = outside("resnet20-12fca82f.th"), outside("cifar10-jpeg.tar.xz")
    import torch_models as nets
    model = models.resnet20()
    assert model.load_state_dict(mc.load(path)) == ([], [], [])

    twin = nets.CifarResNet(20)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    twin.load_state_dict({name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()})
    x, labels = cifar_test_images(archive, count)
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)[..., None, None]
    x = (x - mean) / std
    found, expected = [], []
    for part in np.array_split(x, -(-count // 500)):
        with torch.no_grad():
            expected.append(twin.eval()(torch.from_numpy(part)).numpy())
        with mc.no_grad():
            found.append(model(part).numpy())
    logits, expected = np.concatenate(found), np.concatenate(expected)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(logits.argmax(1)[clear], expected.argmax(1)[clear])
    right = (logits.argmax(1) == labels).mean()
    assert right == pytest.approx(0.8103, abs=1e-4) if count == 10_000 else right > 0.7     # chance is 0.1


@pytest.mark.slow
def test_the_command_finds_the_published_accuracy(capsys):
    """On the JPEG copy of CIFAR-10's test images; of the original ones it is the published 91.78 %."""
    pytest.importorskip("PIL", reason="JPEG files need Pillow")
    path, archive = outside("resnet20-12fca82f.th"), outside("cifar10-jpeg.tar.xz")
    command = ["eval", "--model", "resnet20", "--weights", path, "--data", "cifar10", "--root", archive,
               "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    assert cli.main([*map(str, command)]) == 0
    assert "accuracy 81.03 % (8103 of 10000)" in capsys.readouterr().out
