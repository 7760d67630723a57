"""What makes the trainer fast, and that it stays right: one decoding per run, one cache, workers, and the step itself.

Nothing here measures time; tests/benchmark.py does.
"""

import collections
import csv
import errno
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
from unittest import mock

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import FAST, script, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from more, and several busy test runs would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_signal_left_over():
    """An interrupted main() of one test must not stop the loops of the next."""
    yield
    script.STOP.signum = 0


def tiny_model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                               torch.nn.Conv2d(4, 1, 1)).to(memory_format=torch.channels_last)


@pytest.fixture
def tiny_network(monkeypatch):
    """Whole runs with a network of two layers, where the network does not matter."""
    monkeypatch.setattr(script, "build_model", lambda *_: (tiny_model(), "random"))


def make_cfg(data, tmp_path, **changes):
    """The script's settings for a tiny run in tmp_path."""
    cfg = script.default_settings()
    vars(cfg).update(DATA_DIR=str(data), OUTPUT_DIR=str(tmp_path / "out"), CACHE_DIR=str(tmp_path / "cache"),
                     IMG_SIZE=64, ENCODER="resnet18", ENCODER_WEIGHTS=None, BATCH_SIZE=4, NUM_WORKERS=0, EPOCHS=1,
                     DEVICE="cpu")
    vars(cfg).update(changes)
    for folder in (cfg.OUTPUT_DIR, cfg.CACHE_DIR):
        os.makedirs(folder, exist_ok=True)
    return cfg


def caches(folder):
    """Cache files in a folder."""
    return sorted(folder.glob("*")) if folder.is_dir() else []


@pytest.fixture
def cfg(data, tmp_path):
    return make_cfg(data, tmp_path)


@pytest.fixture
def prepared(cfg):
    """(cfg, splits, cache) of a checked data folder."""
    splits, cache = script.prepare_data(cfg, ["train", "valid"])
    yield cfg, splits, cache
    cache.close()


def make_dataset(prepared, train=True, name="train", **changes):
    """A data set as train() builds it."""
    cfg, splits, cache = prepared
    options = {"records": splits[name].records, "cache": cache, "normalize": False} | changes
    return script.BrainTumorDataset("unused", cfg.IMG_SIZE, train, cfg.SEED, **options)


