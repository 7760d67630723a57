"""The training step: gradients, bad numbers, memory, what it asks of the device; rate, EMA, memory format."""

import contextlib
import copy
import functools
import math
import multiprocessing
import re
import weakref
from collections import OrderedDict
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from background import arguments, differences, load_best, read
from conftest import script, tiny_build_model
from torch.utils._python_dispatch import TorchDispatchMode

CPU, BEST = torch.device("cpu"), script.BEST


def settings(**changes):
    """The constants with changes; float32, and a small network, unless they say otherwise."""
    return SimpleNamespace(**vars(script.default_settings()) | {
        "PRECISION": "float32", "ACCUMULATION_STEPS": 1, "ENCODER": "resnet18", "ENCODER_WEIGHTS": None} | changes)


def new_trainer(steps_per_epoch=3, state=None, **changes):
    return script.Trainer(settings(**changes), CPU, "data", steps_per_epoch, copy.deepcopy(state))


def network(norm=False):
    """Always the same weights. Without BatchNorm images do not see each other."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), *[torch.nn.BatchNorm2d(4)] * norm, torch.nn.ReLU(),
                               torch.nn.Conv2d(4, 1, 1))


def batches(*sizes):
    """Batches as the loaders send them, always the same images; red pixels are tumour."""
    images = np.random.default_rng(0).integers(0, 256, (sum(sizes), 16, 16, 3), np.uint8)
    masks = (images[..., 0] > 150).astype(np.uint8)
    return [(images[end - size:end], masks[end - size:end]) for size, end in zip(sizes, np.cumsum(sizes))]


def one_epoch(model, loader, criterion=script.dice_bce, optimizer=None, scaler=None, after_step=None, **changes):
    """Train on these batches; returns (training loss, all that has changed)."""
    cfg, optimizer = settings(**changes), optimizer or torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    scaler = scaler or script.make_scaler(cfg.PRECISION, CPU)
    loss = script.train_one_epoch(model, loader, criterion, optimizer, scaler, CPU, cfg=cfg, after_step=after_step)
    return loss, [model.state_dict(), optimizer.state_dict()["state"], scaler.state_dict()]


def plain_steps(model, loader, **options):
    """(change of the weights, loss) in an epoch of plain descent, which moves them by 0.1 times the gradient."""
    before = flat(model)
    loss, _ = one_epoch(model, loader, optimizer=torch.optim.SGD(model.parameters(), 0.1), **options)
    return flat(model) - before, loss


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def train(trainer, loader):
    """An epoch with optimizer and EMA of a trainer."""
    one_epoch(trainer.model, loader, optimizer=trainer.optimizer, scaler=trainer.scaler, after_step=trainer.after_step)


@pytest.fixture
def pretended(monkeypatch):
    """float16 and bfloat16 without their arithmetic, which most processors emulate; a list of what was asked for."""
    asked = []
    monkeypatch.setattr(script, "autocast", lambda *words: asked.append(words[0]) or contextlib.nullcontext())
    return asked


@pytest.fixture
def run(tiny, monkeypatch, tmp_path):
    """A run in this process, without pictures: run(name of its folder, *options) returns the exit code."""
    for name in ("plot_samples", "plot_history", "plot_predictions", "plot_report"):
        monkeypatch.setattr(script, name, lambda *_: None)
    return lambda name, *more: script.main(arguments(tmp_path / name, "--num-workers", 0, *more))


# --- the gradient


@pytest.mark.parametrize("parts, joined", [([2, 2], [4]), ([3, 1], [4]), ([2, 2, 2], [4, 2])])
def test_two_batches_accumulated_are_one_large_batch(parts, joined):
    """Also of different sizes, and where the last group is shorter: that is a full step, not half of one."""
    steps = []
    expected, loss = plain_steps(network(), batches(*joined), GRAD_CLIP=0.0)
    found, found_loss = plain_steps(network(), batches(*parts), ACCUMULATION_STEPS=2, GRAD_CLIP=0.0,
                                    after_step=lambda: steps.append(1))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert len(steps) == len(joined) and found_loss == pytest.approx(loss, rel=1e-5) and expected.norm() > 1e-3


def test_each_step_follows_the_gradient_of_its_own_images():
    found, _ = plain_steps(network(), batches(2, 3, 2), GRAD_CLIP=0.0)
    model = network()
    start = flat(model)
    for images, masks in batches(2, 3, 2):
        loss = script.dice_bce(model(script.to_input(images, CPU)), script.to_target(masks, CPU))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()])):
                weight -= 0.1 * gradient
    torch.testing.assert_close(found, flat(model) - start, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])  # the second one scales them
def test_gradients_are_clipped_to_the_given_norm(precision, pretended):
    small, smaller, free = (plain_steps(network(), batches(4), GRAD_CLIP=clip, PRECISION=precision)[0].norm().item()
                            for clip in (0.01, 0.001, 0.0))
    assert [small, smaller] == pytest.approx([1e-3, 1e-4], rel=0.01) and free > 0.002


@pytest.mark.parametrize("optimizer", [functools.partial(torch.optim.AdamW, fused=True), torch.optim.AdamW,
                                       torch.optim.SGD])
def test_six_arguments_are_enough(optimizer):
    """Float batches from any loader, any optimizer, the constants for the rest."""
    model = network().eval()
    loader = [(torch.randn(2, 3, 32, 32), (torch.rand(2, 1, 32, 32) < 0.3).float()) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    loss = script.train_one_epoch(model, loader, script.FocalTverskyLoss(), optimizer(model.parameters(), 1e-3),
                                  script.make_scaler("auto", CPU), CPU)
    assert math.isfinite(loss) and model.training
    assert all(value.isfinite().all() and not torch.equal(value, before[name])
               for name, value in model.state_dict().items())


def test_training_lowers_the_loss_on_what_it_sees():
    model = network()
    first, *_, last = (one_epoch(model, batches(4, 4, 4))[0] for _ in range(15))
    assert last < 0.9 * first


# --- numbers that are not finite


class Backward(torch.autograd.Function):
    """A value as it is, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx, value, change):
        ctx.change = change
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


