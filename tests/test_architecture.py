"""The shape of the package: rooms whose imports only go down, two libraries at import, the public names, docstrings."""
import ast
import functools
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minicnn as mc

PACKAGE = Path(mc.__file__).parent
REPOSITORY = PACKAGE.parent

# From the top down. A room is a module or a subpackage; it may import from rooms further down, and inside itself. "__init__" is the
# package's own names: those above it are programs that use the package as anybody does.
ROOMS = ["__main__", "cli", "study", "bench", "train", "accelerator", "transfer", "plots", "export", "__init__", "data", "models",
         "weights",
         "testing", "layers", "optim", "initialization", "ops", "kernels", "autograd", "threads", "memory", "backend"]
REQUIRED = {"numpy", "threadpoolctl"}
OPTIONAL = ["cupy", "cupyx", "torch", "hypothesis", "sklearn", "scipy", "matplotlib", "PIL", "tqdm", "rich", "safetensors", "onnx",
            "latex2mathml", "selenium", "pytest"]

# The one module that another library may be imported on top of: nothing else of the package imports it on its own.
ON_TOP_OF = {"minicnn.testing.strategies": {"hypothesis"}}


@functools.cache
def trees():
    """{dotted module name: its syntax tree}; the package itself is "minicnn.__init__", a subpackage has its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts if len(parts) == 2 or parts[-1] != "__init__" else parts[:-1])
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def room(module):
    return module.split(".")[1]


def imported(tree, module, names):
    """Every module that the tree imports, wherever in it, lazily too; those of the package as modules, not names of modules."""
    package = module if any(name.startswith(f"{module}.") for name in names) else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in names else base, node
        elif (isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
              and isinstance(node.args[0], ast.Constant)):
            yield node.args[0].value, node


def package_imports():
    """(importing module, imported module of the package)"""
    names = set(trees())
    for module, tree in trees().items():
        for target, _ in imported(tree, module, names):
            target = "minicnn.__init__" if target == "minicnn" else target
            if target.startswith("minicnn."):
                yield module, target


# ---------------------------------------------------------------- rooms
def test_every_module_has_a_room():
    assert {room(module) for module in trees()} <= set(ROOMS), "give a new module its place in ROOMS"
    assert {"backend", "autograd", "kernels", "ops", "layers", "optim", "models", "weights"} <= {room(module) for module in trees()}


def upward(pairs):
    return [f"{module} imports {target}" for module, target in pairs if ROOMS.index(room(target)) < ROOMS.index(room(module))]


def test_imports_only_go_down():
    pairs = list(package_imports())
    assert len(pairs) > 40
    assert upward(pairs) == []


def test_an_import_upwards_would_be_seen():
    names = set(trees())
    for line, target in [("from minicnn.layers import Conv2d", "minicnn.layers"), ("from minicnn import layers", "minicnn.layers"),
                         ("def f():\n    from ..models import resnet", "minicnn.models.resnet"),
                         ("from .. import Tensor", "minicnn.__init__"), ("from minicnn import Tensor", "minicnn.__init__"),
                         ("import minicnn.models.vgg as v", "minicnn.models.vgg"), ("import minicnn", "minicnn.__init__"),
                         ("importlib.import_module('minicnn.optim')", "minicnn.optim")]:
        found = [t for t, _ in imported(ast.parse(line), "minicnn.ops.conv", names)]
        assert [t if t != "minicnn" else "minicnn.__init__" for t in found] == [target], line
        assert upward([("minicnn.ops.conv", target)])


def test_no_modules_import_each_other():
    graph = {}
    for module, target in package_imports():
        graph.setdefault(module, set()).add(target)
    order = list(graphlib.TopologicalSorter(graph).static_order())          # CycleError names the circle
    assert order.index("minicnn.backend") < order.index("minicnn.autograd") < order.index("minicnn.layers")


def test_kernels_know_arrays_alone_and_the_tape_no_operation():
    for module, target in package_imports():
        if room(module) == "kernels":
            below = ("kernels", "backend", "memory", "threads")
            assert room(target) in below, f"{module} imports {target}: a kernel is arrays -> arrays"
        if room(module) in ("autograd", "initialization"):
            assert room(target) == "backend", f"{module} imports {target}"


# ---------------------------------------------------------------- other libraries
def lazily(tree):
    """The nodes inside functions, and under `if TYPE_CHECKING`."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) or isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside.update(ast.walk(node))
    return inside