# --- decode once: whole runs of several epochs ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of three epochs in this process, with the cache (and two workers) and without (and no worker).

    Returns, by name, (paths read in any process, history, last weights, cache files left).
    """
    root = tmp_path_factory.mktemp("runs")
    data, found = write_data(root / "data", train=6, valid=3, test=2), {}
    read_image = script.read_image
    for name, options in {"cached": ["--num-workers", "2"], "on the fly": ["--cache-gb", "0"]}.items():
        log, output, cache = root / f"{name}.log", root / name, root / f"{name} cache"
        cache.mkdir()

        def counted(path, *arguments, log=log, **options):
            with open(log, "a") as file:  # a file, because workers are processes
                file.write(f"{path}\n")
            return read_image(path, *arguments, **options)

        with mock.patch.object(script, "read_image", counted), \
                mock.patch.object(script, "build_model", lambda *_: (tiny_model(), "random")):
            assert script.main([*FAST, "--epochs", "3", "--data-dir", str(data), "--output-dir", str(output),
                                "--cache-dir", str(cache), *options]) == 0
        with open(output / "training_history.csv", newline="") as file:
            history = list(csv.DictReader(file))
        last = torch.load(output / script.LAST, weights_only=True)
        found[name] = log.read_text().split("\n")[:-1], history, last["model"], caches(cache)
    return data, found


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_file_is_decoded_exactly_once_in_a_run_of_several_epochs(runs, split):
    data, found = runs
    reads = collections.Counter(path for path in found["cached"][0] if path.startswith(str(data / split)))
    assert len(reads) == {"train": 6, "valid": 3}[split]
    assert set(reads.values()) == {1}


def test_without_a_cache_files_are_decoded_in_every_epoch(runs):
    """The counter of the test above counts: audit + 3 epochs + the evaluation after them."""
    data, found = runs
    reads = collections.Counter(path for path in found["on the fly"][0] if path.startswith(str(data / "valid")))
    assert set(reads.values()) == {1 + 3 + 1}


def test_results_are_the_same_with_and_without_the_cache(runs):
    _, found = runs
    (_, history, weights, _), (_, other_history, other_weights, _) = found["cached"], found["on the fly"]
    timing = {"images_per_second", "seconds"}
    for row, other in zip(history, other_history, strict=True):
        assert {k: v for k, v in row.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert len(history) == 3
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def test_nothing_stays_in_the_cache_folder_after_a_run(runs):
    assert runs[1]["cached"][3] == [] and runs[1]["on the fly"][3] == []


# --- the cache: content, sharing, bound, removal ---


def test_the_cache_holds_what_load_sample_returns(prepared):
    cfg, splits, cache = prepared
    for name in ("train", "valid"):
        for index, record in enumerate(splits[name].records):
            image, mask = make_dataset(prepared, name=name).sample(index)
            expected_image, expected_mask, _ = script.load_sample(record, cfg.IMG_SIZE)
            assert np.array_equal(image, expected_image) and np.array_equal(mask, expected_mask)
            assert image.flags.c_contiguous and mask.flags.c_contiguous
            assert image.dtype == mask.dtype == np.uint8


def test_one_file_serves_every_copy_of_the_data_set(prepared, tmp_path):
    """A pickled copy, as spawn and forkserver send it, maps the same pixels: what one writes, the other sees."""
    dataset = make_dataset(prepared)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.cache.path == dataset.cache.path
    assert caches(tmp_path / "cache") == [dataset.cache.path]
    slot = dataset.records[2].slot
    dataset.cache.array[slot, 5, 7] = 9, 8, 7, 1
    image, mask = copy.sample(2)
    assert image[5, 7].tolist() == [9, 8, 7] and mask[5, 7] == 1


def test_a_sample_is_a_copy_that_augmentation_may_write_into(prepared):
    dataset = make_dataset(prepared)
    before = dataset.sample(0)[0].copy()
    dataset.sample(0)[0][:] = 0
    assert np.array_equal(dataset.sample(0)[0], before)


def test_the_data_set_pickles_without_its_pixels(prepared):
    """Also when the map is open already."""
    dataset = make_dataset(prepared)
    dataset.sample(0)
    records_alone = len(pickle.dumps(dataset.records)) + len(pickle.dumps(dataset.transform))
    assert len(pickle.dumps(dataset)) < records_alone + 2000 < math.prod(dataset.cache.shape)


def test_samples_come_from_the_cache_even_if_the_files_are_gone(prepared, data):
    dataset = make_dataset(prepared)
    shutil.rmtree(data)
    assert dataset[(1, 0)][0].shape == (64, 64, 3)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("reason, changes, patches", [
    ("CACHE_GB allows 0", {"CACHE_GB": 0.0}, {}),
    ("CACHE_GB allows 1e-05", {"CACHE_GB": 1e-5}, {}),
    ("No space left on device", {}, {"os.posix_fallocate": no_space}),
    ("may be full", {}, {"shutil.disk_usage": lambda _: mock.Mock(free=1000)}),
    ("No such file or directory", {"CACHE_DIR": "/nowhere/at/all"}, {}),
])
def test_without_room_images_are_decoded_on_the_fly_and_the_script_says_so(cfg, capsys, tmp_path, monkeypatch, reason,
                                                                           changes, patches):
    if "os.posix_fallocate" in patches and not hasattr(os, "posix_fallocate"):
        pytest.skip("this system has no posix_fallocate")
    vars(cfg).update(changes)
    for name, replacement in patches.items():
        monkeypatch.setattr(name, replacement)
    splits, cache = script.prepare_data(cfg, ["train", "valid"])
    assert cache is None
    message, = (line for line in capsys.readouterr().out.splitlines() if "decoded again in every epoch" in line)
    assert reason in message
    assert caches(tmp_path / "cache") == []
    image, mask = make_dataset((cfg, splits, None)).sample(0)
    assert np.array_equal(image, script.load_sample(splits["train"].records[0], 64)[0]) and mask.any()


@pytest.mark.parametrize("gigabytes, fits", [(12 * 64 * 64 * 4 / 1e9, True), (12 * 64 * 64 * 4 / 1e9 - 1e-9, False)])
def test_the_bound_counts_the_images_of_all_splits(cfg, gigabytes, fits):
    cfg.CACHE_GB = gigabytes  # 8 + 4 images at 64 x 64 x 4 bytes
    cache = script.prepare_data(cfg, ["train", "valid"])[1]
    assert (cache is not None) == fits
    if cache:
        assert cache.path.stat().st_size == 12 * 64 * 64 * 4
        cache.close()


def hold_cache(folder, ready):
    """In a process of its own: open a cache and wait to be killed."""
    cache = script.PixelCache(folder, 2, 64)
    ready.set()
    signal.pause()
    cache.close()


@pytest.mark.skipif(script.fcntl is None, reason="Windows refuses to delete open files by itself")
def test_leftovers_of_a_killed_run_are_removed_but_not_the_cache_of_a_live_one(tmp_path, cfg):
    fork = multiprocessing.get_context("fork")
    ready, folder = fork.Event(), tmp_path / "cache"
    other = fork.Process(target=hold_cache, args=(str(folder), ready))
    other.start()
    try:
        assert ready.wait(20)
        kept = caches(folder)
        unrelated = folder / "brain_tumor_notes.txt"
        unrelated.write_text("not ours")
        mine = script.open_cache(cfg, 2)
        assert kept and set(kept) <= set(caches(folder)), "the cache of a live run is gone"
        mine.close()
        os.kill(other.pid, signal.SIGKILL)
        other.join(20)
        assert set(kept) <= set(caches(folder))  # a killed process cannot clean up
        script.open_cache(cfg, 2).close()  # the next start does
        assert caches(folder) == [unrelated]
    finally:
        other.kill()
        other.join(20)


def arguments(data, tmp_path, *more):
    (tmp_path / "cache").mkdir(exist_ok=True)
    return [*FAST, "--data-dir", str(data), "--output-dir", str(tmp_path / "out"),
            "--cache-dir", str(tmp_path / "cache"), *more]


def test_the_cache_is_removed_after_bad_data(data, tmp_path, capsys):
    (data / "train" / "slice_1.png").write_bytes(b"cut short")
    assert script.main(arguments(data, tmp_path)) == 2
    assert "slice_1.png" in capsys.readouterr().err
    assert caches(tmp_path / "cache") == []


def test_the_cache_is_removed_after_an_error_in_training(data, tmp_path, monkeypatch, tiny_network):
    def fail(*_, **__):
        assert len(caches(tmp_path / "cache")) == 1
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(script, "train_one_epoch", fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        script.main(arguments(data, tmp_path))
    assert caches(tmp_path / "cache") == []


@pytest.mark.parametrize("signum, times", [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_the_cache_is_removed_after_a_signal(data, tmp_path, monkeypatch, tiny_network, signum, times):
    """Once: the script stops between two steps. Twice: at once."""
    to_input = script.to_input

    def interrupt(*arguments):
        if not script.STOP.signum:
            assert len(caches(tmp_path / "cache")) == 1
            for _ in range(times):
                os.kill(os.getpid(), signum)
        return to_input(*arguments)

    monkeypatch.setattr(script, "to_input", interrupt)
    assert script.main(arguments(data, tmp_path, "--epochs", "50")) == 128 + signum
    assert caches(tmp_path / "cache") == []


def test_after_an_interrupted_main_other_code_can_go_on(data, tmp_path, monkeypatch, tiny_network):
    with monkeypatch.context() as patch:
        patch.setattr(script, "plot_samples", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert script.main(arguments(data, tmp_path)) == 130
    assert list(script.progress([1, 2], "Another loop")) == [1, 2]


def test_a_changed_file_is_seen_by_the_next_run(data, tmp_path):
    cfg = make_cfg(data, tmp_path)
    pixels = []
    for grey in (30, 200):
        png = cv2.imencode(".png", np.full((96, 96), grey, np.uint8))[1]
        (data / "train" / "slice_0.png").write_bytes(png.tobytes())
        splits, cache = script.prepare_data(cfg, ["train", "valid"])
        pixels.append(int(make_dataset((cfg, splits, cache)).sample(0)[0].max()))
        cache.close()
    assert pixels == [30, 200]


# --- workers ---


def all_batches(dataset, cfg, workers, method=None, epochs=(0, 3)):
    """The training batches of some epochs, from the script's own loader."""
    cfg.NUM_WORKERS = workers
    loader = script.make_loader(dataset, cfg, train=True)
    if workers:
        assert loader.num_workers == workers
        loader.multiprocessing_context = method
    found = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        found += list(loader)
    return found


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_every_start_method_gives_the_batches_of_a_run_without_workers(prepared, monkeypatch, method):
    cfg = prepared[0]
    monkeypatch.setattr(script, "available_cores", lambda: 2)
    expected = all_batches(make_dataset(prepared), cfg, 0)
    found = all_batches(make_dataset(prepared), cfg, 2, method)
    assert len(found) == len(expected) == 4
    for (images, masks), (other_images, other_masks) in zip(found, expected):
        assert type(images) is type(masks) is np.ndarray, "tensors would travel through /dev/shm"
        assert images.dtype == masks.dtype == np.uint8, "float32 would be four times the bytes"
        assert images.shape == (4, 64, 64, 3) and masks.shape == (4, 64, 64)
        assert np.array_equal(images, other_images) and np.array_equal(masks, other_masks)
    assert not np.array_equal(found[0][0], found[2][0])  # epochs differ