SPOILS = {"NaN loss": lambda loss: loss * math.nan, "infinite loss": lambda loss: loss + math.inf,
          "NaN gradient": lambda loss: Backward.apply(loss, lambda gradient: gradient * math.nan),
          "infinite gradient": lambda loss: Backward.apply(loss, lambda gradient: gradient * math.inf)}


def spoilt(calls, kind="NaN loss"):
    """The default loss, spoilt at these calls, counted from 1."""
    seen = []

    def criterion(logits, targets):
        seen.append(1)
        loss = script.dice_bce(logits, targets)
        return SPOILS[kind](loss) if len(seen) in calls else loss

    return criterion


@pytest.mark.parametrize("kind", ["NaN loss", "infinite loss", "NaN image"])
def test_one_bad_forward_pass_shows_in_the_loss_of_the_epoch(kind):
    loader = batches(2, 2, 2)
    if kind == "NaN image":
        loader[1] = torch.full((2, 3, 16, 16), math.nan), torch.zeros(2, 1, 16, 16)
    loss, _ = one_epoch(network(), loader, spoilt([2], kind) if kind in SPOILS else script.dice_bce)
    assert not math.isfinite(loss)


@pytest.mark.parametrize("kind", ["NaN gradient", "infinite gradient"])
def test_in_float16_a_step_with_bad_gradients_is_skipped_and_the_scale_halved(kind, pretended):
    expected_loss, expected = one_epoch(network(), batches(2, 2, 2)[::2], PRECISION="float16")
    loss, found = one_epoch(network(), batches(2, 2, 2), spoilt([2], kind), PRECISION="float16")
    assert math.isfinite(loss) and expected[2]["scale"] == 2.0**16 and found[2]["scale"] == 2.0**15
    for values in (found, expected):  # the last step was taken with half the scale: rounding, and nothing else
        torch.testing.assert_close(values[0], expected[0], rtol=1e-5, atol=1e-6)
    assert {int(moments["step"]) for moments in found[1].values()} == {2}


