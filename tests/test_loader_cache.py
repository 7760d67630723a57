"""Every file is decoded once per run: the cache of decoded images, the workers that read from it, and the batches."""

import collections
import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from background import Process, arguments, differences, read, table_rows
from conftest import FAST, script, tiny_build_model, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

CACHE_SIZE = (8 + 4) * 64 * 64 * 4  # bytes, of the data below: train and valid, RGB and mask


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """The system's folder for temporary files, empty, during this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    return tmp_path / "temp"


@pytest.fixture
def cfg(data):
    """Settings under which the cache just fits; the seed is not the constant, which a worker might read again."""
    cfg = script.default_settings()
    vars(cfg).update(DATA_DIR=str(data), IMG_SIZE=64, BATCH_SIZE=4, NUM_WORKERS=0, SEED=7, CACHE_GB=CACHE_SIZE / 1e9)
    return cfg


def prepare(cfg):
    """(cfg, splits, cache) of a run in the folder "out" beside the data."""
    return cfg, *script.prepare_data(cfg, ["train", "valid"], Path(cfg.DATA_DIR).parent / "out")


@pytest.fixture
def prepared(cfg):
    yield prepare(cfg)
    script.remove_cache(Path(cfg.DATA_DIR).parent / "out")


def make_dataset(prepared, name="train", cached=True, kind=script.BrainTumorDataset):
    """A data set as train() builds it."""
    cfg, splits, cache = prepared
    return kind("unused", cfg.IMG_SIZE, name == "train", cfg.SEED, normalize=False, entries=splits[name].entries,
                cache=cache if cached else None)


# --- whole runs of three epochs


def run_here(data, output, *more):
    """The exit code of a run in this process, without pictures, which read images on their own."""
    with mock.patch.multiple(script, plot_samples=mock.Mock(), plot_history=mock.Mock(), plot_predictions=mock.Mock(),
                                 plot_report=mock.Mock()):
        return script.main([*FAST, "--data-dir", str(data), "--output-dir", str(output), *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns by name (output folder, how often each file was decoded, files in the temporary folder after the run)."""
    root = tmp_path_factory.mktemp("runs")
    data, found, read_image = write_data(root / "data", train=6, valid=3, test=2), {}, script.read_image
    for name, options in {"cached": ["--num-workers", "0"], "cached, with workers": ["--num-workers", "2"],
                          "not cached": ["--cache-gb", "0"]}.items():
        log, output, temp = (root / f"{name} {kind}" for kind in ("log", "out", "temp"))
        temp.mkdir()

        def counted(path, *arguments, log=log, **options):
            with open(log, "a") as file:  # a file, because workers are processes
                file.write(f"{path}\n")
            return read_image(path, *arguments, **options)

        with (mock.patch.multiple(script, read_image=counted, build_model=tiny_build_model, available_cores=lambda: 2),
              mock.patch.object(tempfile, "tempdir", str(temp))):
            assert run_here(data, output, "--epochs", "3", *options) == 0
        reads = collections.Counter(Path(line).relative_to(data) for line in log.read_text().splitlines())
        found[name] = output, reads, list(temp.iterdir())
    return found


@pytest.mark.parametrize("name", ["cached", "cached, with workers"])
def test_with_the_cache_every_file_is_decoded_exactly_once_in_a_run(runs, name):
    _, reads, left = runs[name]
    assert len(reads) == 6 + 3 + 2 and set(reads.values()) == {1}
    assert left == []


def test_without_a_cache_files_are_decoded_in_every_epoch(runs):
    """The counter of the test above counts: audit, three epochs, threshold, and scores of valid and test."""
    reads = {(path.parts[0], count) for path, count in runs["not cached"][1].items()}
    assert reads == {("train", 1 + 3), ("valid", 1 + 3 + 2), ("test", 1 + 1)}