class Threads(script.BrainTumorDataset):
    """Tells from inside a worker how many threads the libraries would start there."""

    def __getitem__(self, key):
        threads = np.array([cv2.getNumThreads(), torch.get_num_threads(), os.getpid()])
        return threads, threads


def test_workers_start_no_threads_and_ignore_ctrl_c(prepared, monkeypatch):
    cfg, splits, cache = prepared
    monkeypatch.setattr(script, "available_cores", lambda: 2)
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(2)
    torch.set_num_threads(2)
    cfg.NUM_WORKERS = 2
    dataset = Threads("unused", 64, True, records=splits["train"].records, cache=cache, normalize=False)
    loader = script.make_loader(dataset, cfg, train=True)
    try:
        threads = np.concatenate([batch[0] for batch in loader])
        workers = set(threads[:, 2].tolist())
        assert len(workers) == 2 and os.getpid() not in workers
        assert threads[:, 0].max() <= 1 and threads[:, 1].max() == 1
        for worker in workers:  # Ctrl-C reaches the whole process group; the main process decides what happens
            os.kill(worker, signal.SIGINT)
        assert len(list(loader)) == len(loader)
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


@pytest.mark.parametrize("wanted, cores, processes, workers", [(4, 2, 1, 2), (4, 8, 1, 4), (8, 8, 2, 4), (4, 1, 1, 1),
                                                               (4, 2, 4, 1), (0, 8, 1, 0)])