def test_outside_float16_the_scaler_does_nothing():
    for precision in ("float32", "bfloat16"):
        assert not script.make_scaler(precision, CPU).is_enabled()
    assert script.make_scaler("float16", CPU).is_enabled()


def first_moments(trainer):
    state = trainer.optimizer.state.items()
    return next(value for weight, values in state for value in values.values() if value.shape == weight.shape)


@pytest.mark.parametrize("spoil, losses, reason", [
    (None, (1, math.nan), "the loss is not finite (training 1, validation nan)"),
    (None, (math.inf, 1), "the loss is not finite (training inf, validation 1)"),
    (lambda trainer: trainer.model[0].weight, (1, 1), "weights or optimizer state"),
    (lambda trainer: trainer.ema[1].running_var, (1, 1), "weights or optimizer state"),
    (first_moments, (1, 1), "weights or optimizer state")])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_ends_the_epoch(spoil, losses, reason, value, tiny):
    trainer = new_trainer()
    train(trainer, batches(2))
    trainer.check_finite(1, 1)
    if spoil:
        spoil(trainer).data[-1] = value
    with pytest.raises(FloatingPointError, match=f"epoch 1: {re.escape(reason)}"):
        trainer.check_finite(*losses)


def test_a_scale_that_falls_for_ever_ends_the_epoch(tiny):
    """Its losses are finite, and nothing is learnt."""
    trainer = new_trainer(PRECISION="float16")
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1.0})
    trainer.check_finite(1, 1)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 0.5})
    with pytest.raises(FloatingPointError, match="gradients overflow float16 at every scale"):
        trainer.check_finite(1, 1)


def test_weights_in_bfloat16_can_be_checked_and_saved(tiny):
    """As somebody may have them who edits the script."""
    trainer = new_trainer()
    trainer.model.bfloat16()
    trainer.check_finite(1, 1)
    assert {value.dtype for value in script.portable_weights(trainer.model).values()} == {torch.float32, torch.int64}


@pytest.fixture
def faulty(monkeypatch, pretended):
    """Spoils losses of a run: faulty(lambda step, precision, training: ...); steps are counted over its epochs."""
    def install(is_bad):
        steps = []

        def criterion(logits, targets):
            training = torch.is_grad_enabled()
            steps.extend([1] * training)
            assert len(steps) < 100, "it goes back for ever"
            bad = is_bad(len(steps), pretended[-1], training)
            return script.dice_bce(logits, targets) * (math.nan if bad else 1)

        monkeypatch.setitem(script.LOSSES, "dice_bce", criterion)
    return install


@pytest.mark.parametrize("is_bad, epoch", [(lambda step, training: training, 0), (lambda step, training: step > 5, 1),
                                           (lambda step, training: not training, 0)])
