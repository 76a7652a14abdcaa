"""The training loop, what it measures, and runs: to the bit the same, wherever they are stopped."""
import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import standin

import minicnn as mc
from minicnn import models, plots, train
from minicnn.data import DataError, ImageSet, Normalize
from minicnn.kernels import update
from minicnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU, Sequential
from minicnn.train import Config, Trainer
from minicnn.weights import WeightsError

IMAGE, CLASSES = (1, 6, 6), ("ink", "paper", "scissors")


def tiny(num_classes=3, in_shape=IMAGE, **options):
    """A model with all that a checkpoint must hold: running statistics, dropout, and parameters of several shapes."""
    return Sequential([Conv2d(4, 3, stride=2, bias=False), BatchNorm2d(), ReLU(), Dropout(0.3), Flatten(), Linear(num_classes)],
                      in_shape, **options)


def image_set(n, seed=0, image=IMAGE, classes=CLASSES, name="squares"):
    """Noise in which each class has a brighter corner of its own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(classes)
    images = rng.integers(0, 160, (n, *image))
    for i, label in enumerate(labels):
        images[i, :, 3 * (label // 2):, 3 * (label % 2):][:, :3, :3] += 80
    return ImageSet(images.astype(np.uint8), labels.astype(np.int64), tuple(classes), name)


SETS = image_set(46, 1, name="squares train"), image_set(20, 2, name="squares test")


@pytest.fixture
def squares(monkeypatch, tmp_path):
    """`train.begin("squares", model="tiny")` in an empty folder; resumed and loaded like any other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    monkeypatch.setattr(train, "NAMES", ("squares",))
    monkeypatch.setattr(train, "read_data", lambda *_: SETS)
    return tmp_path


def begin(out, **options):
    options = {"epochs": 3, "batch_size": 8, "shift": 1, "flip": True, "seed": 5, **options}
    return train.begin("squares", model="tiny", out=out, **options)


STEPS = 5       # of an epoch: 46 images in batches of 8, the last 6 left out


