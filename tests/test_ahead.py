"""Images that stay in their files: decoded ahead of who asks, to the same bits as those in memory; and random crops of them."""
import io
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from minicnn import data, models, train
from minicnn.data import DataError, ImageFiles, ImageSet, folder
from minicnn.data.ahead import WAITING, ahead
from minicnn.data.augmentation import TRIES, _box
from minicnn.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow: pip install pillow")


# ---------------------------------------------------------------- work ahead
def test_results_come_in_order_from_several_threads():
    names = set()

    def square(i):
        names.add(threading.current_thread().name)
        time.sleep(0.002 * (i % 3))
        return i * i
    assert list(ahead(square, range(20), workers=3)) == [i * i for i in range(20)]
    assert len(names) == 3 and threading.current_thread().name not in names
    assert list(ahead(square, [], workers=2)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_work_stays_a_few_items_ahead_and_ends_with_who_takes_it(workers):
    made = []
    results = ahead(made.append, range(1000), workers)
    for taken in range(1, 6):
        next(results)
        time.sleep(0.02)
        assert taken + workers + WAITING - 1 >= len(made) >= min(taken + 1, taken + WAITING - 1)
    results.close()
    assert len(made) <= 5 + workers + WAITING
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("minicnn-ahead")]


def test_an_error_comes_in_its_place():
    def unless_3(i):
        if i == 3:
            raise DataError("3 is bad")
        return i
    results, seen = ahead(unless_3, range(10), workers=2), []
    with pytest.raises(DataError, match="3 is bad"):
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 2]


# ---------------------------------------------------------------- images in files
def picture(seed, height=12, width=10, grey=False, suffix="png"):
    """The bytes of an image of noise, brighter for odd seeds."""
    pixels = np.random.default_rng(seed).integers(100 * (seed % 2), 100 * (seed % 2) + 100, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(stream, {"jpg": "JPEG"}.get(suffix, suffix))
    return stream.getvalue()


def tree(root, count=6, suffix="jpg", **options):
    """Two classes of so many images each, named so that they are noise of all seeds; some are grey."""
    for i in range(2 * count):
        path = Path(root, "cat" if i % 2 else "dog", f"{i:02}.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, suffix=suffix, grey=i % 5 == 0, **options))
    return Path(root)


def packed(root, name):
    with tarfile.open(root.parent / name, "w:" + name.partition(".tar")[2].lstrip(".")) as archive:
        archive.add(root, root.name, filter=lambda member: member if member.isdir() or member.isreg() else None)
    return root.parent / name


def both(source, **options):
    return [data.image_folder(source, decode=how, **options) for how in ("once", "ahead")]


@pytest.mark.parametrize("size", [None, (8, 8), (30, 20)])
@pytest.mark.parametrize("archive", [False, True])
def test_images_in_files_are_those_in_memory(tmp_path, archive, size):
    source = tree(tmp_path / "pets")
    source = packed(source, "pets.tar") if archive else source
    for memory, files in zip(*both(source, size=size), strict=True):
        assert isinstance(memory.images, np.ndarray) and isinstance(files.images, ImageFiles)
        assert (files.name, files.classes) == (memory.name, memory.classes)
        np.testing.assert_array_equal(files.labels, memory.labels)
        n = len(memory)
        assert files.images.shape == memory.images.shape == (n, 3, *(size or (12, 10)))
        assert (files.images.dtype, files.images.ndim, files.images.size) == (np.uint8, 4, memory.images.size)
        for index in (slice(None), slice(1, None, 2), [2, 0, 0], np.arange(n) % 2 == 1, 1, -1, np.int64(0), []):
            np.testing.assert_array_equal(files.images[index], memory.images[index], strict=True)
        part = files.subset([1, 0])
        assert isinstance(part.images, ImageFiles)
        np.testing.assert_array_equal(part.images[:], memory.images[[1, 0]])
        assert data.channel_statistics(files.images) == data.channel_statistics(memory.images)
        grown = data.fitted(files, (3, 6, 6))
        assert isinstance(grown.images, ImageFiles) and grown.images[:].shape == (n, 3, 6, 6)
        with pytest.raises(ValueError, match="has images of 3 channels, but the model takes 1"):
            data.fitted(files, (1, 6, 6))


def test_grey_images_stay_grey_and_can_fill_all_channels(tmp_path):
    for i in range(10):
        path = tmp_path / ("ab"[i % 2]) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i, grey=True))
    (memory, _), (files, _) = both(tmp_path)
    assert files.images.shape[1] == 1
    np.testing.assert_array_equal(files.images[:], memory.images)
    np.testing.assert_array_equal(data.fitted(files, (3, 12, 10)).images[:], memory.images.repeat(3, 1))