def test_after_a_bad_epoch_the_run_continues_from_the_saved_state_in_float32(is_bad, epoch, run, faulty, tmp_path,
                                                                             capsys):
    """Training or validation; if need be from the state of the start: as if nothing had happened."""
    assert run("expected", "--epochs", 3) == 0
    faulty(lambda step, precision, training: precision != "float32" and is_bad(step, training))
    assert run("out", "--epochs", 3, "--precision", "bfloat16") == 0
    out, err = capsys.readouterr()
    assert err.count("WARNING") == err.count(f"epoch {epoch + 1}: the loss is not finite") == 1
    assert "continuing with PRECISION = float32." in err and f"Continuing after epoch {epoch}" in out
    state = read(tmp_path / "out")
    assert differences(state | {"settings": 0}, read(tmp_path / "expected") | {"settings": 0}) == []
    assert [state["settings"][kind]["PRECISION"] for kind in ("file", "used")] == ["auto", "float32"]
    best = script.read_metadata(tmp_path / "out" / BEST)[0]  # perhaps of the epoch before
    assert best["settings"]["PRECISION"] == ("bfloat16" if best["best_epoch"] <= epoch else "float32")
    # And a resumed run stays in float32, and says so.
    assert script.main(["--resume", "--output-dir", str(tmp_path / "out"), "--epochs", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and ", float32, PyTorch" in out and "PRECISION = 'float32' (file: 'auto')" in out


def test_the_safer_setting_is_saved_before_the_next_step(run, faulty, tmp_path, monkeypatch):
    """Otherwise a kill in a long epoch would meet the same failure again."""
    found = []

    def train_one_epoch(*args, inner=script.train_one_epoch, **options):
        found.append(read(tmp_path / "out")["settings"]["used"]["PRECISION"])
        return inner(*args, **options)

    monkeypatch.setattr(script, "train_one_epoch", train_one_epoch)
    faulty(lambda step, precision, training: precision != "float32")
    assert run("out", "--epochs", 1, "--precision", "bfloat16", "--save-seconds", 1000) == 0
    assert found == ["bfloat16", "float32"]


@pytest.mark.parametrize("precision, steps", [("float32", [6]), ("bfloat16", [6, 11])])
def test_a_bad_epoch_in_float32_ends_the_run_with_an_explanation(precision, steps, run, faulty, tmp_path, capsys):
    """It would go the same way again. From the start, and after the return from another precision."""
    faulty(lambda step, _, training: training and step in steps)  # four steps an epoch
    assert run("out", "--epochs", 3, "--precision", precision) == 1
    out, err = capsys.readouterr()
    assert err.count("WARNING") == len(steps) - 1 and "Traceback" not in err
    assert "epoch 2: the loss is not finite (training nan" in err and "in float32, and it would happen again" in err
    assert f"from the best model so far: --init-weights \"{tmp_path / 'out' / BEST}\" --lr 1e-05" in err
    assert read(tmp_path / "out")["epoch"] == 1 and load_best(tmp_path / "out") == ""


@pytest.mark.parametrize("saved, now, scale", [("float16", "float32", 1), ("float32", "float16", 2.0**16),
                                               ("float16", "float16", 256)])
def test_a_scale_does_not_pass_between_precisions(saved, now, scale, tiny):
    trainer = new_trainer(PRECISION=saved)
    if saved == "float16":
        trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 256.0})
    assert new_trainer(PRECISION=now, state=trainer.state()).scaler.get_scale() == scale


# --- memory that runs out


class Limited(torch.nn.Module):
    """A network with memory for so many images at a time, in the forward pass (perhaps only in evaluation) or later."""

    def __init__(self, most, where="forward"):
        super().__init__()
        self.inner, self.most, self.where = network(), most, where

    def forward(self, images):
        def run_out(value):
            if len(images) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return value

        if self.where == "backward":
            return Backward.apply(self.inner(images), run_out)
        return run_out(self.inner(images)) if self.where == "forward" or not self.training else self.inner(images)


@pytest.mark.parametrize("where, most, batches_of, warnings", [
    ("forward", 3, "--batch-size 2 --accumulation-steps 4", 2),
    ("forward", 2, "--batch-size 1 --accumulation-steps 8", 3),  # validation has twice as many in a batch
    ("forward", 1, "--batch-size 1 --accumulation-steps 8", 3),
    ("backward", 4, "--batch-size 4 --accumulation-steps 2", 1),
    ("evaluation", 1, "--batch-size 1 --accumulation-steps 8", 3)])