def leavings(folder):
    """All that a run leaves, in a form that compares."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jsonl", ".json")}
    for name in ("model.npz", "checkpoint.npz"):
        with np.load(folder / name) as archive:
            found.update({f"{name}/{key}": (archive[key].dtype, archive[key].tobytes()) for key in archive.files})
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What is left by a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._BUILDERS, "tiny", tiny)
        patch.setattr(train, "NAMES", ("squares",))
        patch.setattr(train, "read_data", lambda *_: SETS)
        run = begin(folder)
        run.fit()
        run.draw()
    return leavings(folder)


def same_as(reference, folder):
    """What is in the folder is what it should be; the pictures, which take a while to draw, only where they are there."""
    found = leavings(folder)
    assert {name for name in reference if name.endswith(".png")} | found.keys() == reference.keys()
    assert [name for name in found if found[name] != reference[name]] == []


# ---------------------------------------------------------------- the learning rate
def test_cosine_rises_to_the_rate_and_falls_to_zero():
    rate = train.learning_rate(Config(epochs=10, lr=0.4, warmup=2), steps=5)
    rates = [rate(step) for step in range(51)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[10] < 0.4                        # the cosine has begun to fall under the warm-up
    assert rates[10] == pytest.approx(0.2 * (1 + np.cos(np.pi / 5)))
    assert np.diff(rates[:11]) == pytest.approx((rates[10] - 0.04) / 10)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[50] == pytest.approx(0)


def test_step_schedule_falls_at_half_and_three_quarters():
    rate = train.learning_rate(Config(epochs=8, lr=1.0, schedule="step", warmup=0), steps=3)
    assert [rate(step) for step in (0, 11)] == [1.0, 1.0]
    assert [rate(step) for step in (12, 17, 18, 23)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_constant_schedule_with_half_an_epoch_of_warm_up():
    rate = train.learning_rate(Config(epochs=2, lr=1.0, schedule="constant", warmup=0.5), steps=10)
    assert [rate(step) for step in (0, 1, 4, 5, 19)] == pytest.approx([0.1, 0.28, 0.82, 1.0, 1.0])


@pytest.mark.parametrize("setting, words", [
    ({"epochs": 0}, "epochs=0 must be at least 1"), ({"batch_size": 0}, "batch_size=0"), ({"lr": -1.0}, "lr=-1.0 must be at"),
    ({"lr": float("nan")}, "lr=nan"), ({"lr": float("inf")}, "finite"), ({"momentum": 1.0}, "below 1"), ({"seed": -1}, "seed=-1"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"), ({"label_smoothing": 1.5}, "label_smoothing=1.5")])
def test_config_refuses(setting, words):
    with pytest.raises(ValueError, match=words):
        Config(**setting)


# ---------------------------------------------------------------- evaluation
def test_confusion_matrix_counts():
    labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 2, 1, 2, 1, 2])
    assert train.confusion_matrix(labels, predictions, 4).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]


def test_evaluate_is_inference_image_by_image():
    model, normalize = tiny(seed=3, dtype=np.float64), Normalize((0.3,), (0.2,))
    model(normalize(SETS[0].images, np.float64), train=True)                # moves the statistics
    before = model.state_dict()
    found = train.evaluate(model, SETS[1], normalize, batch_size=7)         # 20 = 7 + 7 + 6
    losses = []
    for i, (image, label) in enumerate(zip(SETS[1].images, SETS[1].labels, strict=True)):
        z = model(((image / 255 - 0.3) / 0.2)[None]).numpy()[0]
        p = np.exp(z) / np.exp(z).sum()
        losses.append(-np.log(p[label]))
        assert found.predictions[i] == p.argmax()
        assert found.confidences[i] == pytest.approx(p.max(), rel=1e-12)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert found.correct == (found.predictions == SETS[1].labels).sum()
    assert str(found) == f"accuracy {5 * found.correct:.2f} % ({found.correct} of 20)"
    assert all(np.array_equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert train.predict(model, SETS[1].images, normalize).max(axis=1) == pytest.approx(found.confidences, rel=1e-12)


def test_evaluation_and_prediction_record_nothing(monkeypatch):
    taped, softmax = [], mc.ops.softmax
    monkeypatch.setattr(mc.ops, "softmax", lambda logits: taped.append(logits.requires_grad) or softmax(logits))
    train.evaluate(tiny(), SETS[1], Normalize((0,), (1,)))
    train.predict(tiny(), SETS[1].images, Normalize((0,), (1,)))
    assert taped == [False, False]


@pytest.mark.parametrize("dataset, words", [
    (image_set(6, image=(1, 5, 6)), r"images \(1, 5, 6\)"), (image_set(6, classes=("a", "b")), "2 classes"),
    (image_set(0), "no images")])
def test_data_that_do_not_fit_the_model(dataset, words):
    with pytest.raises(ValueError, match=words):
        train.evaluate(tiny(), dataset, Normalize((0,), (1,)))
    with pytest.raises(ValueError, match=words):
        Trainer(tiny(), SETS[0], dataset, Config())


def test_a_channel_without_contrast_is_normalised():
    dull = ImageSet(np.full((4, 2, 3, 3), [[[7]], [[9]]], np.uint8), np.zeros(4, np.int64), ("a",), "dull")
    assert train.normalization_of(dull)(dull.images, np.float64) == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- the loop
def test_a_step_is_the_optimizer_on_the_loss_of_the_augmented_batch():
    """The loop against the same few steps written out."""
    config = Config(epochs=1, batch_size=8, lr=0.05, warmup=0, schedule="constant", shift=1, flip=True, label_smoothing=0.1, seed=5)
    trainer = train.train(tiny(seed=5, dtype=np.float64), *SETS, config)
    model, normalize = tiny(seed=5, dtype=np.float64), train.normalization_of(SETS[0])
    optimizer = mc.optim.SGD(model.parameters(), 0.05, 0.9, 5e-4, nesterov=True)
    losses, hits = [], 0
    for images, labels in mc.data.batches(SETS[0], 8, seed=5, epoch=0, drop_last=True,
                                          augmentation=lambda images, rng: mc.data.augment(images, rng, pad=1, flip=True)):
        logits = model(normalize(images, np.float64), train=True)
        loss = mc.ops.cross_entropy(logits, labels, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits += (logits.numpy().argmax(1) == labels).sum()
    assert len(losses) == STEPS
    ours, theirs = trainer.model.state_dict(), model.state_dict()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    [row] = trainer.history
    assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert row["train_accuracy"] == pytest.approx(hits / 40)
    assert row["test_correct"] == train.evaluate(model, SETS[1], normalize).correct
    assert (row["epoch"], row["steps"], row["lr"]) == (1, 5, 0.05)


def test_it_learns():
    trainer = train.train(tiny(), *SETS, Config(epochs=20, batch_size=8, lr=0.05))
    assert trainer.evaluation.correct >= 18
    assert trainer.history[-1]["train_loss"] < 0.5 * trainer.history[0]["train_loss"]


def test_a_set_smaller_than_a_batch_is_one_batch():
    trainer = train.train(tiny(), *SETS, Config(epochs=2, batch_size=64))
    assert trainer.steps == 1 and len(trainer.history) == 2


def test_running_averages_are_of_this_epoch_so_far():
    seen = []
    trainer = Trainer(tiny(dtype=np.float64), *SETS, Config(epochs=2, batch_size=8))
    losses = []
    step = trainer._train_step
    original = mc.ops.softmax_cross_entropy
    def spy(logits, labels, *rest):
        loss = original(logits, labels, *rest)
        losses.append(loss.item())
        return loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mc.ops, "softmax_cross_entropy", spy)
        for epoch in range(2):
            for k, (inputs, labels) in enumerate(trainer._inputs()):
                step(inputs, labels)
                seen.append((trainer.running()[0], np.mean(losses[-k - 1:])))
            trainer._end_epoch(train.Evaluation(SETS[1].labels, SETS[1].labels, np.ones(20), 0.0))
            assert trainer.epoch == epoch + 1
    assert all(found == pytest.approx(true) for found, true in seen) and len(seen) == 10


def test_a_loss_that_diverges_is_told():
    with pytest.raises(FloatingPointError, match=r"behind epoch 1: the learning rate 1e\+30 is too high.*--lr 1e\+29"):
        train.train(tiny(), *SETS, Config(epochs=2, batch_size=8, lr=1e30, warmup=0))


def test_the_host_waits_for_the_device_by_the_epoch_not_by_the_step():
    """On the stand-in, which counts: twice the steps, the same number of waits."""
    def waits(batch_size):
        model = tiny().to("standin")
        with standin.host_syncs() as syncs:
            trainer = Trainer(model, *SETS, Config(epochs=1, batch_size=batch_size))
            trainer.fit()
        assert trainer.evaluation.predictions.dtype == np.int64
        return trainer.steps, len(syncs)
    (few, waits_few), (many, waits_many) = waits(8), waits(2)
    assert (few, many) == (5, 23) and waits_few == waits_many <= 6


def test_devices_train_alike():
    config = Config(epochs=2, batch_size=8, shift=1)
    here, there = (train.train(tiny(dtype=np.float64).to(device), *SETS, config) for device in ("cpu", "standin"))
    for name, value in here.model.state_dict().items():
        assert there.model.state_dict()[name] == pytest.approx(value, rel=1e-10, abs=1e-12)
    assert there.history[-1]["train_loss"] == pytest.approx(here.history[-1]["train_loss"], rel=1e-10)


def test_float32_stays_float32():
    trainer = train.train(tiny(), *SETS, Config(epochs=1, batch_size=8))
    assert {value.dtype.name for name, value in trainer.model.state_dict().items() if "batches" not in name} == {"float32"}
    assert trainer._sums.dtype == np.float32
    assert trainer.optimizer.memory[0]["velocity"].dtype == np.float32


# ---------------------------------------------------------------- Ctrl-C
def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), train.uninterrupted():
        press()
        press()
        done.append("all of it")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with train.uninterrupted():
        pass


def test_ctrl_c_is_left_alone_where_it_is_ignored_or_not_ours():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.uninterrupted():
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    problems = []
    def elsewhere():
        try:
            with train.uninterrupted():
                pass
        except BaseException as problem:
            problems.append(problem)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not problems


@pytest.mark.parametrize("where", random.Random(0).sample(range(3 * STEPS), 4) + [STEPS - 1])
def test_interrupted_inside_a_step_and_resumed_is_the_same_to_the_bit(squares, reference, where, monkeypatch):
    """Ctrl-C amid the optimiser's work, when half of the parameters have moved."""
    run, steps = begin("run"), iter(range(100))
    move, count = update.in_place, len(run.trainer.optimizer.parameters)
    def in_place(*args):
        move(*args)
        if next(steps) == where * count + 1:
            press()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(update, "in_place", in_place)
        run.fit()
    assert (run.trainer.epoch, run.trainer.step) in (divmod(where + 1, STEPS), (where // STEPS, where % STEPS + 1))
    again = train.resume("run")
    again.fit()
    same_as(reference, squares / "run")


@pytest.mark.parametrize("save_every, last", [(0, 3), (1, 1), (3, 7), (2, 14)])
def test_killed_and_resumed_is_the_same_to_the_bit(squares, reference, save_every, last):
    """Nothing is saved at the end; what was written behind the last checkpoint is done again."""
    class Killed(Exception):
        pass
    def kill(trainer):
        if trainer.epoch * STEPS + trainer.step == last:
            raise Killed
    run = begin("run")
    with pytest.raises(Killed):
        run.fit(on_step=kill, save_every=save_every)
    for half in (".checkpoint-3xq_a7.npz", ".model-3xq_a7.npz", ".metrics-3xq_a7.jsonl", ".curves-3xq_a7.png"):
        (squares / "run" / half).write_bytes(b"half a file")
    (squares / "run" / ".mine-3xq_a7.npz").write_bytes(b"somebody's")
    with open("run/metrics.jsonl", "a") as metrics:
        metrics.write('{"epoch": 99}\n{"epo')
    again = train.resume("run")
    again.fit(save_every=save_every)
    assert [path.name for path in (squares / "run").glob(".*")] == [".mine-3xq_a7.npz"]
    same_as(reference, squares / "run")


@pytest.mark.parametrize("epoch", [0, 2])
def test_interrupted_in_the_evaluation(squares, reference, epoch, monkeypatch):
    run = begin("run")
    original = train.evaluate
    def evaluate(*args):
        if run.trainer.epoch == epoch:
            raise KeyboardInterrupt
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", evaluate)
        run.fit()
    again = train.resume("run")
    assert (again.trainer.epoch, again.trainer.step) == (epoch, STEPS)
    again.fit()
    same_as(reference, squares / "run")


def test_resumed_behind_the_last_epoch_only_draws(squares, reference):
    begin("run").fit()
    again = train.resume("run")
    assert again.finished
    again.fit(on_step=lambda trainer: pytest.fail("no step is left"))
    again.draw()
    same_as(reference, squares / "run")


def test_another_seed_is_another_run(squares, reference):
    run = begin("run", seed=6)
    run.fit()
    run.draw()
    found = leavings(squares / "run")
    assert {"metrics.jsonl", "model.npz/state_dict/0.weight", "curves.png"} <= {n for n in found if found[n] != reference[n]}


KILLED = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_train as t
    from minicnn import models, train
    models._BUILDERS["tiny"] = t.tiny
    train.NAMES, train.read_data = ("squares",), lambda *_: t.SETS
    run = train.resume("run") if len(sys.argv) > 1 else t.begin("run", epochs=60)
    print("ready", flush=True)
    run.fit(on_step=lambda _: time.sleep(0.01), save_every=2)
""")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is of POSIX")
def test_sigkill_of_a_process_at_any_moment(squares):
    """Killed again and again, at random moments of a training that would take 3 seconds, then let through."""
    program = [sys.executable, "-c", KILLED.format(tests=os.path.dirname(__file__))]
    moments, extra, killed = random.Random(1), [], 0
    while killed < 3:
        with subprocess.Popen([*program, *extra], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            threading.Event().wait(moments.uniform(0.05, 0.6))
            child.kill()
        assert child.returncode == -signal.SIGKILL
        extra, killed = ["resume"], killed + 1
        if (squares / "run" / "checkpoint.npz").exists():
            mc.load(squares / "run" / "checkpoint.npz")             # whole, whenever the kill came
    again = train.resume("run")
    assert again.trainer.epoch * STEPS + again.trainer.step >= 4
    again.fit()
    again.draw()
    through = begin("through", epochs=60)
    through.fit()
    through.draw()
    same_as(leavings(squares / "through"), squares / "run")


# ---------------------------------------------------------------- runs and their folders
def test_more_epochs_on_a_constant_schedule_are_as_if_meant_from_the_start(squares):
    begin("long", schedule="constant", epochs=4).fit()
    begin("short", schedule="constant", epochs=2).fit()
    again = train.resume("short", epochs=4)
    assert not again.finished
    again.fit()
    long, short = (mc.load(f"{name}/model.npz")["state_dict"] for name in ("long", "short"))
    assert all(np.array_equal(long[name], short[name]) for name in long)
    about = json.loads((squares / "short" / "config.json").read_text())
    assert about["training"]["epochs"] == 4 and about["epochs_before"] == [2]


def test_more_epochs_on_a_cosine_go_on_along_the_longer_one(squares):
    begin("run", epochs=2).fit()
    run = train.resume("run", epochs=4)
    run.fit()
    rates = [row["lr"] for row in run.trainer.history]
    longer = train.learning_rate(Config(epochs=4), STEPS)
    assert rates[2:] == [longer(3 * STEPS - 1), longer(4 * STEPS - 1)]
    assert [row["epoch"] for row in run.trainer.history] == [1, 2, 3, 4]


def test_epochs_cannot_end_before_now(squares):
    begin("run").fit()
    with pytest.raises(ValueError, match="run is in epoch 4 already, so it cannot end behind epoch 2"):
        train.resume("run", epochs=2)


def test_numbers_of_folders(squares):
    names = [train.begin("squares", model="tiny").folder.name for _ in range(2)]
    (squares / "runs" / "squares-tiny-9").mkdir()
    (squares / "runs" / "squares-tiny-x").mkdir()
    names.append(train.begin("squares", model="tiny").folder.name)
    assert names == ["squares-tiny-1", "squares-tiny-2", "squares-tiny-10"]


def test_runs_that_begin_at_one_moment_have_folders_of_their_own(squares, monkeypatch):
    """Neither sees the other's folder when it looks for a number."""
    class Blind(type(train.RUNS)):
        def glob(self, *_):
            return iter(())
    monkeypatch.setattr(train, "RUNS", Blind("runs"))
    assert [train.begin("squares", model="tiny").folder.name[-1] for _ in range(3)] == ["1", "2", "3"]


def test_nothing_is_written_over(squares):
    (squares / "mine").mkdir()
    (squares / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="mine exists already.*--out$"):
        begin("mine")
    assert [p.name for p in (squares / "mine").iterdir()] == ["thesis.txt"]
    (squares / "empty").mkdir()
    assert begin("empty").folder.name == "empty"
    with pytest.raises(FileExistsError, match="or go on with the run that is there by --resume empty"):
        begin("empty")


def test_a_model_is_used_from_its_file_alone(squares):
    run = begin("run")
    run.fit()
    os.rename("run/model.npz", "elsewhere.npz")
    images = SETS[1].images
    expected = train.predict(run.trainer.model, images, run.trainer.normalize)
    used = train.load_trained(weights="elsewhere.npz")
    assert np.array_equal(train.predict(used.model, images, used.normalize), expected)
    assert used.classes == list(CLASSES)
    bare = {name: np.asarray(value + 1) for name, value in run.trainer.model.state_dict().items()}
    mc.save("bare.npz", bare)
    with pytest.raises(ValueError, match="bare.npz holds weights alone: name the run"):
        train.load_trained(weights="bare.npz")
    assert np.array_equal(train.load_trained("run", "bare.npz").model.state_dict()["5.bias"], bare["5.bias"])
    with pytest.raises(FileNotFoundError, match="run has no model yet"):
        train.load_trained("run")


def test_the_newest_run(squares):
    with pytest.raises(FileNotFoundError, match="train one with `minicnn train`"):
        train.newest_run()
    for i, name in enumerate(["b", "a", "c"]):
        begin(f"runs/{name}", epochs=1).fit()
        os.utime(f"runs/{name}/config.json", (i, i))
    assert train.newest_run().name == "c"
    os.utime("runs/a/model.npz", (2e9, 2e9))
    assert train.load_trained().path.parent.name == "a"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")     # np.load leaves a damaged archive open
@pytest.mark.parametrize("spoil, error, words", [
    (lambda run: (run / "config.json").unlink(), FileNotFoundError, "it has no config.json"),
    (lambda run: (run / "config.json").write_text("{"), WeightsError, "config.json is damaged"),
    (lambda run: (run / "config.json").write_text("{}"), WeightsError, "config.json is damaged.* it lacks classes"),
    (lambda run: (run / "checkpoint.npz").write_bytes((run / "checkpoint.npz").read_bytes()[:900]), WeightsError, "damaged"),
    (lambda run: mc.save(run / "checkpoint.npz", {"a": np.zeros(2)}), WeightsError, "no checkpoint: it lacks"),
    (lambda run: run.rename("moved"), FileNotFoundError, "it does not exist")])
def test_a_spoilt_run(squares, spoil, error, words):
    begin("run", epochs=1).fit()
    spoil(squares / "run")
    with pytest.raises(error, match=words):
        train.resume("run")


def test_changed_data_are_refused(squares, monkeypatch):
    begin("run", epochs=1).fit()
    monkeypatch.setattr(train, "read_data", lambda *_: (SETS[0].subset(range(45)), SETS[1]))
    with pytest.raises(DataError, match="not those that run began with.*begin a new run"):
        train.resume("run", epochs=2)


def test_held_out_images_that_may_have_been_trained_on_are_told(squares, monkeypatch):
    about = begin("run", epochs=1).about
    monkeypatch.setattr(train, "read_data", lambda *_: (SETS[1], SETS[0]))
    with pytest.warns(RuntimeWarning, match="images of squares have changed since the run began: some of the 46"):
        assert len(train.held_out(about)) == 46
    monkeypatch.setattr(train, "only_held_out", lambda *_: SETS[0])
    assert len(train.held_out(about, "other")) == 46            # another source is the user's word


def test_held_out_images_must_have_the_same_classes(squares, monkeypatch):
    run = begin("run", epochs=1)
    assert len(train.held_out(run.about)) == 20
    monkeypatch.setattr(train, "only_held_out", lambda *_: image_set(9, classes=("ink", "scissors", "paper")))
    with pytest.raises(ValueError, match="has the classes ink, scissors, paper, but the model knows ink, paper, scissors"):
        train.held_out(run.about, "other")


@pytest.mark.parametrize("victim", ["metrics.jsonl", "model.npz", "checkpoint.npz"])
def test_a_disk_that_fills_up(squares, reference, victim, monkeypatch):
    """The second epoch cannot be saved: the error says what to do, the first epoch's files are whole, and nothing is lost."""
    run, written = begin("run"), []
    replace = os.replace
    def full(source, target):
        written.append(os.path.basename(target))
        if written.count(victim) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)
        replace(source, target)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device.*--resume run") as caught:
        patch.setattr(os, "replace", full)
        run.fit()
    assert caught.value.errno == errno.ENOSPC
    assert int(mc.load("run/checkpoint.npz")["epoch"]) == 1
    assert not [path for path in (squares / "run").iterdir() if path.name.startswith(".")]
    again = train.resume("run")
    again.fit()
    same_as(reference, squares / "run")


def test_no_folder_is_made_for_a_run_that_cannot_begin(squares):
    with pytest.raises(ValueError, match="no model is called 'tinny'; did you mean 'tiny'"):
        train.begin("squares", model="tinny", out="run")
    with pytest.raises(ValueError, match="epochs=0"):
        begin("run", epochs=0)
    with pytest.raises(ValueError, match="unknown device"):
        begin("run", device="gpu")
    assert not list(squares.iterdir())


def test_unknown_data(tmp_path):
    with pytest.raises(DataError, match=r"no data set 'digts': known are digits, mnist.*does not exist; did you mean 'digits'\?"):
        train.read_data("digts")
    with pytest.raises(DataError, match="--root"):
        train.read_data("cifar10")
    with pytest.raises(ValueError, match="image_size=.* is for a folder of images"):
        train.read_data("digits", None, (8, 8))
    with pytest.raises(DataError, match="holds no image files"):
        train.read_data(str(tmp_path))


def test_defaults_follow_the_data():
    assert train.default_model((1, 8, 8)) == train.default_model((3, 32, 32)) == "resnet20"
    assert train.default_model((3, 224, 224)) == "resnet18"
    for source, image in [("digits", (1, 8, 8)), ("mnist", (1, 28, 28))]:
        assert not train.default_training(source, image).get("flip")        # a mirrored 2 is none
    assert train.default_training("cifar10", (3, 32, 32))["shift"] == 4 and train.default_training("cifar10", (3, 32, 32))["flip"]
    assert train.default_training("flowers", (3, 64, 64))["shift"] == 8
    model = models.build("vgg11_bn", 10, (3, 32, 32), **train.model_options("vgg11_bn", (3, 32, 32)))
    assert model.summary().parameters < 11_000_000
    assert train.model_options("vgg16", (3, 224, 224)) == train.model_options("resnet20", (3, 32, 32)) == {}


def test_fingerprint_sees_every_pixel_label_and_order():
    one, other = SETS
    shuffled = one.subset([*range(1, 46), 0])
    prints = {train.fingerprint(one, other), train.fingerprint(other, one), train.fingerprint(shuffled, other)}
    changed = one.images.copy()
    changed[40, 0, 3, 3] ^= 1
    prints.add(train.fingerprint(ImageSet(changed, one.labels, CLASSES, "x"), other))
    relabelled = one.labels.copy()
    relabelled[7] = (relabelled[7] + 1) % 3
    prints.add(train.fingerprint(ImageSet(one.images, relabelled, CLASSES, "x"), other))
    assert len(prints) == 5
    assert train.fingerprint(one, other) == train.fingerprint(one.subset(range(46)), other)


# ---------------------------------------------------------------- pictures
def drawn(path):
    from PIL import Image
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


ROW = {"train_loss": 1.0, "test_loss": 0.5, "train_accuracy": 0.5, "test_accuracy": 0.75}


def test_curves_show_what_they_are_given(tmp_path):
    history = [{**ROW, "epoch": i + 1, "test_loss": 1 / (i + 1)} for i in range(5)]
    plots.curves(tmp_path / "a.png", history)
    plots.curves(tmp_path / "b.png", [{**row, "test_loss": row["test_loss"] * 0.9 if row["epoch"] == 3 else row["test_loss"]}
                                      for row in history])
    a, b = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    half = a.shape[1] // 2
    assert (a != b)[:, :half].any() and not (a != b)[:, half:].any()        # the loss on the left, the accuracy on the right
    plots.curves(tmp_path / "c.png", [{**ROW, "epoch": 1, "train_loss": 0.0}])     # one epoch; a loss that has no logarithm


@pytest.mark.parametrize("classes", [2, 10, 45])
def test_confusion_has_its_mistakes_in_red_and_the_rest_in_blue(tmp_path, classes):
    matrix = np.diag(np.full(classes, 9))
    plots.confusion(tmp_path / "right.png", matrix, [str(i) for i in range(classes)])
    matrix[0, classes - 1] = 4
    plots.confusion(tmp_path / "wrong.png", matrix, [str(i) for i in range(classes)])
    def coloured(picture, strong, weak):
        return np.argwhere(picture[..., strong] > picture[..., weak] + 60)
    right, wrong = drawn(tmp_path / "right.png"), drawn(tmp_path / "wrong.png")
    assert len(coloured(right, 2, 0)) > 100 and not len(coloured(right, 0, 2))
    height, width = coloured(wrong, 0, 2).mean(axis=0) / wrong.shape[:2]
    assert height < 0.4 and width > 0.6                     # row 0, last column: top right


def test_mistakes_are_the_wrong_ones_surest_first(tmp_path):
    images = np.zeros((50, 3, 4, 4), np.uint8)
    images[3, 0], images[7, 1] = 255, 255                   # a red and a green one
    labels, predictions, confidences = np.zeros(50, int), np.zeros(50, int), np.linspace(0.3, 0.9, 50)
    predictions[[3, 7]] = 1
    plots.mistakes(tmp_path / "a.png", images, labels, predictions, confidences, "ab")
    picture = drawn(tmp_path / "a.png")
    red, green = (np.argwhere((picture == colour).all(axis=2)) for colour in ([255, 0, 0], [0, 255, 0]))
    assert len(red) == len(green) > 1000 and green[:, 1].max() < red[:, 1].min()
    assert not (picture == [0, 0, 255]).all(axis=2).any()
    plots.mistakes(tmp_path / "none.png", images[:, :1], labels, labels, confidences, "ab")
    plots.mistakes(tmp_path / "many.png", images[:, :1], labels, 1 - labels, confidences, "ab")
    assert drawn(tmp_path / "many.png").shape[0] > 2 * drawn(tmp_path / "none.png").shape[0]


def test_pictures_leave_matplotlib_as_it_was(tmp_path):
    program = ("import sys, matplotlib; before = matplotlib.rcParams.copy(); from minicnn import plots; "
               f"plots.confusion({str(tmp_path / 'a.png')!r}, __import__('numpy').eye(2, dtype=int), 'ab'); "
               "assert 'matplotlib.pyplot' not in sys.modules; "           # which reading the backend below would import
               "assert all(matplotlib.rcParams[name] == before[name] for name in before if name != 'backend')")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_matplotlib_a_run_trains_and_says_what_is_missing(squares, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = begin("run", epochs=1)
    run.fit()
    assert (squares / "run" / "model.npz").exists()
    with pytest.raises(ImportError, match="matplotlib, which is not installed: pip install"):
        run.draw()