def test_workers_are_capped_by_the_cores_this_process_may_use(prepared, monkeypatch, wanted, cores, processes, workers):
    cfg = prepared[0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    cfg.NUM_WORKERS = wanted
    assert script.make_loader(make_dataset(prepared), cfg, train=True).num_workers == workers


def test_workers_live_for_the_whole_run(prepared, monkeypatch):
    cfg = prepared[0]
    cfg.NUM_WORKERS = 1
    assert script.make_loader(make_dataset(prepared), cfg, train=True).persistent_workers


def test_validation_batches_are_larger_in_order_and_need_no_worker_with_the_cache(prepared):
    cfg = prepared[0]
    cfg.NUM_WORKERS, cfg.BATCH_SIZE = 2, 2
    loader = script.make_loader(make_dataset(prepared, train=False, name="valid"), cfg, train=False)
    assert loader.num_workers == 0
    assert [[index for _, index in keys] for keys in loader.batch_sampler] == [[0, 1, 2, 3]]


# --- batches of even size, and their parts ---


def parts_of(count, batch_size, world, shuffle=True, epoch=0):
    """The batches of every rank: [rank][batch] -> keys."""
    found = []
    for number in range(world):
        with (mock.patch.object(script, "rank", return_value=number),
              mock.patch.object(script, "world_size", return_value=world)):
            sampler = script.EvenBatches(count, batch_size, shuffle, seed=5)
            sampler.set_epoch(epoch)
            found.append(list(sampler))
            assert len(found[-1]) == len(sampler)
    return found


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 200), batch_size=st.integers(1, 40), world=st.integers(1, 6), shuffle=st.booleans())
def test_even_batches(count, batch_size, world, shuffle):
    parts = parts_of(count, batch_size, world, shuffle, epoch=3)
    if count >= world:
        assert len({len(batches) for batches in parts}) == 1  # else one process would wait for the others for ever
    keys = [key for batches in parts for batch in batches for key in batch]
    assert sorted(index for _, index in keys) == list(range(count))  # all images, none twice
    assert {epoch for epoch, _ in keys} == {3}
    sizes = [sum(map(len, batch)) for batch in itertools.zip_longest(*parts, fillvalue=[])]
    assert max(sizes) - min(sizes) <= 1
    for batch in itertools.zip_longest(*parts, fillvalue=[]):
        assert max(map(len, batch)) - min(map(len, batch)) <= 1
    if count >= world:
        assert min(len(batch) for batches in parts for batch in batches) >= 1
    if math.ceil(count / batch_size) <= count // world:
        assert max(sizes) <= batch_size and len(sizes) == math.ceil(count / batch_size)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 60), batch_size=st.integers(6, 20), world=st.integers(2, 6))