def test_a_run_that_has_too_little_memory_continues_with_smaller_batches(where, most, batches_of, warnings, run,
                                                                         monkeypatch, tmp_path, capsys):
    """As with these from the start; and each failed try is gone before the next one is built."""
    built = []

    def build_model(*_):
        gone = [model for model in built if model() is None]
        assert len(gone) == len(built), "the failed model is still in memory"
        model = Limited(most if limited else 100, where)
        built.append(weakref.ref(model))
        return model, "random"

    monkeypatch.setattr(script, "build_model", build_model)
    limited = False
    assert run("expected", "--epochs", 2, *batches_of.split()) == 0
    built.clear()
    limited = True
    assert run("out", "--epochs", 2, "--batch-size", 8) == 0
    err = capsys.readouterr().err
    assert err.count("WARNING") == err.count("memory ran out (CUDA out of memory)") == warnings and "BatchNorm" in err
    state, expected = read(tmp_path / "out"), read(tmp_path / "expected")
    assert differences(state | {"settings": 0}, expected | {"settings": 0}) == []
    used, wanted = (each["settings"]["used"] for each in (state, expected))
    assert [used[name] for name in ("BATCH_SIZE", "ACCUMULATION_STEPS")] == [
        wanted[name] for name in ("BATCH_SIZE", "ACCUMULATION_STEPS")]
    resume = ["--resume", "--output-dir", str(tmp_path / "out"), "--epochs"]
    assert script.main([*resume, "3"]) == 0 and "WARNING" not in capsys.readouterr().err
    # The old command goes back to its batches, and finds out again.
    assert script.main([*resume, "4", "--batch-size", "8"]) == 0
    assert capsys.readouterr().err.count("WARNING") == warnings
    assert read(tmp_path / "out")["settings"]["used"] | {"EPOCHS": 2} == used


def test_workers_of_a_failed_try_have_ended_before_the_next_one(run, monkeypatch, capfd):
    alive = []

    def build_model(*_):
        alive.append(len(multiprocessing.active_children()))
        return Limited(4), "random"

    monkeypatch.setattr(script, "build_model", build_model)
    assert run("out", "--epochs", 1, "--batch-size", 8, "--num-workers", 1) == 0
    assert alive == [0, 0, 0] and capfd.readouterr().err.count("WARNING") == 1  # the last one is the evaluation's


@pytest.mark.parametrize("before, after", [((8, 1), (4, 2)), ((5, 1), (1, 5)), ((2, 3), (1, 6)), ((9, 1), (3, 3)),
                                           ((6, 2), (3, 4)), ((7, 1), (1, 7))])
def test_smaller_batches_leave_the_images_per_step_as_they_are(before, after):
    cfg = settings(BATCH_SIZE=before[0], ACCUMULATION_STEPS=before[1])
    script.choose_safer_setting(cfg, CPU, "no room", True)
    assert (cfg.BATCH_SIZE, cfg.ACCUMULATION_STEPS) == after


@pytest.mark.parametrize("processes, batch_size, words", [
    (1, 1, ("BATCH_SIZE = 1, which cannot be made smaller", "IMG_SIZE", "ENCODER", "--device cpu")),
    (2, 2, ("IMG_SIZE",)), (2, 3, ("IMG_SIZE",)),
    (2, 4, ("--resume --batch-size 2 --accumulation-steps 2",))])
def test_where_smaller_batches_cannot_help_the_error_says_what_does(processes, batch_size, words, monkeypatch):
    """One image each already; or other processes, which would wait for this one."""
    monkeypatch.setattr(script, "world_size", lambda: processes)
    with pytest.raises(script.TrainerError) as caught:
        script.choose_safer_setting(settings(BATCH_SIZE=batch_size), CPU, "no room", True)
    assert caught.value.exit_code == 1 and all(word in str(caught.value) for word in ("no room", *words))


def test_an_error_that_has_another_cause_is_not_tried_again(run, monkeypatch, capsys):
    def build_model(*_):
        model = network()
        model.register_forward_hook(mock.Mock(side_effect=RuntimeError("mat1 and mat2 shapes")))
        return model, "random"

    monkeypatch.setattr(script, "build_model", build_model)
    assert run("out") == 1
    err = capsys.readouterr().err
    assert "mat1 and mat2 shapes" in err and "unexpected error" in err and "WARNING" not in err


