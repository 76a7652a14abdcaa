"""Receptive fields, saliency and Grad-CAM: against gradients that are zero or not, finite differences, and PyTorch with hooks."""
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import minicnn as mc
from minicnn.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Branches,
    Conv2d,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    SimAM,
)
from minicnn.study import attribution, effective_receptive_field, grad_cam, heatmaps, receptive, receptive_fields, saliency

RNG = np.random.default_rng(0)


def lively(model, seed=0):
    """Running statistics and biases as of a network that was trained: at the start they are zeros and ones, which hide mistakes."""
    rng = np.random.default_rng(seed)
    state = model.state_dict()
    for name, array in state.items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            state[name] = rng.uniform(0.5, 1.5, array.shape)
        elif name.endswith(("bias", "running_mean")):
            state[name] = 0.1 * rng.standard_normal(array.shape)
    model.load_state_dict(state)
    return model


def bounding_box(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


# ---------------------------------------------------------------- receptive fields, by geometry
def test_receptive_fields_that_are_known():
    """Size, stride and padding of Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks", 2019."""
    vgg = receptive_fields(mc.models.vgg16(hidden=8))["features"]
    assert (vgg.size, vgg.stride, vgg.start) == ((212, 212), (32, 32), (-90, -90))
    googlenet = receptive_fields(mc.models.googlenet())["inception5b"]
    assert (googlenet.size, googlenet.stride) == ((699, 699), (32, 32))
    # By hand, CIFAR's ResNet-20: 3 + 6 x 2 = 15 behind stage 1; + 2 + 5 x 2 x 2 = 37 behind stage 2; + 2 x 2 + 5 x 2 x 4 = 81.
    fields = receptive_fields(mc.models.resnet20(in_shape=(3, 96, 96)))
    assert [fields[f"layer{i}"].size[0] for i in (1, 2, 3)] == [15, 37, 81]
    assert [fields[f"layer{i}"].stride[0] for i in (1, 2, 3)] == [1, 2, 4]
    assert fields["linear"].box() == fields[""].box() == (slice(0, 96), slice(0, 96))


def windows():
    """Layers that slide a window, all of whose pixels matter: no winner takes all."""
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    convolution = st.builds(lambda k, s, p, d, g: Conv2d(2, k, stride=s, padding=p, dilation=d, groups=g), sizes, st.integers(1, 2),
                            st.integers(0, 2), st.integers(1, 2), st.integers(1, 2))
    pool = st.builds(lambda k, s, p, ceil: AvgPool2d(k, s, padding=(p * (k[0] > 1), p * (k[1] > 1)), ceil_mode=ceil), sizes,
                     st.integers(1, 2), st.integers(0, 1), st.booleans())
    return st.one_of(convolution, pool)


def same_size(kernel):
    return [Conv2d(2, kernel, padding=kernel // 2), BatchNorm2d()]


def lists_of_layers():
    beside = st.one_of(
        st.builds(lambda k: Residual(same_size(k)), st.sampled_from([1, 3, 5])),
        st.builds(lambda k, s: Residual([Conv2d(2, k, stride=s, padding=k // 2)], [Conv2d(2, 1, stride=s)]),
                  st.sampled_from([3, 5]), st.integers(1, 2)),
        st.builds(lambda k: Branches([Conv2d(1, 1)], [Conv2d(1, k, padding=k // 2)]), st.sampled_from([3, 5])),
        st.builds(lambda: Sequential([SimAM(), BatchNorm2d()])),
        st.builds(AdaptiveAvgPool2d, st.integers(2, 4)))
    return st.lists(st.one_of(windows(), windows(), beside), min_size=1, max_size=4)


@given(lists_of_layers(), st.integers(8, 15), st.integers(0, 2 ** 32 - 1))
@example([AdaptiveAvgPool2d(4)], 9, 1)                  # which windows that overlap share out
@example([AdaptiveAvgPool2d((4, 3)), Conv2d(2, 2)], 10, 0)
def test_a_field_is_where_gradients_are_not_zero(layers, side, seed):
    """Without ReLUs and winners every path counts, so that the box is met exactly, whatever the weights."""
    try:
        model = Sequential(layers, (2, side, side + 3), seed, np.float64)
    except ValueError:
        return                                          # the image has become too small for a window
    fields = receptive_fields(model)
    rng = np.random.default_rng(seed)
    x = mc.Tensor(rng.standard_normal((1, 2, side, side + 3)), requires_grad=True)
    y = model(x)
    position = tuple(int(rng.integers(n)) for n in y.shape[2:])
    dy = np.zeros(y.shape)
    dy[(0, slice(None), *position)] = rng.standard_normal(y.shape[1])
    gradient = mc.grad(y, x, dy)[0].numpy()[0]
    mask = (gradient != 0).any(axis=0)
    rows, columns = fields[""].box(position)
    if mask.any():
        found = bounding_box(mask)
        assert (found[0].start >= rows.start and found[0].stop <= rows.stop
                and found[1].start >= columns.start and found[1].stop <= columns.stop)
        assert found == (rows, columns) or has_holes(layers)
    else:
        assert rows.stop <= rows.start or columns.stop <= columns.start


def has_holes(layers):
    """Whether a window steps over what the layer before gave, so that a border pixel may be computed of padding alone."""
    return any(isinstance(layer, Conv2d | AvgPool2d) and (max(layer.windows.stride) > min(layer.windows.kernel_size)
                                                       or max(layer.windows.padding) > 0 and max(layer.windows.dilation) > 1)
               for layer in layers)


@pytest.mark.parametrize(("build", "path", "side"), [
    (lambda s: mc.models.vgg11(2, (3, s, s), hidden=8, pool=1, dtype=np.float64), "features.6", 40),
    (lambda s: mc.models.resnet18(2, (3, s, s), dtype=np.float64), "layer1", 64),
    (lambda s: mc.models.resnet20(2, (3, s, s), dtype=np.float64), "layer2.0", 48),
    (lambda s: mc.models.nin(2, (3, s, s), dtype=np.float64), "pool1", 16),
    (lambda s: mc.models.googlenet(2, (3, s, s), dtype=np.float64), "inception3a", 104)])
def test_the_fields_of_the_models(build, path, side):
    """Through ReLUs and max-pools one image uses some of the paths; many images together use those to all four sides."""
    model = build(side)
    field = receptive_fields(model)[path]
    expected = field.box()
    assert 1 < expected[0].stop - expected[0].start < side, "a field as large as the image would show nothing"
    images = np.random.default_rng(1).standard_normal((4, 3, side, side))
    effective = effective_receptive_field(model, images, path, draws=2)
    assert bounding_box(effective > 0) == expected
    assert expected[0].stop - expected[0].start == field.size[0]            # in the middle of the image, no padding is seen
    assert (effective[expected] > 0).mean() > 0.9


def test_the_field_of_a_layer_of_ones_own():
    class Shift(Layer):
        def forward(self, x, train, rng):
            return x

    model = Sequential([Shift()], (1, 4, 4))
    with pytest.raises(TypeError, match="which pixels a Shift sees is not known"):
        receptive_fields(model)
    receptive.sees.register(Shift, lambda layer, field: field.through(mc.kernels.windows.Windows.of(3, 1, 1)))
    assert receptive_fields(model)["0"].size == (3, 3)


def test_a_field_has_no_place_outside_its_map():
    field = receptive_fields(Sequential([Conv2d(1, 3)], (1, 5, 6)))[""]
    assert field.box((2, 3)) == (slice(2, 5), slice(3, 6))
    with pytest.raises(ValueError, match=r"position \(3, 0\) is outside the map of 3 x 4"):
        field.box((3, 0))
    with pytest.raises(ValueError, match=r"must be built for \(C, H, W\), not \(4,\)"):
        receptive_fields(Sequential([Linear(2)], (4,)))


# ---------------------------------------------------------------- receptive fields, by a backward pass
def test_the_effective_field_is_the_norm_of_the_jacobian():
    """Against the Jacobian itself, row by row, by as many backward passes as the layer has channels."""
    model = Sequential([Conv2d(4, 3, padding=1), ReLU(), Conv2d(5, 3, padding=1), ReLU()], (2, 7, 7), dtype=np.float64)
    images = RNG.standard_normal((2, 2, 7, 7))
    x = mc.Tensor(images, requires_grad=True)
    y = model(x)
    squares = np.zeros((7, 7))
    for n in range(2):
        for k in range(5):
            squares += np.square(mc.grad(y[n, k, 2, 3], x, retain_graph=True)[0].numpy()).sum(axis=(0, 1))
    effective = effective_receptive_field(model, images, "3", (2, 3), draws=400)
    np.testing.assert_allclose(effective, np.sqrt(squares / 2), rtol=0.2, atol=1e-3)
    assert np.array_equal(effective == 0, squares == 0)


def test_the_effective_field_is_smaller_and_highest_in_its_middle():
    model = Sequential([layer for _ in range(10) for layer in (Conv2d(8, 3, padding=1), ReLU())], (1, 41, 41), dtype=np.float64)
    effective = effective_receptive_field(model, RNG.standard_normal((4, 1, 41, 41)), "19", draws=16)
    assert np.hypot(*(np.array(np.unravel_index(effective.argmax(), effective.shape)) - 20)) < 3
    assert receptive.effective_size(effective) < 0.8 * receptive_fields(model)["19"].size[0] == 0.8 * 21


# ---------------------------------------------------------------- saliency
def test_saliency_against_finite_differences():
    model = lively(mc.models.resnet20(5, (3, 5, 6), dtype=np.float64))
    image, c, eps = RNG.standard_normal((3, 5, 6)), 2, 1e-6

    steps = eps * np.eye(image.size).reshape(-1, *image.shape)              # each image with one number moved, as one batch
    ahead, back = (model(image + sign * steps).numpy()[:, c] for sign in (1, -1))
    expected = ((ahead - back) / (2 * eps)).reshape(image.shape)
    np.testing.assert_allclose(attribution.input_gradient(model, image, c), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(saliency(model, image, c), np.abs(expected).max(axis=0), rtol=1e-5, atol=1e-7)


def model_and_witness(name):
    """The model, PyTorch's, and the name of the module there that Grad-CAM looks at by default here."""
    import torch_models as witnesses

    def built(side, **options):
        return lively(mc.models.build(name, 6, (3, side, side), dtype=np.float64, **options))

    return {"vgg11": lambda: (built(48, hidden=16, pool=1), witnesses.VGG(11, False, 6, 16, 1), "features.19"),
            "vgg13_bn": lambda: (built(32, hidden=16, pool=2), witnesses.VGG(13, True, 6, 16, 2), "features.33"),
            "resnet18": lambda: (built(48), witnesses.ResNet(witnesses.Basic, [2] * 4, 1, 6), "layer4"),
            "resnet50": lambda: (built(48), witnesses.ResNet(witnesses.Bottleneck, [3, 4, 6, 3], 4, 6), "layer4"),
            "resnet20": lambda: (built(20), witnesses.CifarResNet(20, 6), "layer3"),
            "nin": lambda: (built(16), witnesses.NetworkInNetwork(6), "cccp6"),
            "googlenet": lambda: (built(48), witnesses.GoogLeNet(6), "inception5b")}[name]()


@pytest.mark.parametrize("name", ["vgg11", "vgg13_bn", "resnet18", "resnet50", "resnet20", "nin", "googlenet"])
def test_saliency_and_grad_cam_against_pytorch(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch_models import take_over

    model, witness, module = model_and_witness(name)
    net = take_over(witness, model).eval()
    kept = {}
    dict(net.named_modules())[module].register_forward_hook(lambda _, __, output: kept.update(a=output))
    image = RNG.standard_normal(model.in_shape)
    x = torch.from_numpy(image[None]).requires_grad_()
    logits = net(x)
    np.testing.assert_allclose(model(image[None]).numpy(), logits.detach().numpy(), rtol=1e-8, atol=1e-10)
    c = int(logits[0].argsort()[-2])                    # not the default's
    dx, da = torch.autograd.grad(logits[0, c], [x, kept["a"]])
    np.testing.assert_allclose(saliency(model, image, c), dx[0].abs().amax(0).numpy(), rtol=1e-6, atol=1e-12)
    assert np.abs(saliency(model, image, c)).max() > 0
    if name == "nin":                                   # the hook is on the convolution, whose ReLU is a function there
        a = torch.relu(kept["a"])
        da = torch.full_like(da, 0)
        da[0, c] = 1 / math.prod(a.shape[2:])           # a class's logit is the mean of its own map
    else:
        a = kept["a"]
    alpha = da.mean((2, 3), keepdim=True)
    heat = torch.relu((alpha * a).sum(1, keepdim=True))
    large = torch.nn.functional.interpolate(heat, model.in_shape[1:], mode="bilinear", align_corners=False)
    found = grad_cam(model, image, c)
    assert found.target == c
    np.testing.assert_allclose(found.weights, alpha[0, :, 0, 0].numpy(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.heat, heat.detach().numpy()[0, 0], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.enlarged(model.in_shape[1:]), large.detach().numpy()[0, 0], rtol=1e-6, atol=1e-12)


def test_the_class_is_the_likeliest_by_default():
    model = lively(mc.models.resnet20(6, (1, 8, 8), dtype=np.float64))
    image = RNG.standard_normal((1, 8, 8))
    best = int(model(image[None]).numpy().argmax())
    assert grad_cam(model, image).target == best
    np.testing.assert_array_equal(saliency(model, image), saliency(model, image, best))
    assert not np.array_equal(saliency(model, image), saliency(model, image, (best + 1) % 6))


def test_the_layers_that_grad_cam_takes():
    assert attribution.last_image_layer(mc.models.vgg16(hidden=8)) == "features.29"       # relu5_3, as in the paper
    assert attribution.last_image_layer(mc.models.resnet18()) == "layer4.1.relu"
    assert attribution.last_image_layer(mc.models.googlenet()) == "inception5b"
    model = mc.models.resnet20(6, (1, 8, 8))
    cam = grad_cam(model, np.zeros((1, 8, 8)), layer="layer1.0.conv1")                     # inside a residual block
    assert (cam.heat.shape, cam.weights.shape, cam.layer) == ((8, 8), (16,), "layer1.0.conv1")


def test_looking_leaves_nothing_behind():
    model = mc.models.resnet20(6, (1, 8, 8))
    before = model.state_dict()
    grad_cam(model, np.ones((1, 8, 8)))
    saliency(model, np.ones((1, 8, 8)))
    effective_receptive_field(model, np.ones((1, 1, 8, 8)), "layer3", draws=1)
    assert all(p.grad is None for p in model.parameters())
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())
    assert mc.autograd.recorder() is None
    model.freeze()                                      # no parameter wants a gradient, and the image's is there all the same
    assert saliency(model, np.ones((1, 8, 8))).max() > 0


def test_the_maps_are_the_same_on_every_backend(device):
    host = lively(mc.models.resnet20(6, (1, 8, 8), dtype=np.float64))
    model = lively(mc.models.resnet20(6, (1, 8, 8), dtype=np.float64)).to(device.name)
    image = RNG.standard_normal((1, 8, 8))
    for there, here in [(saliency(model, image, 2), saliency(host, image, 2)),
                        (grad_cam(model, image, 2).heat, grad_cam(host, image, 2).heat),
                        (effective_receptive_field(model, image[None], "layer1", draws=2),
                         effective_receptive_field(host, image[None], "layer1", draws=2))]:
        assert isinstance(there, np.ndarray)
        np.testing.assert_allclose(there, here, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("call", "words"), [
    (lambda m, x: saliency(m, x[:, :7]), r"an image of shape \(1, 7, 8\) for a model that reads \(1, 8, 8\)"),
    (lambda m, x: saliency(m, x, 6), "target=6: the model has 6 classes, 0 to 5"),
    (lambda m, x: saliency(m, x, -1), "target=-1"),
    (lambda m, x: grad_cam(m, x, layer="layer9"), "no layer 'layer9'; its layers are conv1, bn1, "),
    (lambda m, x: grad_cam(m, x, layer="linear"), r"linear gives \(6,\); by default it takes layer3.2.relu"),
    (lambda m, x: effective_receptive_field(m, x[None], "layer3", (2, 0)), r"position \(2, 0\) is outside the layer's map"),
    (lambda m, x: saliency(Sequential([Conv2d(1)], (1, 8, 8)), x), "attribution needs one number a class"),
    (lambda m, x: grad_cam(Sequential([Flatten(), Linear(2)], (1, 8, 8)), x), "no layer that gives an image")])
def test_what_does_not_fit_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call(mc.models.resnet20(6, (1, 8, 8)), np.zeros((1, 8, 8)))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
def test_enlarging_against_pytorch(p, q, h, w):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    image = np.random.default_rng(0).standard_normal((p, q))
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None, None], (h, w), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(attribution.enlarge(image, (h, w)), expected[0, 0].numpy(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- heatmaps
def test_heatmaps(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    colours = heatmaps.heat_colours(values)
    brightness = colours @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness.ravel()) > 20).all()                     # more is lighter
    assert np.array_equal(colours[1, 1], (252, 255, 164))
    assert np.array_equal(heatmaps.heat_colours(np.zeros((2, 2))), np.broadcast_to((8, 8, 40), (2, 2, 3)))
    over = heatmaps.overlay(np.full((1, 2, 2), 200, np.uint8), values)
    assert np.array_equal(over[1, 1], (252, 255, 164)) and np.array_equal(over[0, 0], (120, 120, 120))
    framed = heatmaps.framed(over, (slice(0, 1), slice(1, 2)))
    assert framed.shape == (256, 256, 3)
    assert (framed[0, 128:] == 255).all() and (framed[:128, 255] == 255).all() and (framed[64, 192] == over[0, 1]).all()
    assert (framed[64, 64] == over[0, 0]).all()
    heatmaps.write_png(tmp_path / "a.png", framed)
    assert np.array_equal(np.asarray(image_module.open(tmp_path / "a.png")), framed)
    assert (heatmaps.in_colour(np.array([10, 20], np.uint8)[:, None, None]) == 15).all()


def test_a_vector_and_a_pooled_map_have_fields():
    model = Sequential([MaxPool2d(2), GlobalAvgPool2d(), Linear(2)], (1, 6, 8))
    fields = receptive_fields(model)
    assert fields["0"].size == (2, 2) and fields["1"].box() == fields["2"].box() == (slice(0, 6), slice(0, 8))
    effective = effective_receptive_field(model, RNG.standard_normal((1, 1, 6, 8)).astype(np.float32), "2", draws=1)
    assert (effective > 0).sum() == 12                                  # each window's winner
