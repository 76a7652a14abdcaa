"""Train ResNet-20 on CIFAR-10 by the paper's recipe, with minicnn and with PyTorch, on the same device and the same batches.

    python benchmarks/train_cifar10.py FOLDER --root cifar10-jpeg.tar.xz --minutes 9 --cuda-graph        begin, or go on
    python benchmarks/train_cifar10.py FOLDER --root cifar10-jpeg.tar.xz --minutes 9 --pytorch

Each call trains for so many minutes, saves into FOLDER, and is repeated until all epochs are done; FOLDER/results.json then has the
error on the 10,000 test images and the seconds of training, of each library. Both begin with the same weights and see the same
augmented images in the same order; what they do with them is their own.

Recipe (He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2): batch 128, SGD with momentum 0.9 and weight
decay 1e-4, learning rate 0.1, a tenth from half of the steps on and a hundredth from three quarters on; images shifted by up to 4
pixels and flipped. 200 epochs by default, the paper's 64,000 steps being 164. Both use Nesterov's momentum, as minicnn's trainer
does.
"""
from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minicnn import backend, train
from minicnn.bench import results
from minicnn.threads import cores

RECIPE = {"batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "step", "warmup": 0.0, "shift": 4,
          "flip": True}


class TimeIsUp(Exception):
    """The rest waits for the next call."""


def ours(args: argparse.Namespace, until: float) -> dict[str, Any] | None:
    """Go on with our run in FOLDER, or begin it; the results once it is done."""
    folder = args.folder / "minicnn"
    try:
        run = (train.resume(folder) if (folder / "checkpoint.npz").exists() else
               train.begin(args.data, args.root, model=args.model, device=args.device, out=folder, epochs=args.epochs,
                           precision=args.precision, cuda_graph=args.cuda_graph, **RECIPE))
    except (ValueError, OSError, backend.BackendUnavailable) as error:
        raise SystemExit(f"train_cifar10.py: {error}") from None

    def look(trainer: train.Trainer) -> None:
        tell("minicnn", trainer.history[-1])
        if time.monotonic() > until and not run.finished:
            raise TimeIsUp

    before = seconds_so_far(args.folder, "minicnn")
    start = time.monotonic()
    try:
        run.fit(on_epoch=look)
    except TimeIsUp:
        pass
    finally:
        keep(args.folder, "minicnn", seconds=before + time.monotonic() - start, epochs=run.trainer.epoch)
    if not run.finished:
        return None
    found = run.evaluation()
    return {"error": 1 - found.accuracy, "right": found.correct, "of": len(found.labels), "device": run.about["device"]}


def pytorch(args: argparse.Namespace, until: float) -> dict[str, Any] | None:
    """The same with PyTorch, from the batches and the first weights of a trainer of ours that makes no step."""
    torch: Any = importlib.import_module("torch")
    translate = importlib.import_module("engine_pytorch").translate
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    device = "cuda" if args.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    train_set, test_set = train.read_data(args.data, args.root)
    config = train.Config(epochs=args.epochs, **RECIPE)
    built = train.models.build(args.model, len(train_set.classes), train_set.images.shape[1:])
    batches = train.Trainer(built, train_set, test_set, config)
    model = translate(built).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=True)
    checkpoint = args.folder / "pytorch.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        batches.epoch = state["epoch"]

    def there(array: np.ndarray[Any, Any]) -> Any:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def right() -> int:
        model.eval()
        with torch.inference_mode():
            return sum(int((model(there(batches.normalize(test_set.images[i:i + 256], np.float32))).argmax(1).cpu().numpy()
                            == test_set.labels[i:i + 256]).sum()) for i in range(0, len(test_set), 256))

    before = seconds_so_far(args.folder, "PyTorch")
    start = time.monotonic()
    while batches.epoch < config.epochs and time.monotonic() < until:
        model.train()
        for step, (inputs, labels) in enumerate(batches._inputs()):
            for group in optimizer.param_groups:
                group["lr"] = batches.learning_rate(batches.epoch * batches.steps + step)
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(there(inputs).contiguous(memory_format=torch.channels_last))
            torch.nn.functional.cross_entropy(logits, there(labels)).backward()
            optimizer.step()
        batches.epoch += 1
        tell("PyTorch", {"epoch": batches.epoch, "test_accuracy": right() / len(test_set)})
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": batches.epoch}, checkpoint)
        keep(args.folder, "PyTorch", seconds=before + time.monotonic() - start, epochs=batches.epoch)
    if batches.epoch < config.epochs:
        return None
    count = right()
    return {"error": 1 - count / len(test_set), "right": count, "of": len(test_set), "device": device,
            "version": str(torch.__version__)}


# ---------------------------------------------------------------- what is kept
def kept(folder: Path) -> dict[str, Any]:
    """FOLDER/results.json, so far as there is one."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def seconds_so_far(folder: Path, library: str) -> float:
    """Of training in the calls before."""
    return float(kept(folder).get(library, {}).get("seconds", 0.0))


def keep(folder: Path, library: str, **more: Any) -> None:
    """Add to FOLDER/results.json."""
    found = kept(folder)
    found[library] = {**found.get(library, {}), **more}
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")


def tell(library: str, row: dict[str, Any]) -> None:
    print(f"{library} epoch {row['epoch']}: {100 * row['test_accuracy']:.2f} % of the test images", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train ResNet-20 on CIFAR-10 by the paper's recipe, in parts.")
    parser.add_argument("folder", type=Path, help="where the run is kept, and gone on with")
    parser.add_argument("--root", help="the images: CIFAR-10's archive, or the copy as image files")
    parser.add_argument("--data", default="cifar10", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="resnet20", help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call; it ends with the epoch in which they are over")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--cuda-graph", action="store_true", help="capture minicnn's steps: a small model waits for Python else")
    parser.add_argument("--pytorch", action="store_true", help="PyTorch in place of minicnn")
    parser.add_argument("--commit", help="which commit this is, where the files lie without their history")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device != "cpu" and backend.cuda_status().available
    surroundings = results.environment(cores(), ["cuda" if on_gpu else "cpu"]) | ({"commit": args.commit} if args.commit else {})
    keep(args.folder, "setting", **surroundings | {"epochs": args.epochs, "precision": args.precision,
                                               "cuda_graph": args.cuda_graph, "recipe": RECIPE})
    library: str = "PyTorch" if args.pytorch else "minicnn"
    part: Callable[..., dict[str, Any] | None] = pytorch if args.pytorch else ours
    done: dict[str, Any] | None = part(args, time.monotonic() + 60 * args.minutes)
    if done is None:
        print("the time is up; the same command goes on")
        return 0
    keep(args.folder, library, **done)
    print(f"{library}: {100 * done['error']:.2f} % wrong ({done['of'] - done['right']} of {done['of']}), "
          f"in {seconds_so_far(args.folder, library):.0f} s of training")
    return 0


if __name__ == "__main__":
    sys.exit(main())