# --- what the step asks of the device


class Watch(TorchDispatchMode):
    """While active, refuses what would make the processor wait for a GPU."""

    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_dim",
             "_unique2", "bincount", "repeat_interleave"}
    active, steps = False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not self.active or function.overloadpacket.__name__ not in self.WAITS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def watched_epoch(monkeypatch, criterion, **changes):
    """Steps seen in one epoch under the watch, which is on from a step's first batch until the average has moved."""
    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                watch.active = True
                yield batch

    def after_step():
        trainer.after_step()
        watch.active, watch.steps = False, watch.steps + 1

    def refuse(tensor, method):
        assert not watch.active, f"{method} waits for the device"
        return method(tensor)

    monkeypatch.setattr(script, "build_model", lambda *_: (network(True), "random"))
    monkeypatch.setattr(script, "build_optimizer", lambda model, *_: torch.optim.AdamW(model.parameters(), fused=True))
    trainer = new_trainer(**changes)
    with Watch() as watch, monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):  # no dispatch mode sees these on a CPU
            patch.setattr(torch.Tensor, name, functools.partialmethod(refuse, getattr(torch.Tensor, name)))
        one_epoch(trainer.model, Loader(batches(2, 2, 2)), criterion, trainer.optimizer, trainer.scaler, after_step,
                  **changes)
    return watch.steps


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("accumulation, clip", [(1, 1.0), (2, 0.0)])
@pytest.mark.parametrize("loss", list(script.LOSSES))
def test_no_call_inside_the_step_waits_for_the_device(loss, accumulation, clip, precision, monkeypatch, pretended):
    assert watched_epoch(monkeypatch, script.LOSSES[loss], ACCUMULATION_STEPS=accumulation, GRAD_CLIP=clip,
                         PRECISION=precision) == math.ceil(3 / accumulation)


@pytest.mark.parametrize("read_it", [bool, float, torch.Tensor.item, lambda loss: loss.cpu(), torch.nonzero,
                                     lambda loss: loss.tolist(), lambda loss: loss[loss > 0]])
def test_the_watch_notices_such_calls(read_it, monkeypatch):
    with pytest.raises(AssertionError, match="waits for the device"):
        watched_epoch(monkeypatch, lambda logits, _: read_it(logits.detach().mean()))


# --- the learning rate


def encoder_and_decoder():
    return torch.nn.Sequential(OrderedDict(encoder=torch.nn.Conv2d(3, 2, 1), decoder=torch.nn.Conv2d(2, 1, 1)))


def test_the_rate_of_each_step_of_the_warm_up(monkeypatch):
    monkeypatch.setattr(script, "build_model", lambda *_: (encoder_and_decoder(), "file"))
    for warmup, stalls, expected in (
            (4, None, [0.1, 0.175, 0.25, 0.325, 0.4, 0.4]),  # from a quarter to the whole in four steps
            (4, 3, [0.1, 0.175, 0.25, 0.1625, 0.2, 0.2]),  # a plateau on the way halves what is left, too
            (0, None, [0.4, 0.4, 0.4])):
        trainer = new_trainer(LR=0.2, LR_FROM_SCRATCH=0.4, WARMUP_STEPS=warmup, PLATEAU_PATIENCE=0, PLATEAU_FACTOR=0.5)
        rates = []  # of the second group; the first one has half of it all the time
        for step in range(len(expected)):
            if step in (1, stalls):
                trainer.per_epoch.step(0.5)  # the second time it is not better
            rates.append(trainer.optimizer.param_groups[1]["lr"])
            assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1] / 2)
            trainer.optimizer.step()
            trainer.after_step()
        assert rates == pytest.approx(expected)