def test_the_parts_of_all_processes_make_up_the_batch_of_one(count, batch_size, world):
    if math.ceil(count / batch_size) > count // world:
        return
    alone, = parts_of(count, batch_size, 1)
    together = [list(itertools.chain(*batch)) for batch in zip(*parts_of(count, batch_size, world))]
    assert together == alone


def test_the_order_follows_from_seed_and_epoch():
    first, again, later = (parts_of(30, 8, 1, epoch=epoch)[0] for epoch in (1, 1, 2))
    assert first == again
    assert [index for batch in first for _, index in batch] != [index for batch in later for _, index in batch]
    assert parts_of(30, 8, 1, shuffle=False)[0][0] == [(0, index) for index in range(8)]


# --- the step ---


class NoSync(TorchDispatchMode):
    """Rejects what would make the processor wait for a GPU, while `active`."""

    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_dim",
             "_unique2", "bincount", "repeat_interleave"}
    active = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.active and function.overloadpacket.__name__ in self.WAITS:
            raise AssertionError(f"{function} waits for the device inside the step")
        return function(*args, **(kwargs or {}))


class WatchedGuard(script.StepGuard):
    """Switches the watch on from the start of each step to its end."""

    mode, steps = None, 0

    def before_step(self):
        self.mode.active = True
        super().before_step()

    def after_step(self, *arguments):
        super().after_step(*arguments)
        self.mode.active = False
        self.steps += 1


def forbid_reads(monkeypatch, mode):
    """Reads that no dispatch mode sees on the CPU."""
    for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def checked(self, *arguments, name=name, original=original, **options):
            assert not mode.active, f"Tensor.{name} waits for the device inside the step"
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, checked)


def tiny_batches(count=3, size=4):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 255, (size, 32, 32, 3), np.uint8), rng.integers(0, 2, (size, 32, 32), np.uint8))
            for _ in range(count)]