@pytest.mark.parametrize("name", ["cached", "cached, with workers"])
def test_results_are_the_same_with_and_without_the_cache(runs, name):
    """In every bit, although dropout draws random numbers and workers are started."""
    folder, other = runs[name][0], runs["not cached"][0]
    states = [read(output) | {"settings": None} for output in (folder, other)]
    assert states[0]["epoch"] == 3 and differences(*states) == []
    assert table_rows(folder) == table_rows(other)
    assert (folder / "test_metrics.csv").read_text() == (other / "test_metrics.csv").read_text()


# --- the cache: content, sharing, name, bound, removal


def test_the_cache_holds_what_load_sample_returns(prepared):
    """As copies, which augmentation may write into."""
    cfg, splits, cache = prepared
    for name in ("train", "valid", "train"):
        for index, entry in enumerate(splits[name].entries):
            found = make_dataset(prepared, name).sample(index)
            for array, expected in zip(found, script.load_sample(entry, cfg.IMG_SIZE)):
                assert np.array_equal(array, expected) and array.dtype == np.uint8 and array.flags.c_contiguous
                array[:] = 77
    assert cache.path.stat().st_size == CACHE_SIZE


def test_a_pickled_copy_carries_no_pixels_and_maps_the_same_ones(prepared):
    """As spawn and forkserver send it, also after the first sample: what one writes, the other sees."""
    dataset = make_dataset(prepared)
    dataset.sample(0)
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(make_dataset(prepared, cached=False))) + 1000
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.cache.pixels(dataset.entries[2].cache_slot, "r+")[5, 7] = 9, 8, 7, 1
    image, mask = copy.sample(2)
    assert image[5, 7].tolist() == [9, 8, 7] and mask[5, 7] == 1