def test_other_libraries_are_imported_where_they_are_needed():
    allowed = REQUIRED | {"minicnn"} | set(sys.stdlib_module_names)
    for module, tree in trees().items():
        lazy = lazily(tree)
        for target, node in imported(tree, module, set(trees())):
            top = target.split(".")[0]
            assert top in allowed | ON_TOP_OF.get(module, set()) or node in lazy, (
                f"{module}, line {node.lineno}: import {top} inside the function that needs it")


def test_cupy_is_imported_by_backend_alone():
    seen = {module for module, tree in trees().items() for target, _ in imported(tree, module, set(trees()))
            if target.split(".")[0] in ("cupy", "cupyx")}
    assert seen == {"minicnn.backend"}
    for module, tree in trees().items():            # nor by its name, which importlib or sys.modules would take
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert module == "minicnn.backend" or not words & {"cupy", "cupyx"}, module


def fresh_python(code):
    """What a new interpreter prints, with no help from this one's imports."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_minicnn_brings_in_no_optional_library():
    loaded = fresh_python("import sys, minicnn; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "minicnn" in loaded
    assert set(OPTIONAL) & set(loaded) == set()


def test_every_module_imports_without_any_optional_library():
    modules = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "minicnn.") if m.name not in {*ON_TOP_OF, "minicnn.__main__"}]
    assert len(modules) > 20
    fresh_python(f"import sys\nfor name in {OPTIONAL}: sys.modules[name] = None\n" + "\n".join(f"import {m}" for m in modules))


# ---------------------------------------------------------------- the public surface
# As declared in the design: an argument may be added behind, with a default; none renamed, reordered or given another default.
PUBLIC = """
Tensor(array, requires_grad=False)
Tensor.numpy(self)
Tensor.detach(self)
Tensor.item(self)
Tensor.to(self, device)
Tensor.sum(self, axis=None, keepdims=False)
Tensor.mean(self, axis=None, keepdims=False)
Tensor.max(self, axis=None, keepdims=False)
Tensor.var(self, axis=None, ddof=0, keepdims=False)
Tensor.exp(self)
Tensor.log(self)
Tensor.sqrt(self)
Tensor.reshape(self, *shape)
Tensor.transpose(self, *axes)
Tensor.backward(self, grad=None, retain_graph=False)
grad(outputs, inputs, grad_outputs=None, *, create_graph=False, retain_graph=None)
no_grad()
op(forward=None)
ops.conv2d(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1)
ops.max_pool2d(x, kernel_size=2, stride=None, padding=0, ceil_mode=False)
ops.avg_pool2d(x, kernel_size=2, stride=None, padding=0, ceil_mode=False)
ops.adaptive_avg_pool2d(x, output_size)
ops.global_avg_pool2d(x)
ops.batch_norm(x, weight, bias, running_mean, running_var, *, train, momentum=0.1, eps=1e-5)
ops.linear(x, weight, bias=None)
ops.relu(x)
ops.sigmoid(x)
ops.simam(x, eps=1e-4)
ops.softmax(x, axis=-1)
ops.log_softmax(x, axis=-1)
ops.cross_entropy(logits, labels, label_smoothing=0.0)
ops.dropout(x, p, *, train, rng=None)
ops.matmul(a, b)
ops.concatenate(arrays, axis=0)
ops.pad(x, pad_width)
ops.where(condition, a, b)
ops.maximum(a, b)
ops.minimum(a, b)
ops.exp(x)
ops.log(x)
ops.sqrt(x)
im2col(array, kernel_size, stride=1, padding=0, dilation=1)
col2im(columns, in_size, kernel_size, stride=1, padding=0, dilation=1)
layers.Conv2d(out_channels, kernel_size=3, *, stride=1, padding=0, dilation=1, groups=1, bias=True)
layers.BatchNorm2d(momentum=0.1, eps=1e-5)
layers.Linear(out_features)
layers.ReLU()
layers.MaxPool2d(kernel_size=2, stride=None, padding=0)
layers.AvgPool2d(kernel_size=2, stride=None, padding=0)
layers.AdaptiveAvgPool2d(output_size)
layers.GlobalAvgPool2d()
layers.Flatten()
layers.Dropout(p=0.5)
layers.SimAM(e_lambda=1e-4)
layers.Residual(body, shortcut=[])
layers.Branches(*branches)
layers.Sequential(layers, in_shape=None, seed=0)
layers.Layer.build(self, in_shape, rng, dtype)
layers.Layer.freeze(self, parameters=True, statistics=True)
layers.Layer.__call__(self, x, train=False, rng=None)
layers.Layer.parameters(self)
layers.Layer.named_parameters(self)
layers.Layer.state_dict(self)
layers.Layer.load_state_dict(self, state, strict=True)
layers.Layer.astype(self, dtype)
layers.Layer.to(self, device)
layers.Layer.summary(self)
models.vgg16(num_classes=1000, in_shape=(3, 224, 224))
models.vgg.vgg(depths, batch_norm, num_classes=1000, in_shape=(3, 224, 224), *, seed=0, dtype, dropout=0.5, hidden=4096, pool=7)
models.resnet18(num_classes=1000, in_shape=(3, 224, 224))
models.resnet.resnet(block, depths, widths, num_classes=1000, in_shape=(3, 224, 224), *, seed=0, dtype)
models.resnet20(num_classes=10, in_shape=(3, 32, 32))
models.resnet.cifar_resnet(depth, num_classes=10, in_shape=(3, 32, 32), *, shortcut="A", seed=0, dtype)
models.nin(num_classes=10, in_shape=(3, 32, 32), *, seed=0, dtype, dropout=0.5)
models.googlenet(num_classes=1000, in_shape=(3, 224, 224), *, branch5x5=5, seed=0, dtype, dropout=0.2)
optim.SGD(params, lr, momentum=0.0, weight_decay=0.0, nesterov=False)
optim.AdamW(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
optim.Optimizer.step(self)
optim.Optimizer.zero_grad(self)
optim.Optimizer.state_dict(self)
optim.Optimizer.load_state_dict(self, state)
testing.gradcheck(fn, inputs, *, eps=1e-6, rtol=1e-5, atol=1e-7, seed=0, elementwise=False, raise_exception=True)
testing.gradgradcheck(fn, inputs, *, eps=1e-6, rtol=1e-5, atol=1e-7, seed=0, elementwise=False, raise_exception=True)
testing.check_layer(layer, in_shape, *, train=False)
study.record(fused=False)
save(path, state)
load(path)
data.digits()
data.mnist(root)
data.cifar10(root)
data.image_folder(root)
"""


def declared(line):
    """The parameters of "name(a, b=1)"; one whose default is the engine's own (a dtype, a sentinel) has none here."""
    name, _, parameters = line.partition("(")
    return name, inspect.signature(eval(f"lambda {parameters.removesuffix(')')}: None")).parameters


@pytest.mark.parametrize("line", PUBLIC.strip().split("\n"))
def test_a_public_name_takes_what_the_design_says(line):
    name, expected = declared(line)
    found = inspect.signature(functools.reduce(getattr, name.split("."), mc)).parameters
    for parameter in expected.values():
        assert parameter.name in found, f"{name} takes {list(found)}"
        actual = found[parameter.name]
        assert actual.kind == parameter.kind
        assert parameter.default is parameter.empty or actual.default == parameter.default
    positional = [p.name for p in expected.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD][:len(positional)] == positional
    required = {p.name for p in found.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert required <= {p.name for p in expected.values() if p.default is p.empty}, "what is added has a default"


def test_the_other_public_names():
    t = mc.Tensor([1.0])
    assert all(hasattr(t, name) for name in ("data", "grad", "shape", "ndim", "dtype"))
    depths = {"vgg{}": (11, 13, 16, 19), "vgg{}_bn": (11, 13, 16, 19), "resnet{}": (18, 34, 50, 101, 152, 20, 32, 44, 56, 110)}
    for pattern, numbers in depths.items():
        assert all(callable(getattr(mc.models, pattern.format(n))) for n in numbers)
    assert isinstance(mc.op(lambda x: x), mc.Op)
    assert mc.__version__
    assert all(hasattr(mc, name) for name in mc.__all__)
    assert {"Tensor", "grad", "no_grad", "op", "ops", "im2col", "col2im", "layers", "models", "optim", "testing", "save", "load",
            "data"} <= set(mc.__all__)


def test_the_checkers_public_names():
    pytest.importorskip("hypothesis", reason="the strategies need hypothesis")
    import minicnn.testing.strategies  # noqa: F401 (it is there)
    assert issubclass(mc.testing.GradcheckError, AssertionError)
    names = [specimen[0] for specimen in mc.testing.specimens]
    assert len(names) == len(set(names))
    assert sum(not specimen[3] for specimen in mc.testing.specimens) >= 20


# ---------------------------------------------------------------- docstrings
def decorators(function):
    return [ast.unparse(decorator) for decorator in function.decorator_list]


def says_itself(function):
    """A backward, described by its op, which holds the derivative; an overload."""
    return any(".backward(" in d or d == "overload" for d in decorators(function))


def says_itself_in_a_class(method, owner):
    """A property, one line that hands on to what its name says, or another's version of a method that is documented there."""
    inherited = (getattr(base, method.name, None) for base in getattr(owner, "__mro__", ())[1:])
    return (any(d == "property" or d.endswith(".setter") for d in decorators(method)) or isinstance(method.body[0], ast.Return)
            or any(getattr(function, "__doc__", None) for function in inherited))


def public(nodes, *kinds):
    return [node for node in nodes if isinstance(node, kinds) and not node.name.startswith("_")]


def module_of(name):
    """The module itself, which knows what its classes inherit; None where it cannot be imported here."""
    try:
        return importlib.import_module(name.removesuffix(".__init__"))
    except ImportError:
        return None


def undocumented(module, tree):
    """The names of what lacks a docstring: the module, its public functions and classes, their public methods."""
    if not ast.get_docstring(tree):
        yield module
    for function in public(tree.body, ast.FunctionDef):
        if not (ast.get_docstring(function) or says_itself(function)):
            yield f"{module}.{function.name}"
    for cls in public(tree.body, ast.ClassDef):
        if not ast.get_docstring(cls):
            yield f"{module}.{cls.name}"
        owner = getattr(module_of(module), cls.name, None)
        for method in public(cls.body, ast.FunctionDef):
            if not (ast.get_docstring(method) or says_itself_in_a_class(method, owner)):
                yield f"{module}.{cls.name}.{method.name}"


def test_everything_public_has_a_docstring():
    assert [name for module, tree in trees().items() for name in undocumented(module, tree)] == []


def test_a_missing_docstring_would_be_seen():
    source = '"""Doc."""\ndef f(): pass\nclass C:\n    def m(self):\n        x = 1\n    def _p(self): pass\ndef _g(): pass\n'
    assert list(undocumented("somewhere", ast.parse(source))) == ["somewhere.f", "somewhere.C", "somewhere.C.m"]
    assert list(undocumented("somewhere", ast.parse("x = 1"))) == ["somewhere"]


# ---------------------------------------------------------------- no file leans on the machine it was written on
def test_no_file_names_an_absolute_path_of_somebodys_machine():
    somewhere = re.compile(r"""["'`\s(=](/(?:home|root|work|Users)/\w)""")
    for path in sorted(REPOSITORY.rglob("*")):
        if path.suffix in (".py", ".md", ".cfg", ".toml") and not {".venv", "build"} & set(path.relative_to(REPOSITORY).parts):
            assert not somewhere.search(path.read_text(encoding="utf-8")), path