def test_the_rates_follow_from_where_the_weights_come_from():
    """Random ones, chosen or forced, need a larger one."""
    model, cfg = encoder_and_decoder(), settings(LR=0.25, LR_FROM_SCRATCH=0.5, WEIGHT_DECAY=0.125)
    for origin, *rates in (("random", 0.5, 0.5), ("random (no network)", 0.5, 0.5), ("file w.pth", 0.25, 0.5),
                           ("imagenet (torchvision)", 0.25, 0.5), ("checkpoint w.pth", 0.25, 0.25)):
        optimizer = script.build_optimizer(model, cfg, origin)
        assert [(group["lr"], group["params"]) for group in optimizer.param_groups] == [
            (rate, list(part.parameters())) for rate, part in zip(rates, (model.encoder, model.decoder))]
        # Fused, it skips a bad step of float16 without asking the GPU.
        assert {(group["weight_decay"], group["fused"]) for group in optimizer.param_groups} == {(0.125, True)}
        (group,) = script.build_optimizer(network(), cfg, origin).param_groups  # without encoder
        assert group["lr"] == rates[0]


@pytest.mark.parametrize("words, origin", [
    ("--encoder-weights none", "random"), ("--encoder-weights imagenet", "imagenet (torchvision)"),
    ("--encoder-weights unreachable", "random (no network)"), ("--encoder-weights FILE", "file FILE"),
    ("--init-weights FILE --encoder-weights none", "checkpoint FILE")])
def test_where_the_weights_come_from_is_kept(words, origin, monkeypatch, tmp_path):
    """A resumed run has the same rates, without asking again."""
    def load_imagenet_weights(*_):
        if "unreachable" in words:
            raise ConnectionError("no network")
        return "imagenet (torchvision)"

    model = encoder_and_decoder()
    monkeypatch.setattr(script, "build_model", lambda encoder, weights, _: (
        model, script.load_encoder_weights(model.encoder, encoder, weights)))
    monkeypatch.setattr(script, "load_imagenet_weights", load_imagenet_weights)
    file = str(tmp_path / "file.pth")
    torch.save((model if "init" in words else model.encoder).state_dict(), file)
    given = words.replace("unreachable", "imagenet").replace("FILE", file).split()
    cfg, _ = script.read_settings(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path), *given])
    trainer = script.Trainer(cfg, CPU, "data", 4)
    again = script.Trainer(cfg, CPU, "data", 4, copy.deepcopy(trainer.state()))
    assert again.weights_from == trainer.weights_from == origin.replace("FILE", file)
    assert differences(again.state(), trainer.state()) == []


# --- the EMA of the weights


def test_the_ema_is_the_one_computed_by_hand(tiny):
    """Over 1.5 epochs of two steps it keeps 2/3 a step; before the 17th less: 2/11, 3/12, ..., (1 + t) / (10 + t)."""
    trainer, expected = new_trainer(2, EMA_EPOCHS=1.5), 5.0
    for value in trainer.ema_values:
        value.fill_(expected)
    for step in range(1, 25):
        for value in trainer.model.state_dict().values():
            value.fill_(step)
        trainer.optimizer.step()
        trainer.after_step()
        keep = 2 / 3 if step >= 17 else (1 + step) / (10 + step)
        expected = keep * expected + (1 - keep) * step
    trainer.sync_batchnorm_statistics()
    for value in trainer.ema.state_dict().values():  # weights and BatchNorm's statistics; its counter is copied
        torch.testing.assert_close(value, torch.full_like(value, expected if value.is_floating_point() else 24))


@pytest.mark.parametrize("epochs", [1.0, 0.0])
def test_an_ema_over_0_epochs_is_exactly_the_last_weights(epochs, tiny):
    trainer = new_trainer(EMA_EPOCHS=epochs)
    train(trainer, batches(2, 2))
    trainer.sync_batchnorm_statistics()
    assert (differences(trainer.ema.state_dict(), trainer.model.state_dict()) == []) == (epochs == 0)