def test_what_stays_in_files_by_default(tmp_path, monkeypatch):
    """Sets whose pixels would take more than a quarter of the memory, which a test makes small; 12 images of 360 bytes."""
    source = tree(tmp_path / "pets", suffix="png")
    for memory, kind in [(1e9, np.ndarray), (4 * 12 * 360, np.ndarray), (4 * 12 * 360 - 1, ImageFiles)]:
        monkeypatch.setattr(folder, "_memory", lambda memory=memory: memory)
        assert type(data.image_folder(source)[0].images) is kind, memory
    (source / "cat" / "00.png").write_bytes(b"no image")                    # the first of all tells nothing
    with pytest.warns(RuntimeWarning, match=r"1 of 13 .*cat/00\.png"):
        assert type(data.image_folder(source, skip_bad=True)[0].images) is ImageFiles
    (source / "cat" / "00.png").unlink()
    archive = packed(source, "pets.tar.gz")
    assert type(data.image_folder(archive)[0].images) is np.ndarray         # it can be read from its beginning alone
    with pytest.raises(DataError, match=r"pets.tar.gz:.*an archive that is compressed.*decompress it to a plain .tar"):
        data.image_folder(archive, decode="ahead", skip_bad=True)
    with pytest.raises(ValueError, match="decode='later' must be"):
        data.image_folder(source, decode="later")


@pytest.mark.parametrize("archive", [False, True])
def test_bad_files_are_fatal_or_left_out_by_name(tmp_path, archive):
    source = tree(tmp_path / "pets")
    path = source / "cat" / "03.jpg"
    path.write_bytes(path.read_bytes()[:400])                               # cut short: only decoding shows it
    (source / "dog" / "zz.jpg").write_bytes(b"no image at all")
    source = packed(source, "pets.tar") if archive else source
    with pytest.raises(DataError, match=r"cat/03.jpg: damaged image"):
        data.image_folder(source, decode="ahead")
    sets = []
    for how in ("once", "ahead"):
        with pytest.warns(RuntimeWarning, match=r"2 of 13 image files cannot be read and are left out: .*cat/03.jpg, .*dog/zz.jpg"):
            sets.append(data.image_folder(source, skip_bad=True, decode=how))
    for memory, files in zip(*sets, strict=True):
        np.testing.assert_array_equal(files.images[:], memory.images)


def test_differing_sizes_are_refused_or_brought_to_one(tmp_path):
    source = tree(tmp_path / "pets")
    (source / "cat" / "zz.png").write_bytes(picture(1, 40, 50))
    with pytest.raises(DataError, match=r"cat/zz.png is 40 x 50, but .* is 12 x 10"):
        data.image_folder(source, decode="ahead")
    memory, files = both(source, size=(9, 9))
    np.testing.assert_array_equal(files[0].images[:], memory[0].images)
    shapes = {image.shape for image in files[0].images.originals(slice(None))}
    assert shapes == {(3, 12, 10), (3, 40, 50)}


# ---------------------------------------------------------------- batches
def flipped(images, rng):
    return data.augment(images, rng, pad=2, flip=True)


def test_batches_from_files_are_those_from_memory_from_any_step_on(tmp_path):
    source = tree(tmp_path / "pets", 12)
    (memory, _), (files, _) = both(source)
    how = {"batch_size": 4, "seed": 3, "epoch": 2, "augmentation": flipped}
    for start in (0, 2, 5):
        theirs, ours = data.batches(memory, **how, start=start), data.batches(files, **how, start=start)
        for (images, labels), (expected, those) in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(images, expected, strict=True)
            np.testing.assert_array_equal(labels, those)
    with pytest.raises(ValueError, match="start=6"):
        data.batches(files, **how, start=6)


def test_no_more_than_a_few_batches_are_decoded_before_they_are_wanted(tmp_path, monkeypatch):
    files, _ = data.image_folder(tree(tmp_path / "pets", 25), decode="ahead")
    count, decoded = [], ImageFiles._decoded

    def counted(self, picture):
        count.append(1)
        return decoded(self, picture)
    monkeypatch.setattr(ImageFiles, "_decoded", counted)
    monkeypatch.setattr("minicnn.data.ahead.cores", lambda: 2)
    taken = data.batches(files, 2, seed=0, epoch=0)
    next(taken)
    time.sleep(0.1)
    assert 2 < len(count) <= 2 * (2 + WAITING)
    taken.close()