def test_each_run_folder_has_one_cache_whose_name_follows_from_it(cfg, tmp_path, temp, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    names = [tmp_path / "out", Path("out"), tmp_path / "link", tmp_path / "other"]
    first, *same, other = [script.open_cache(cfg, name, 1) for name in names]
    assert all(cache.path == first.path != other.path for cache in same)
    assert {first.path, other.path} == set(temp.iterdir())
    script.remove_cache(names[0])
    assert list(temp.iterdir()) == [other.path]


@pytest.mark.parametrize("left", ["a cache", "a longer one", "a link"])
def test_what_a_killed_run_has_left_is_replaced(cfg, temp, left):
    """Files that have changed since are seen. A link is not followed: others may write into this folder, too."""
    path, victim = prepare(cfg)[2].path, temp.parent / "victim"
    victim.write_text("kept")
    if left == "a link":
        path.unlink()
        path.symlink_to(victim)
    elif left == "a longer one":
        path.write_bytes(b"\xff" * 10**6)
    changed = np.full((96, 96), 200, np.uint8)
    (Path(cfg.DATA_DIR) / "train" / "slice_0.png").write_bytes(cv2.imencode(".png", changed)[1].tobytes())
    assert (make_dataset(prepare(cfg)).sample(0)[0] == 200).all()
    assert list(temp.iterdir()) == [path]
    assert path.stat().st_size == CACHE_SIZE and victim.read_text() == "kept"


@pytest.mark.parametrize("reason, changes, patches", [
    ("CACHE_GB allows 0,", {"CACHE_GB": 0.0}, {}),
    ("CACHE_GB allows 0.000196607,", {"CACHE_GB": CACHE_SIZE / 1e9 - 1e-9}, {}),  # it counts all splits
    ("No space left on device", {}, {"os.posix_fallocate": mock.Mock(side_effect=OSError("No space left on device"))}),
    ("may be full", {}, {"shutil.disk_usage": lambda _: mock.Mock(free=CACHE_SIZE)}),
    ("No such file or directory", {}, {"tempfile.tempdir": "/nowhere/at/all"}),
])
def test_without_room_there_is_no_cache_and_this_is_said(cfg, temp, capsys, monkeypatch, reason, changes, patches):
    vars(cfg).update(changes)
    for name, replacement in patches.items():
        monkeypatch.setattr(name, replacement, raising=False)  # Windows has no posix_fallocate
    cache = prepare(cfg)[2]
    said = capsys.readouterr().out
    message, = (line for line in said.splitlines() if "decoded again in every epoch" in line)
    assert cache is None and reason in message and "TMPDIR" in said
    assert list(temp.iterdir()) == []


EARLY_ENDS = {"bad data": (2, [script.TrainerError]), "error": (1, [RuntimeError]), "SIGTERM": (143, [signal.SIGTERM]),
              "Ctrl-C": (130, [signal.SIGINT]), "Ctrl-C twice": (130, [signal.SIGINT, signal.SIGINT])}


@pytest.mark.parametrize("place, end", [*itertools.product(["load_sample", "to_input"], EARLY_ENDS),
                                        ("write_table", "error")])
def test_an_early_end_leaves_no_cache_and_no_worker(data, tmp_path, temp, monkeypatch, tiny, place, end):
    """Where images are read, in a step, and where the run is saved."""
    code, fault = EARLY_ENDS[end]
    seen, inner = [], getattr(script, place)

    def fail(*arguments):
        seen.append((len(list(temp.glob("brain_tumor_cache_*"))), len(multiprocessing.active_children())))
        for what in fault if len(seen) == 1 else []:
            if not isinstance(what, signal.Signals):
                raise what("broken on purpose")
            os.kill(os.getpid(), what)
            while not script.STOP.signum:  # or a second one would merge with the first, which has not arrived
                time.sleep(0.001)
        return inner(*arguments)

    monkeypatch.setattr(script, place, fail)
    assert run_here(data, tmp_path / "out", "--epochs", "50", "--num-workers", "1") == code
    assert seen[0] == (1, 0 if place == "load_sample" else 1)
    assert list(temp.glob("brain_tumor_cache_*")) == multiprocessing.active_children() == []
    assert list(script.progress([1, 2], "Other code goes on after that")) == [1, 2]


# --- workers


def batches_of(loader):
    """All batches of two epochs."""
    for epoch in (0, 3):
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_every_start_method_gives_from_the_cache_what_one_process_decodes(prepared, data, monkeypatch, method):
    cfg = prepared[0]
    expected = list(batches_of(script.make_loader(make_dataset(prepared, cached=False), cfg, train=True)))
    shutil.rmtree(data)
    cfg.NUM_WORKERS = 1 if method == "spawn" else 2  # each imports everything again, for seconds
    monkeypatch.setattr(script, "available_cores", lambda: 2)
    loader = script.make_loader(make_dataset(prepared), cfg, train=True)
    loader.multiprocessing_context = method
    for found, other in zip(batches_of(loader), expected, strict=True):
        assert [type(array) for array in found] == [np.ndarray] * 2, "tensors would travel through /dev/shm"
        assert [array.dtype for array in found] == [np.uint8] * 2, "float32 would be four times the bytes"
        assert [array.shape for array in found] == [(4, 64, 64, 3), (4, 64, 64)]
        assert all(map(np.array_equal, found, other))


class Spy(script.BrainTumorDataset):
    """Tells what it is like in a worker: threads of the libraries, process, and what Ctrl-C and SIGTERM do there."""

    def __getitem__(self, key):
        handlers = signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return (np.array([cv2.getNumThreads(), torch.get_num_threads(), *handlers, os.getpid()]),) * 2


def test_workers_start_no_threads_leave_ctrl_c_to_the_trainer_and_live_for_the_whole_run(prepared, monkeypatch):
    """Ctrl-C reaches the whole process group; the trainer, with handlers of its own, decides what happens."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    handlers = {number: signal.signal(number, script.STOP) for number in (signal.SIGINT, signal.SIGTERM)}
    cv2.setNumThreads(2)
    torch.set_num_threads(2)
    prepared[0].NUM_WORKERS = 2
    monkeypatch.setattr(script, "available_cores", lambda: 2)
    loader = script.make_loader(make_dataset(prepared, kind=Spy), prepared[0], train=True)
    epochs = [np.concatenate([batch[0] for batch in loader]) for _ in range(2)]
    cv2.setNumThreads(before[0])
    torch.set_num_threads(before[1])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert np.max(epochs, (0, 1))[0] <= 1 and (np.stack(epochs)[..., 1:4] == 1).all()
    first, second = (set(found[:, 4].tolist()) for found in epochs)
    assert first == second and len(first) == 2 and os.getpid() not in first


@pytest.mark.parametrize("wanted, cores, processes, workers", [(4, 2, 1, 2), (4, 8, 1, 4), (8, 8, 2, 4), (4, 1, 1, 1),
                                                               (4, 2, 4, 1), (0, 8, 1, 0)])
def test_workers_are_capped_by_the_cores_this_process_may_use(prepared, monkeypatch, wanted, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    prepared[0].NUM_WORKERS = wanted
    assert script.make_loader(make_dataset(prepared), prepared[0], train=True).num_workers == workers


def test_validation_batches_are_larger_in_order_and_need_workers_only_without_the_cache(prepared):
    cfg = prepared[0]
    cfg.NUM_WORKERS, cfg.BATCH_SIZE = 1, 2
    loader = script.make_loader(make_dataset(prepared, "valid"), cfg, train=False)
    assert [[index for _, index in keys] for keys in loader.batch_sampler] == [[0, 1, 2, 3]]
    assert loader.num_workers == 0
    assert script.make_loader(make_dataset(prepared, "valid", cached=False), cfg, train=False).num_workers == 1


def hang_in_the_step(script):
    """A fault: the trainer takes no more batches."""
    def to_target(*_):
        print("hanging", flush=True)
        time.sleep(1000)

    script.to_target = to_target


def is_running(pid):
    """Whether a process is there, and not only its exit code."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    """A batch of 128 kB does not fit into the pipe: by itself its worker would wait for ever."""
    process = Process(arguments(tmp_path / "out", "--img-size", 128, "--cache-gb", 0), hang_in_the_step)
    process.wait_for("hanging")
    workers = process.workers()
    assert workers and all(map(is_running, workers))
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.05)


# --- batches of even size, and their parts


def parts_of(count, batch_size, world, shuffle):
    """The batches of every rank in epoch 3: [rank][batch] -> keys."""
    found = []
    for number in range(world):
        with mock.patch.multiple(script, rank=lambda number=number: number, world_size=lambda: world):
            sampler = script.EvenBatchSampler(count, batch_size, shuffle, seed=5)
            sampler.set_epoch(3)
            found.append(list(sampler))
            assert len(found[-1]) == len(sampler)
    return found


@settings(deadline=None, max_examples=150)
@given(count=st.integers(1, 200), batch_size=st.integers(1, 40), world=st.integers(1, 6), shuffle=st.booleans())
def test_even_batches(count, batch_size, world, shuffle):
    parts = parts_of(count, batch_size, world, shuffle)
    batches = list(itertools.zip_longest(*parts, fillvalue=[]))  # of all processes together
    keys = [key for batch in batches for part in batch for key in part]
    assert sorted(keys) == [(3, index) for index in range(count)]  # all images, none twice
    sizes = [sum(map(len, batch)) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert all(max(map(len, batch)) - min(map(len, batch)) <= 1 for batch in batches)
    assert all(batch for part in parts for batch in part)  # none is empty
    if count >= world:  # else one process would wait for the others for ever
        assert len(set(map(len, parts))) == 1
    if pairs := shuffle and batch_size >= 2 * world:  # in training, BatchNorm may need two images in every process
        assert min(map(len, sum(parts, []))) >= min(2, count // world)
    if math.ceil(count / batch_size) <= count // (world * (1 + pairs)):
        assert max(sizes) <= batch_size and len(sizes) == math.ceil(count / batch_size)
        assert [[sum(batch, []) for batch in batches]] == parts_of(count, batch_size, 1, shuffle)


def test_the_order_follows_from_seed_and_epoch(prepared):
    def order(epoch, seed):
        prepared[0].SEED = seed
        sampler = script.make_loader(make_dataset(prepared), prepared[0], train=True).batch_sampler
        sampler.set_epoch(epoch)
        return tuple(index for batch in sampler for _, index in batch)

    assert order(1, 7) == order(1, 7) and sorted(order(1, 7)) == list(range(8))
    assert len({order(0, 7), order(1, 7), order(2, 7), order(1, 8)}) == 4