def test_validation_best_model_and_plateau_follow_the_ema(run, tmp_path, monkeypatch):
    """Patience 1: the second epoch without a better Dice halves the rate of the next one. Higher is better."""
    seen, dice = [], [0.1, 0.2, 0.2, 0.2, 0.3, 0.1]

    def validate(model, *rest, inner=script.validate, **options):
        seen.append(copy.deepcopy(model.state_dict()))
        return inner(model, *rest, **options) | {"dice": dice[len(seen) - 1]}

    monkeypatch.setattr(script, "validate", validate)
    assert run("out", "--epochs", 6, "--ema-epochs", 2, "--plateau-patience", 1, "--plateau-factor", 0.5,
               "--warmup-steps", 0, "--lr", 0.01) == 0
    state = read(tmp_path / "out")
    assert differences(state["ema"], seen[5]) == [] and differences(state["model"], seen[5]) != []
    assert differences(read(tmp_path / "out", BEST), seen[4]) == [] and state["best_epoch"] == 5
    assert [row["lr"] for row in state["history"]] == [0.01, 0.01, 0.01, 0.01, 0.005, 0.005]


# --- memory format, compilation


def set_processor(monkeypatch, capability):
    """As if PyTorch's kernels were those for such a processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize("capability, layout", [("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last),
                                                ("DEFAULT", torch.channels_last)])  # ARM
def test_the_memory_format_follows_the_processor_through_the_whole_network(capability, layout, monkeypatch):
    """A layer that returned another format would cost a copy in each direction."""
    set_processor(monkeypatch, capability)
    assert script.memory_format(CPU) == layout and script.memory_format(torch.device("cuda")) == torch.channels_last
    model, other = new_trainer().model, []
    assert all(weight.is_contiguous(memory_format=layout) for weight in model.parameters() if weight.ndim == 4)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.Conv2d)):
        module.register_forward_hook(lambda module, inputs, output: other.extend(
            module for value in (*inputs, output) if not value.is_contiguous(memory_format=layout)))
    for images in (np.zeros((2, 64, 64, 3), np.uint8), torch.zeros(2, 3, 64, 64)):
        images = script.to_input(images, CPU)
        assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32
        model(images)
    assert other == []


@pytest.mark.parametrize("saved, now", [("AVX512", "AVX2"), ("AVX2", "AVX512")])
def test_a_state_goes_on_in_another_memory_format(saved, now, monkeypatch):
    """The fused optimizer walks through weights and moments side by side: in different formats it would mix them up."""
    def step(trainer):
        train(trainer, batches(2, 2))
        return flat(trainer.model)

    monkeypatch.setattr(script, "build_model", lambda *_: (network(), "random"))
    set_processor(monkeypatch, saved)
    trainer = new_trainer(LR_FROM_SCRATCH=1e-2, WARMUP_STEPS=0)
    before, state = step(trainer), copy.deepcopy(trainer.state())
    expected = step(trainer)
    set_processor(monkeypatch, now)
    again = new_trainer(state=state, LR_FROM_SCRATCH=1e-2, WARMUP_STEPS=0)
    for weight, moments in again.optimizer.state.items():
        assert {value.stride() for value in moments.values() if value.shape == weight.shape} == {weight.stride()}
    assert (step(again) - expected).norm() < 0.01 * (expected - before).norm()  # float32 sums in another order


def test_a_compiled_run_saves_what_a_plain_model_loads(run, tmp_path, monkeypatch):
    """The eager backend traces and wraps the model like any other, without needing a C++ compiler."""
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self: compiled.append(self) or compile_module(self, backend="eager"))
    assert run("out", "--compile", "--epochs", 1) == 0
    assert len(compiled) == 2  # the model, and the average for validation
    for weights in (read(tmp_path / "out", BEST), read(tmp_path / "out")["model"]):
        tiny_build_model()[0].load_state_dict(weights)
    torch._dynamo.reset()