def test_a_file_that_is_lost_while_training_is_named(tmp_path):
    source = tree(tmp_path / "pets")
    files, _ = data.image_folder(source, decode="ahead")
    for path in source.glob("cat/*"):
        path.unlink()
    with pytest.raises(DataError, match=r"pets/cat/\d\d.jpg: no such file"):
        list(data.batches(files, 4, seed=0, epoch=0))
    archive = packed(tree(tmp_path / "more"), "more.tar")
    files, _ = data.image_folder(archive, decode="ahead")
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"more.tar: ends before byte \d+, where it had more when it was opened"):
        list(data.batches(files, 4, seed=0, epoch=0))


# ---------------------------------------------------------------- random crops
def test_boxes_are_drawn_as_the_paper_says():
    rng = np.random.default_rng(0)
    h, w = 300, 400
    boxes = np.array([_box((h, w), rng.random((TRIES, 4)), 0.08) for _ in range(20_000)])
    left, top, right, bottom = boxes.T
    assert (boxes.min(), right.max(), bottom.max()) == (0, w, h)
    shares, aspects = (right - left) * (bottom - top) / (h * w), (right - left) / (bottom - top)
    assert 0.078 < shares.min() < 0.085 and 0.98 < shares.max() <= 1
    assert 0.74 < aspects.min() < 0.76 and 1.32 < aspects.max() < 1.35
    small = shares < 0.4                        # these fit always: shares uniform, log aspects uniform, places uniform
    assert np.histogram(shares[small], 4, (0.08, 0.4))[0] == pytest.approx(small.sum() / 4, rel=0.06)
    assert np.histogram(np.log(aspects[small]), 4, np.log([3 / 4, 4 / 3]))[0] == pytest.approx(small.sum() / 4, rel=0.06)
    for start, room in ((left, w - right + left), (top, h - bottom + top)):
        assert np.histogram(start[small] / room[small], 4, (0, 1))[0] == pytest.approx(small.sum() / 4, rel=0.06)


def test_where_no_box_fits_the_largest_in_the_middle_is_taken():
    draws = np.full((TRIES, 4), 0.5)
    draws[:, 0] = 1.0                           # all of the area
    assert _box((10, 100), draws, 0.08) == (43, 0, 56, 10)
    assert _box((100, 10), draws, 0.08) == (0, 43, 10, 56)
    draws[:, 1] = 0.9
    assert _box((60, 60), draws, 0.08) == (0, 0, 60, 60)