def watched_epoch(monkeypatch, cfg, criterion, scaled):
    """One epoch of a tiny model under the watch; returns the number of steps it saw."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    with NoSync() as mode, monkeypatch.context() as patch:
        guard = WatchedGuard(model, CPU)
        guard.mode = mode
        forbid_reads(patch, mode)
        script.train_one_epoch(model, tiny_batches(), criterion, optimizer, scaler, CPU, cfg=cfg, guard=guard)
    return guard.steps


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("accumulation, clip", [(1, 1.0), (2, 0.0)])
@pytest.mark.parametrize("loss", list(script.LOSSES))
def test_no_call_inside_the_step_waits_for_the_device(monkeypatch, cfg, loss, accumulation, clip, scaled):
    cfg.ACCUMULATION_STEPS, cfg.GRAD_CLIP, cfg.PRECISION = accumulation, clip, "float32"
    assert watched_epoch(monkeypatch, cfg, script.LOSSES[loss](), scaled) == math.ceil(3 / accumulation)


@pytest.mark.parametrize("read", [bool, float, lambda loss: loss.item(), lambda loss: loss.cpu(),
                                  lambda loss: loss.tolist(), lambda loss: torch.equal(loss, loss),
                                  lambda loss: loss[loss > 0]])
def test_the_watch_notices_such_calls(monkeypatch, cfg, read):
    def criterion(logits, targets):
        read(logits.detach().mean())
        return logits.mean()

    with pytest.raises(AssertionError, match="inside the step"):
        watched_epoch(monkeypatch, cfg, criterion, False)


def set_processor(monkeypatch, **capabilities):
    """As if the CPU had these."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    script.memory_format.cache_clear()


@pytest.fixture(params=[({"avx2": True}, torch.contiguous_format),
                        ({"avx2": True, "avx512_f": True}, torch.channels_last),
                        ({"neon": True}, torch.channels_last)], ids=["AVX2", "AVX-512", "ARM"])
def layout(request, monkeypatch):
    """A kind of CPU, as the memory format for it."""
    set_processor(monkeypatch, **request.param[0])
    yield request.param[1]
    script.memory_format.cache_clear()


def test_the_memory_format_follows_the_processor(layout):
    assert script.memory_format(CPU) == layout
    assert script.memory_format(torch.device("cuda")) == torch.channels_last


@pytest.mark.parametrize("images", [np.zeros((2, 32, 32, 3), np.uint8), torch.zeros(2, 3, 32, 32)],
                         ids=["uint8", "float32"])
def test_the_network_sees_its_memory_format(images, layout):
    tensor = script.to_input(images, CPU)
    assert tensor.shape == (2, 3, 32, 32) and tensor.dtype == torch.float32
    assert tensor.is_contiguous(memory_format=layout)


def test_a_run_has_a_fused_adamw_and_its_memory_format_also_after_resuming(cfg, layout):
    run = script.Run(cfg, CPU, "data", None)
    again = script.Run(cfg, CPU, "data", run.state())
    for each in (run, again):
        assert all(p.is_contiguous(memory_format=layout) for p in each.model.parameters() if p.ndim == 4)
        assert type(each.optimizer) is torch.optim.AdamW and each.optimizer.defaults["fused"] is True
        assert all(group["fused"] for group in each.optimizer.param_groups)


def test_activations_keep_the_memory_format_through_the_whole_network(cfg, layout):
    """One layer that returns another format would cost a copy in each direction."""
    model, bad = script.Run(cfg, CPU, "data", None).model, []

    def look(module, inputs, _output, name):
        if not inputs[0].is_contiguous(memory_format=layout):
            bad.append(name)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(functools.partial(look, name=name))
    model(script.to_input(np.zeros((2, 64, 64, 3), np.uint8), CPU))
    assert not bad


