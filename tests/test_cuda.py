"""What only a GPU can show. TEST_GPU=cpu in the environment tries the tests themselves on a CPU, as far as they go."""

import contextlib
import csv
import functools
import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from background import arguments, assert_same_run, read, shared_data
from conftest import ROOT, script, tiny_build_model
from test_step import batches, network, settings

GPU = torch.device(os.environ.get("TEST_GPU", "cuda"))
AUTO = "auto" if GPU.type == "cuda" else "float32"  # where float16 is emulated, a real network takes very long
pytestmark = pytest.mark.skipif(GPU.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")
only_cuda = pytest.mark.skipif(GPU.type != "cuda", reason="asks CUDA itself")


def new_trainer(build=network, **changes):  # build: None for a real network
    with pytest.MonkeyPatch.context() as patch:
        if build:
            patch.setattr(script, "build_model", lambda *_: (build(), "random"))
        return script.Trainer(settings(**{"DEVICE": str(GPU)} | changes), GPU, "data", 4)


def train(trainer, loader, criterion=script.dice_bce, after_step=None):
    return script.train_one_epoch(trainer.parallel_model, loader, criterion, trainer.optimizer, trainer.scaler, GPU,
                                  cfg=trainer.cfg, after_step=after_step or trainer.after_step)


def words(output, *more):
    """A command line for two epochs of ResNet18 on the GPU."""
    return arguments(output, "--num-workers", 0, "--device", GPU, "--precision", AUTO, "--epochs", 2, *more)


@pytest.fixture(autouse=True)
def machine():
    """What a run sets for the whole process is as PyTorch has it again."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory):
    """The output folder of a run with the defaults of a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    assert script.main(words(folder)) == 0
    return folder


# --- numbers


def test_float16_learns_after_its_calibration():
    trainer = new_trainer(PRECISION="float16", LR_FROM_SCRATCH=1e-2, WARMUP_STEPS=0)
    trainer.scaler = torch.amp.GradScaler(GPU.type, init_scale=2.0**40)  # so large that the first steps must overflow
    losses = [train(trainer, batches(*[4] * 40)) for _ in range(3)]
    assert 1 <= trainer.scaler.get_scale() < 2.0**40 and losses[-1] < 0.9 * losses[0]
    trainer.check_finite(losses[-1], 1)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_a_batch_of_nan_shows_in_the_loss(precision):
    poison = torch.full((2, 3, 16, 16), torch.nan), torch.zeros(2, 1, 16, 16)
    loss = train(new_trainer(functools.partial(network, True), PRECISION=precision), [*batches(2, 2), poison])
    assert not np.isfinite(loss)


def test_on_the_cpu_and_on_the_gpu_a_checkpoint_gives_the_same_probabilities(gpu_run):
    """In float32. Convolutions in TF32, PyTorch's default, keep 10 of 23 bits: probabilities agree to 0.02."""
    image = script.read_image(shared_data() / "test" / "slice_0.png")
    models = [script.load_model(gpu_run / script.BEST, device) for device in ("cpu", GPU)]
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    for context, tolerance in ((exact, 1e-3), (contextlib.nullcontext(), 0.02)):
        with context:
            expected, found = (script.predict_probability(model, image, 64, 64) for model in models)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert expected.std() > 1e-3


def test_the_scores_of_the_evaluation_are_those_of_predicted_masks(gpu_run, tmp_path):
    """With the same algorithms: others may move a pixel at the threshold."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        assert script.main(words(tmp_path, "--evaluate", "--checkpoint", gpu_run / script.BEST)) == 0
        model = script.load_model(gpu_run / script.BEST, GPU)
        rows = csv.DictReader((tmp_path / "evaluation" / "test_metrics.csv").read_text("utf-8-sig").splitlines())
        for entry, row in zip(script.read_coco(shared_data() / "test").entries, rows, strict=True):
            mask, truth = script.predict_mask(model, script.read_image(entry.path)), entry.mask()
            assert [int(row[name]) for name in script.COUNTS] == [
                part.sum() for part in (mask & truth, mask > truth, mask < truth, 1 - (mask | truth))]


def test_deterministic_runs_repeat_and_resume_to_the_last_bit(tmp_path):
    deterministic = ["--deterministic", "--ema-epochs", 1]
    for name in ("once", "again"):
        assert script.main(words(tmp_path / name, *deterministic)) == 0
    assert script.main(words(tmp_path / "resumed", *deterministic, "--epochs", 1)) == 0
    assert script.main(words(tmp_path / "resumed", *deterministic, "--resume")) == 0
    assert_same_run(tmp_path / "again", tmp_path / "once")
    assert_same_run(tmp_path / "resumed", tmp_path / "once")


# --- files


def test_the_checkpoint_loads_without_a_gpu(gpu_run):
    """By the two lines of the recipe, without map_location; the run had the weights in channels_last on the GPU."""
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in read(gpu_run, script.BEST).values())
    code = ("import sys, torch, segmentation_models_pytorch as smp; assert not torch.cuda.is_available();"
            "model = smp.UnetPlusPlus('resnet18', encoder_weights=None, classes=1);"
            "model.load_state_dict(torch.load(sys.argv[1])); import brain_tumor_integrated_smp as script;"
            "script.load_model(sys.argv[1]); script.read_weights(sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, gpu_run / script.BEST, gpu_run / script.LAST], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert done.returncode == 0, done.stderr


@only_cuda
def test_a_compiled_run_saves_what_a_plain_model_loads(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(script, "build_model", tiny_build_model)
    assert script.main(words(tmp_path, "--compile", "--epochs", 1)) == 0
    for weights in (read(tmp_path, script.BEST), read(tmp_path)["model"]):
        tiny_build_model()[0].load_state_dict(weights)
    torch._dynamo.reset()


# --- the step


@only_cuda
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_nothing_in_the_step_waits_for_the_gpu(precision):
    """PyTorch itself knows what waits: from a step's first batch until the EMA has moved."""
    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                torch.cuda.set_sync_debug_mode("error")
                yield batch

    def after_step():
        trainer.after_step()
        torch.cuda.set_sync_debug_mode("default")
        steps.append(1)

    trainer, steps = new_trainer(functools.partial(network, True), PRECISION=precision, ACCUMULATION_STEPS=2), []
    try:
        for loss in script.LOSSES.values():
            train(trainer, Loader(batches(2, 2, 2, 2)), loss, after_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 2 * len(script.LOSSES)


def images(count, size):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return [(pixels, pixels[..., 0] // 128)]


def peak(step):
    """(allocated, reserved) bytes at most in a step after the first, weights and moments included."""
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    step()
    return torch.cuda.max_memory_allocated(GPU), torch.cuda.max_memory_reserved(GPU)


@only_cuda
@pytest.mark.parametrize("benchmark", [False, True], ids=["plain cuDNN", "cudnn.benchmark"])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_memory_that_really_runs_out_is_recognised_and_smaller_batches_fit(precision, benchmark):
    """With cudnn.benchmark, cuDNN swallows the allocator's error and raises one of its own."""
    torch.backends.cudnn.benchmark = benchmark
    trainer = new_trainer(None, PRECISION=precision)
    total = torch.cuda.get_device_properties(GPU).total_memory
    four = peak(lambda: train(trainer, images(4, 256)))[1]
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.15 * four / total), GPU)
        with pytest.raises((RuntimeError, torch.OutOfMemoryError)) as caught:
            train(trainer, images(32, 256))
        assert script.is_out_of_memory(caught.value)
        del caught
        gc.collect()
        torch.cuda.empty_cache()
        trainer.optimizer.zero_grad()
        assert np.isfinite(train(trainer, images(4, 256)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
        torch.cuda.empty_cache()


@only_cuda
def test_a_run_that_has_too_little_memory_continues_with_smaller_batches(tmp_path, capsys):
    """Room for 4 of its 8 images."""
    total = torch.cuda.get_device_properties(GPU).total_memory
    four = peak(functools.partial(train, new_trainer(None, PRECISION=AUTO), images(4, 256)))[1]
    gc.collect()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1.15 * four / total), GPU)
        assert script.main(words(tmp_path, "--batch-size", 8, "--img-size", 256)) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
        torch.cuda.empty_cache()
    used = read(tmp_path)["settings"]["used"]
    assert "memory ran out (" in capsys.readouterr().err
    assert used["BATCH_SIZE"] < 8 == used["BATCH_SIZE"] * used["ACCUMULATION_STEPS"]


@only_cuda
def test_a_step_takes_at_most_half_the_memory_of_the_original():
    """The same 16 images of 256 pixels; the EMA included. The original: the classic U-Net in float32."""
    import benchmark

    def original(data):
        model = benchmark.UNet().to(GPU)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        images, masks = (torch.from_numpy(part).float().to(GPU) for part in data[0])

        def step():
            optimizer.zero_grad()
            benchmark.bce_and_dice(model(images.permute(0, 3, 1, 2).contiguous() / 255), masks[:, None]).backward()
            optimizer.step()

        return peak(step)[0]

    def this(data):
        trainer = new_trainer(None, PRECISION="auto", ENCODER="resnet34")
        script.set_up_machine(trainer.cfg, GPU)
        return peak(lambda: train(trainer, data))[0]

    data = images(16, 256)
    whole = original(data)
    gc.collect()  # the first model must not count in the second measurement
    assert this(data) <= 0.5 * whole