def test_a_crop_is_what_is_in_its_box():
    """Of images of differing sizes, beside the mean of the box and its corners."""
    rows, columns = np.mgrid[:120, :200].astype(np.uint8)
    images = [np.stack([rows, columns, rows // 2]), np.stack([rows, columns, rows])[:, :60, :50]]
    found = data.random_resized_crop(images, np.random.default_rng(1), (6, 5), 0.3)
    assert (found.shape, found.dtype) == ((2, 3, 6, 5), np.uint8)
    draws = np.random.default_rng(1).random((2, TRIES, 4))
    for image, crop, numbers in zip(images, found, draws, strict=True):
        left, top, right, bottom = _box(image.shape[1:], numbers, 0.3)
        assert (right - left, bottom - top) != image.shape[2:0:-1]
        inside = image[:, top:bottom, left:right]
        np.testing.assert_allclose(crop.mean((1, 2)), inside.mean((1, 2)), atol=1.0)
        step = (bottom - top) / 6
        np.testing.assert_allclose(crop[0, :, 0], top + step * (np.arange(6) + 0.5) - 0.5, atol=step / 4 + 1)
    whole = data.random_resized_crop(images[0][None, :, :100, :100], np.random.default_rng(1), (100, 100), 1.0)
    np.testing.assert_array_equal(whole[0], images[0][:, :100, :100])
    rng = np.random.default_rng(5)
    data.random_resized_crop(images, rng, (4, 4))
    again = np.random.default_rng(5)
    again.random(2 * TRIES * 4)
    assert rng.random() == again.random(), "what is drawn next depends on the number of images alone"
    with pytest.raises(ValueError, match="least=0 is a share"):
        data.random_resized_crop(images, rng, (4, 4), 0)


def test_crops_are_cut_from_what_is_in_the_files(tmp_path):
    source = tree(tmp_path / "pets", height=40, width=30)
    files, _ = data.image_folder(source, (8, 8), decode="ahead")
    seen = []

    def look(images, rng):
        seen.append([image.shape for image in images])
        return data.random_resized_crop(images, rng, (8, 8), 0.1)
    batches = list(data.batches(files, 3, seed=0, epoch=0, augmentation=look, originals=True))
    assert {shape for shapes in seen for shape in shapes} == {(3, 40, 30)}
    assert all(images.shape[1:] == (3, 8, 8) for images, _ in batches)
    memory = ImageSet(files.images[:], files.labels, files.classes, "memory")
    assert {image.shape for images, _ in data.batches(memory, 3, seed=0, epoch=0, augmentation=look, originals=True)
            for image in images} == {(3, 8, 8)}


# ---------------------------------------------------------------- a run
def tiny(num_classes=2, in_shape=(3, 8, 8), *, seed=0, dtype=np.float32):
    return Sequential([Conv2d(4, 3, padding=1, bias=False), BatchNorm2d(), ReLU(), GlobalAvgPool2d(), Linear(num_classes)],
                      in_shape, seed, dtype)


def bits(folder):
    import minicnn as mc
    return {name: array.tobytes() for name, array in mc.load(f"{folder}/model.npz")["state_dict"].items()}


@pytest.mark.parametrize("options", [{}, {"crop_area": 0.3}, {"crop_area": 0.3, "decode": "once"}])
def test_a_run_on_files_resumes_to_the_same_bits_and_is_the_one_in_memory(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    tree("pets", 12)

    def begun(out, **how):
        return train.begin("pets", model="tiny", image_size=(8, 8), epochs=2, batch_size=4, out=out, device="cpu",
                           **{"decode": "ahead", **options, **how})
    whole = begun("whole")
    where = ImageFiles if options.get("decode", "ahead") == "ahead" else np.ndarray
    assert type(whole.trainer.train_set.images) is where
    assert whole.about["decode"] == ("ahead" if where is ImageFiles else "once")
    assert whole.trainer.config.shift == (0 if "crop_area" in options else 1)
    whole.fit()
    cut = begun("cut")

    def stop(trainer):
        if (trainer.epoch, trainer.step) == (1, 2):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        cut.fit(on_step=stop)
    again = train.resume("cut")
    assert type(again.trainer.train_set.images) is where
    again.fit()
    assert bits("cut") == bits("whole")
    if not options:
        memory = begun("memory", decode="once")
        memory.fit()
        assert bits("memory") == bits("whole")
    trained = train.load_trained("whole")
    held_out = train.held_out(trained.about)
    assert type(held_out.images) is where
    assert train.evaluate(trained.model, held_out, trained.normalize).correct == whole.evaluation().correct
    archive = packed(Path("pets").resolve(), "pets.tar.gz")             # which is read in the way that suits it
    assert type(train.held_out(trained.about, str(archive)).images) is np.ndarray
    path = next(Path("pets/cat").iterdir())
    path.write_bytes(picture(99, suffix="jpg"))
    with pytest.raises(DataError, match="are not those that cut began with"):
        train.resume("cut")


def test_crops_of_a_folder_come_from_its_files_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    tree("pets")
    run = train.begin("pets", model="tiny", image_size=(8, 8), out="r", device="cpu", crop_area=0.08, flip=True)
    assert (run.about["decode"], run.about["training"]["crop_area"]) == ("ahead", 0.08)
    assert train.begin("pets", model="tiny", out="s", device="cpu").about["decode"] == "once"
    with pytest.raises(ValueError, match='decode="ahead" is for a folder of images; those of digits'):
        train.begin("digits", decode="ahead")


def test_features_of_a_frozen_body_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    tree("pets", 12)
    import minicnn as mc
    mc.save("w.npz", tiny(5, seed=3).state_dict())
    found = {}
    for how in ("once", "ahead"):
        run = train.begin("pets", model="tiny", image_size=(8, 8), start="w.npz", epochs=2, batch_size=4, decode=how, out=how)
        assert type(run.trainer.train_set.images) is (ImageFiles if how == "ahead" else np.ndarray)
        run.fit()
        found[how] = bits(how)
    assert found["once"] == found["ahead"]