def test_a_state_goes_on_in_another_memory_format(cfg, monkeypatch):
    """Saved on a GPU or a CPU with AVX-512, resumed on one without: the fused optimizer must not mix up its moments."""
    def step(run):
        script.train_one_epoch(run.model, tiny_batches(), script.LOSSES["dice_bce"](), run.optimizer, run.scaler, CPU,
                               cfg=cfg)
        return torch.cat([weight.detach().flatten() for weight in run.model.parameters()])

    cfg.LR = 1e-3
    set_processor(monkeypatch, avx512_f=True)
    run = script.Run(cfg, CPU, "data", None)
    before = step(run)
    state = run.state()
    expected = step(run)
    try:
        set_processor(monkeypatch, avx2=True)
        again = script.Run(cfg, CPU, "data", state)
        for weight, moments in again.optimizer.state.items():
            assert {moments[name].stride() for name in ("exp_avg", "exp_avg_sq")} == {weight.stride()}
        found = step(again)
    finally:
        script.memory_format.cache_clear()
    assert (found - expected).norm() < 0.02 * (expected - before).norm()  # float32 sums in another order


def test_a_compiled_run_saves_what_a_plain_model_loads(data, tmp_path, monkeypatch):
    """The eager backend traces and wraps the model like any other, without needing a C++ compiler."""
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_eagerly(self):
        compiled.append(self)
        return compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    assert script.main(arguments(data, tmp_path, "--compile")) == 0
    assert len(compiled) == 1
    plain = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1)
    plain.load_state_dict(torch.load(tmp_path / "out" / script.BEST, weights_only=True))
    plain.load_state_dict(torch.load(tmp_path / "out" / script.LAST, weights_only=True)["model"])
    torch._dynamo.reset()


@pytest.mark.parametrize("precision, device, features, expected", [
    ("auto", "cuda", {}, torch.float16),
    ("bfloat16", "cuda", {}, torch.bfloat16),
    ("float32", "cuda", {}, torch.float32),
    ("auto", "cpu", {}, torch.float32),
    ("auto", "cpu", {"avx2": True, "avx512": True, "avx512_bf16": False}, torch.float32),
    ("auto", "cpu", {"avx512_bf16": True}, torch.bfloat16),
    ("auto", "cpu", {"amx_bf16": True}, torch.bfloat16),
    ("auto", "cpu", {"bf16": True}, torch.bfloat16),  # ARM
    ("float32", "cpu", {"avx512_bf16": True}, torch.float32),
    ("bfloat16", "cpu", {}, torch.bfloat16),
    ("auto", "mps", {"bf16": True}, torch.float32),
])
def test_precision_follows_setting_device_and_processor(monkeypatch, precision, device, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert script.amp_dtype(precision, torch.device(device)) == expected
    context = script.autocast(precision, torch.device(device)) if device == "cpu" else None
    if context:
        with context:
            assert torch.is_autocast_enabled("cpu") == (expected != torch.float32)


@pytest.mark.parametrize("precision, device, enabled", [("auto", "cuda", True), ("float16", "cuda", True),
                                                        ("bfloat16", "cuda", False), ("float32", "cuda", False),
                                                        ("auto", "cpu", False), ("bfloat16", "cpu", False)])
def test_only_float16_is_scaled(monkeypatch, precision, device, enabled):
    asked = {}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: asked.update(enabled=enabled))
    script.make_scaler(precision, torch.device(device))
    assert asked["enabled"] is enabled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_call_inside_the_step_waits_for_the_gpu(cfg):
    """On a GPU PyTorch itself knows what waits."""
    device = torch.device("cuda")
    model = tiny_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    class Guard(script.StepGuard):
        def before_step(self):
            torch.cuda.set_sync_debug_mode("error")
            super().before_step()

        def after_step(self, *arguments):
            super().after_step(*arguments)
            torch.cuda.set_sync_debug_mode("default")

    try:
        script.train_one_epoch(model, tiny_batches(), script.LOSSES["dice_bce"](), optimizer,
                               script.make_scaler("float16", device), device, cfg=cfg, guard=Guard(model, device))
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
