"""The training step: gradients, bad numbers, memory, what it asks of the device; rate, average, memory format."""

import contextlib
import copy
import functools
import itertools
import math
import weakref
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from background import arguments, differences, load_best, read, table_rows
from conftest import script, tiny_build_model
from torch.utils._python_dispatch import TorchDispatchMode

CPU, BEST = torch.device("cpu"), script.BEST


def settings(**changes):
    """The constants with changes; float32, and a small network, unless they say otherwise."""
    return SimpleNamespace(**vars(script.default_settings()) | {
        "PRECISION": "float32", "ACCUMULATION_STEPS": 1, "ENCODER": "resnet18", "ENCODER_WEIGHTS": None} | changes)


def new_run(steps_per_epoch=3, state=None, **changes):
    return script.Run(settings(**changes), CPU, "data", steps_per_epoch, state)


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


def one_epoch(model, loader, criterion=script.dice_bce, optimizer=None, scaler=None, limit=None, after_step=None,
              **changes):
    """Train on these batches; returns (what train_one_epoch() says, all that it changes)."""
    cfg, optimizer = settings(**changes), optimizer or torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    scaler = scaler or script.make_scaler(cfg.PRECISION, CPU)
    stats = script.train_one_epoch(model, loader, criterion, optimizer, scaler, CPU, cfg=cfg, limit=limit,
                                   after_step=after_step)
    return stats, [model.state_dict(), optimizer.state_dict()["state"], scaler.state_dict()]


def plain_steps(model, loader, **options):
    """(change of the weights, loss) in an epoch of plain descent, which moves them by 0.1 times the gradient."""
    before = flat(model)
    stats, _ = one_epoch(model, loader, optimizer=torch.optim.SGD(model.parameters(), 0.1), **options)
    return flat(model) - before, stats["train_loss"]


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def train(run, loader, criterion=script.dice_bce):
    return one_epoch(run.model, loader, criterion, run.optimizer, run.scaler, after_step=run.after_step)[0]


@pytest.fixture
def pretended(monkeypatch):
    """float16 and bfloat16 without their arithmetic, which most processors emulate; a list of what was asked for."""
    asked = []
    monkeypatch.setattr(script, "autocast", lambda *words: asked.append(words[0]) or contextlib.nullcontext())
    return asked


@pytest.fixture
def run(tiny, monkeypatch, tmp_path):
    """A run in this process, without pictures: run(name of its folder, *options) returns the exit code."""
    for name in ("plot_samples", "plot_history", "plot_predictions"):
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


@pytest.mark.parametrize("precision", ["float32", "float16"])  # the second one scales them
def test_gradients_are_clipped_to_the_given_norm(precision, pretended):
    small, smaller, free = (plain_steps(network(), batches(4), GRAD_CLIP=clip, PRECISION=precision)[0].norm().item()
                            for clip in (0.01, 0.001, 0.0))
    assert [small, smaller] == pytest.approx([1e-3, 1e-4], rel=0.01) and free > 0.002


@pytest.mark.parametrize("optimizer", [functools.partial(torch.optim.AdamW, fused=True), torch.optim.AdamW,
                                       torch.optim.SGD])
def test_six_arguments_are_enough(optimizer):
    """Float batches from any loader, any optimizer, the constants for the rest; bad steps are left out here, too."""
    model = network().eval()
    good, bad = torch.randn(2, 3, 32, 32), torch.full((2, 3, 32, 32), math.nan)
    loader = [(images, (torch.rand(2, 1, 32, 32) < 0.3).float()) for images in (good, bad, good)]
    before = copy.deepcopy(model.state_dict())
    stats = script.train_one_epoch(model, loader, script.FocalTverskyLoss(), optimizer(model.parameters(), 1e-3),
                                   script.make_scaler("auto", CPU), CPU)
    assert math.isfinite(stats["train_loss"]) and stats["dropped"] == 1 and model.training
    assert all(value.isfinite().all() and not torch.equal(value, before[name])
               for name, value in model.state_dict().items())


def test_training_lowers_the_loss_on_what_it_sees():
    model = network()
    first, *_, last = (one_epoch(model, batches(4, 4, 4))[0]["train_loss"] for _ in range(15))
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


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [*SPOILS, "NaN image"])
def test_a_bad_step_leaves_no_trace(kind, accumulation):
    """Neither in weights, moments and counts, nor in BatchNorm's statistics, which the forward pass changes already."""
    loader = batches(*[2] * 3 * accumulation)
    expected_stats, expected = one_epoch(network(True), loader[:accumulation] + loader[2 * accumulation:],
                                         ACCUMULATION_STEPS=accumulation)
    if kind == "NaN image":
        loader[accumulation] = torch.full((2, 3, 16, 16), math.nan), torch.zeros(2, 1, 16, 16)
    criterion = spoilt([accumulation + 1], kind) if kind in SPOILS else script.dice_bce
    stats, state = one_epoch(network(True), loader, criterion, ACCUMULATION_STEPS=accumulation)
    assert stats == expected_stats | {"dropped": 1} and expected_stats["dropped"] == 0
    assert differences(state, expected) == []


@pytest.mark.parametrize("precision, kind, calls, steps, dropped, is_bad, scale", [
    ("float32", "NaN loss", [1, 2], 4, 2, False, 1),
    ("float32", "NaN loss", [1, 2, 3], 4, 3, True, 1),  # more than half of the steps
    ("float16", "infinite gradient", [1, 2, 3], 4, 0, False, 2.0**13),  # calibration: by design, and not counted
    ("float16", "NaN loss", [2], 4, 1, False, 2.0**15),  # not the scale's fault
    ("float16", "infinite gradient", range(99), 20, 0, True, 2.0**-4)])  # no scale helps
def test_what_makes_an_epoch_bad(precision, kind, calls, steps, dropped, is_bad, scale, pretended):
    stats, state = one_epoch(network(), batches(*[1] * steps), spoilt(calls, kind), PRECISION=precision)
    assert stats["dropped"] == dropped and math.isnan(stats["train_loss"]) == is_bad and state[2]["scale"] == scale


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
def test_a_bad_epoch_goes_back_once_and_on_in_float32(is_bad, epoch, run, faulty, tmp_path, capsys):
    """Training or validation; to the state on disk, if need be that of the start: as if nothing had happened."""
    assert run("expected", "--epochs", 3) == 0
    faulty(lambda step, precision, training: precision != "float32" and is_bad(step, training))
    assert run("out", "--epochs", 3, "--precision", "bfloat16") == 0
    err = capsys.readouterr().err
    assert err.count(f"Going back to the end of epoch {epoch} and on in float32") == err.count("Going back") == 1
    state, expected = read(tmp_path / "out"), read(tmp_path / "expected")
    assert state.pop("reverted") and not expected.pop("reverted")
    assert differences(state | {"settings": 0}, expected | {"settings": 0}) == []
    # And a resumed run stays in float32, and says so.
    assert run("out", "--epochs", 4, "--precision", "bfloat16", "--resume") == 0
    out, err = capsys.readouterr()
    assert "Going back" not in err and "float32" in out.splitlines()[0] and "bfloat16" not in out


def test_a_bad_epoch_in_float32_is_not_tried_again(run, faulty, capsys):
    """It would go the same way."""
    faulty(lambda step, _, training: step > 5)
    assert run("out", "--epochs", 3) == 1
    err = capsys.readouterr().err
    assert "in float32. The best model so far is kept" in err and "Going back" not in err


def test_a_second_bad_epoch_ends_the_run_with_an_explanation(run, faulty, tmp_path, capsys):
    """And a single dropped step, here in the first epoch, is shown in its line and in the table."""
    faulty(lambda step, _, training: training and (step == 2 or step > 5))  # four steps an epoch
    assert run("out", "--epochs", 3, "--precision", "bfloat16") == 1
    out, err = capsys.readouterr()
    assert err.count("Going back to the end of epoch 1") == 1
    assert "in float32 too. The best model so far is kept" in err and "LR" in err and "Traceback" not in err
    line, = (line for line in out.splitlines() if line.startswith("epoch "))
    names, row = table_rows(tmp_path / "out")
    assert "dropped 1" in line and row[names.index("dropped")] == "1"
    state = read(tmp_path / "out")
    assert state["epoch"] == 1 and differences(state, state) == [] and load_best(tmp_path / "out") == ""  # NaN != NaN


@pytest.mark.parametrize("find", [lambda run: run.model[1].running_var, lambda run: run.average[0].weight,
                                  lambda run: next(iter(run.optimizer.state.values()))["exp_avg"]])
def test_a_state_with_a_number_that_is_not_finite_is_never_written(find, tiny, tmp_path):
    run = new_run()
    train(run, batches(2))
    find(run).data[0] = math.inf
    with pytest.raises(script.TrainerError, match="not finite, and was not saved") as caught:
        script.CheckpointWriter(tmp_path, {}).write(run.state())
    assert caught.value.exit_code == 1 and not any(tmp_path.iterdir())


def test_a_state_in_bfloat16_is_written(tiny, tmp_path):
    """As somebody may have it who edits the script."""
    run = new_run()
    run.model.bfloat16()
    script.CheckpointWriter(tmp_path, {}).write(run.state())
    assert read(tmp_path)["model"]["0.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("layers", [1, 60])
def test_running_statistics_restores_every_kind_of_number_with_few_kernels(layers):
    model, kinds = torch.nn.Module(), (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
    for number, dtype in itertools.product(range(layers), kinds):
        model.register_buffer(f"table_{dtype}_{number}".replace(".", "_"), torch.tensor([[1, 0], [1, 1]], dtype=dtype))
        model.register_buffer(f"number_{dtype}_{number}".replace(".", "_"), torch.tensor(1, dtype=dtype))
    before, statistics = copy.deepcopy(model.state_dict()), script.RunningStatistics(model)
    with Watch() as watch:
        watch.active = True
        statistics.remember()
        statistics.restore(torch.ones((), dtype=torch.bool))
    assert watch.kernels <= 1 + 4 * len(kinds)
    for buffer in model.buffers():
        buffer.fill_(math.nan if buffer.is_floating_point() else 0)
    changed = copy.deepcopy(model.state_dict())
    statistics.restore(torch.tensor(False))
    torch.testing.assert_close(model.state_dict(), changed, rtol=0, atol=0, equal_nan=True)
    statistics.restore(torch.tensor(True))
    assert differences(model.state_dict(), before) == []


def test_outside_float16_the_scale_stays_1_and_does_not_change_the_arithmetic():
    """If each dropped step halved the scale, it would be 0 after 160 of them, and the weights NaN."""
    model, plain, loader = network(), network(), batches(*[1] * 160, 2, 2, 2)
    _, state = one_epoch(model, loader, spoilt(range(1, 161)))
    one_epoch(plain, loader[160:], scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert state[2]["scale"] == 1 and differences(model.state_dict(), plain.state_dict()) == []


@pytest.mark.parametrize("saved, now, scale", [("float16", "float32", 1), ("float32", "float16", 2.0**16),
                                               ("float16", "float16", 256)])
def test_a_scale_does_not_pass_between_precisions(saved, now, scale, tiny):
    run = new_run(PRECISION=saved)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 256.0 if saved == "float16" else 1.0})
    assert new_run(PRECISION=now, state=run.state()).scaler.get_scale() == scale


# --- memory that runs out


class Limited(torch.nn.Module):
    """A network with memory for so many images at a time, in the forward or in the backward pass."""

    def __init__(self, most, where="forward", norm=False):
        super().__init__()
        self.inner, self.most, self.where, self.sizes, self.graphs_kept = network(norm), most, where, [], 0

    def forward(self, images):
        def run_out(value):
            if len(images) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return value

        if self.sizes and self.sizes[-1] > self.most:  # this is a repetition
            self.graphs_kept += self.in_graph() is not None
        self.sizes, self.in_graph = [*self.sizes, len(images)], weakref.ref(run_out)  # lives as long as the graph
        logits = Backward.apply(self.inner(images), run_out)  # first the whole pass, which changes the statistics
        return run_out(logits) if self.where == "forward" else logits


@pytest.mark.parametrize("sizes, accumulation, most, where, passes", [
    ([8], 1, 4, "forward", [8, 4, 4]), ([7], 1, 3, "forward", [7, 4, 2, 2, 2, 1]),
    ([4], 1, 1, "backward", [4, 2, 1, 1, 1, 1]),
    ([3, 5], 2, 4, "forward", [3, 5, 3, 3, 2]),  # the first pass has left its gradients when the second one fails
    ([3, 5], 2, 4, "backward", [3, 5, 3, 3, 2])])
def test_a_step_in_small_parts_has_the_gradient_of_the_whole_batch(sizes, accumulation, most, where, passes, capfd):
    """Where there is no BatchNorm; and before it is repeated, the failed pass has let go of its graph."""
    options = {"ACCUMULATION_STEPS": accumulation, "GRAD_CLIP": 0.0}
    expected, expected_loss = plain_steps(Limited(100), batches(*sizes), **options)
    model = Limited(most, where)
    found, loss = plain_steps(model, batches(*sizes), **options)
    assert model.sizes == passes and model.graphs_kept == 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert capfd.readouterr().err.count("WARNING") == sum(size > most for size in passes)


def test_the_bound_stays_for_later_steps_and_a_repeated_step_counts_once_for_batchnorm():
    """What the failed passes did to the running statistics is undone: all is as with this bound from the start."""
    tried, direct, bounds = Limited(2, norm=True), Limited(100, norm=True), [script.MemoryLimit() for _ in range(2)]
    bounds[1].images = 2
    states = [one_epoch(model, batches(8, 8), limit=limit)[1] for model, limit in zip((tried, direct), bounds)]
    assert tried.sizes == [8, 4, 2, 2, 2, 2] + [2, 2, 2, 2] and direct.sizes == [2, 2, 2, 2] * 2
    assert bounds[0].images == 2 and differences(*states) == []


def test_validation_halves_its_batches_too_with_the_same_scores():
    model, limit = Limited(2), script.MemoryLimit()
    expected, found = (script.validate(each, batches(6, 5), script.dice_bce, CPU, cfg=settings(), limit=limit)
                       for each in (Limited(100), model))
    assert found == pytest.approx(expected, rel=1e-5) and model.sizes == [6, 3, 2, 2, 2, 2, 2, 1] and limit.images == 2


def test_a_run_goes_on_with_smaller_parts_and_says_so_once(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "build_model", lambda *_: (Limited(1, norm=True), "random"))
    assert run("out", "--epochs", 2) == 0
    err = capsys.readouterr().err
    assert err.count("WARNING") == err.count("at most 1 image(s)") == 1 and "BatchNorm" in err
    assert len(table_rows(tmp_path / "out")) == 3


@pytest.mark.parametrize("exhaust", [
    mock.Mock(side_effect=RuntimeError("GET was unable to find an engine to execute this computation")),  # of cuDNN
    lambda: torch.empty(2**50), lambda: np.empty(2**50)])  # more than a processor can address
def test_memory_may_run_out_in_any_form(exhaust, capsys):
    limit, tried, undone = script.MemoryLimit(), [], []

    def work(size):
        tried.append(size)
        return exhaust() if size > 3 else f"done with {size}"

    assert limit.run(work, 16, lambda: undone.append(1)) == limit.run(work, 16) == "done with 2"
    assert tried == [16, 8, 4, 2, 2] and undone == [1, 1, 1] and limit.run(work, 1) == "done with 1"
    assert "at most 8 image(s)" in capsys.readouterr().err


@pytest.mark.parametrize("error, processes, raised, words", [
    (MemoryError(), 1, script.TrainerError, ("single image", "IMG_SIZE", "ENCODER", "--device cpu")),
    (MemoryError(), 2, script.TrainerError, ("several processes", "BATCH_SIZE", "ACCUMULATION_STEPS")),
    (RuntimeError("mat1 and mat2 shapes"), 1, RuntimeError, ["mat1 and mat2 shapes"])])
def test_where_repeating_cannot_help_the_error_says_what_does(error, processes, raised, words, monkeypatch):
    """Not even one image fits; other processes would wait for this one; it is another error."""
    monkeypatch.setattr(script, "world_size", lambda: processes)
    with pytest.raises(raised) as caught:
        script.MemoryLimit().run(mock.Mock(side_effect=[error] * 5), 8)
    assert getattr(caught.value, "exit_code", 1) == 1 and all(word in str(caught.value) for word in words)


# --- what the step asks of the device


class Watch(TorchDispatchMode):
    """While active, counts the kernels and refuses what would make the processor wait for a GPU."""

    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_dim",
             "_unique2", "bincount", "repeat_interleave"}
    active, kernels, steps = False, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not self.active or function.overloadpacket.__name__ not in self.WAITS, f"{function} waits for the device"
        self.kernels += self.active and not function.is_view
        return function(*args, **(kwargs or {}))


def watched_epoch(monkeypatch, criterion, **changes):
    """Steps seen in one epoch under the watch, which is on from a step's first batch until the average has moved."""
    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                watch.active = True
                yield batch

    def after_step():
        run.after_step()
        watch.active, watch.steps = False, watch.steps + 1

    def refuse(tensor, method):
        assert not watch.active, f"{method} waits for the device"
        return method(tensor)

    monkeypatch.setattr(script, "build_model", lambda *_: (network(True), "random"))
    run = new_run(**changes)
    with Watch() as watch, monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):  # no dispatch mode sees these on a CPU
            patch.setattr(torch.Tensor, name, functools.partialmethod(refuse, getattr(torch.Tensor, name)))
        one_epoch(run.model, Loader(batches(2, 2, 2)), criterion, run.optimizer, run.scaler, after_step=after_step,
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


@pytest.mark.parametrize("warmup, stalls, expected", [
    (4, None, [0.1, 0.175, 0.25, 0.325, 0.4, 0.4]),  # from a quarter to the whole in four steps
    (4, 3, [0.1, 0.175, 0.25, 0.1625, 0.2, 0.2]),  # a plateau on the way halves what is left, too
    (0, None, [0.4, 0.4, 0.4])])
def test_the_rate_of_each_step_of_the_warm_up(warmup, stalls, expected, tiny):
    run = new_run(LR_RANDOM_START=0.4, WARMUP_STEPS=warmup, PLATEAU_PATIENCE=0, PLATEAU_FACTOR=0.5)
    run.optimizer.param_groups[0]["lr"], run.warmup.base_lrs[0] = run.optimizer.param_groups[1]["lr"] / 2, 0.2
    rates = []  # of the second group; the first one has half of it all the time
    for step in range(len(expected)):
        if step in (1, stalls):
            run.plateau.step(0.5)  # the second time it is not better
        rates.append(run.optimizer.param_groups[1]["lr"])
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1] / 2)
        run.optimizer.step()
        run.after_step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("words, encoder, decoder, origin", [
    ("--encoder-weights none", 0.5, 0.5, "random"),
    ("--encoder-weights imagenet", 0.25, 0.5, "imagenet"),
    ("--encoder-weights unreachable", 0.5, 0.5, "random (download failed: ConnectionError: no network)"),
    ("--encoder-weights FILE", 0.25, 0.5, "file FILE"),
    ("--init-weights FILE --encoder-weights none", 0.25, 0.25, "checkpoint FILE"),
    ("--encoder-weights none --lr 0.125", 0.125, 0.125, "random"),
    ("--encoder-weights FILE --lr 0.125", 0.125, 0.125, "file FILE"),
    ("--encoder-weights FILE --lr 0.125 --lr-random-start 0.0625", 0.125, 0.0625, "file FILE")])
def test_the_start_decides_about_the_rates_and_says_so(words, encoder, decoder, origin, monkeypatch, tmp_path, capsys):
    """Random weights, chosen or forced, need a larger one; a --lr that the user gives wins; a resumed run keeps it."""
    def create_model(*_, encoder_weights=None, **__):
        if encoder_weights and "unreachable" in words:
            raise ConnectionError("no network")
        return model

    model = torch.nn.Module()
    model.encoder, model.decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    for name_in_script, value in {"LR": 0.25, "LR_RANDOM_START": 0.5, "WARMUP_STEPS": 0}.items():
        monkeypatch.setattr(script, name_in_script, value)
    monkeypatch.setattr(script.smp, "create_model", create_model)
    file = str(tmp_path / "file.pth")
    torch.save((model if "init" in words else model.encoder).state_dict(), file)
    given = words.replace("unreachable", "imagenet").replace("FILE", file).split()
    cfg, _ = script.read_settings(["--data-dir", str(tmp_path), "--output-dir", str(tmp_path), *given])
    run = script.Run(cfg, CPU, "data", 4, None)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Learning rate {encoder:g} for the encoder, whose weights are: {origin.replace('FILE', file)}; {decoder:g} "
        "for the rest of the network.")
    again = script.Run(cfg, CPU, "data", 4, run.state())
    for each in (run, again):
        assert [(group["lr"], group["params"]) for group in each.optimizer.param_groups] == [
            (encoder, list(each.model.encoder.parameters())), (decoder, list(each.model.decoder.parameters()))]
        assert {group["weight_decay"] for group in each.optimizer.param_groups} == {cfg.WEIGHT_DECAY}
    assert again.weights_from == run.weights_from


# --- the moving average of the weights


def test_the_moving_average_is_the_one_computed_by_hand(tiny):
    """Over 1.5 epochs of two steps it keeps 2/3 a step; before the 17th less: 2/11, 3/12, ..., (1 + t) / (10 + t)."""
    run, expected = new_run(2, AVERAGE_EPOCHS=1.5), 5.0
    for value in run.averaged:
        value.fill_(expected)
    for step in range(1, 25):
        for value in run.model.state_dict().values():
            value.fill_(step)
        run.optimizer.step()
        run.after_step()
        keep = 2 / 3 if step >= 17 else (1 + step) / (10 + step)
        expected = keep * expected + (1 - keep) * step
    run.share_statistics()
    for value in run.average.state_dict().values():  # weights and BatchNorm's statistics; its counter is copied
        torch.testing.assert_close(value, torch.full_like(value, expected if value.is_floating_point() else 24))


@pytest.mark.parametrize("epochs", [1.0, 0.0])
def test_after_a_dropped_step_the_average_moves_on_with_unchanged_weights(epochs, monkeypatch):
    """An average over 0 epochs is exactly the last weights."""
    monkeypatch.setattr(script, "build_model", lambda *_: (network(True), "random"))
    first, bad, last = batches(2, 2, 2)
    dropped, expected = (new_run(AVERAGE_EPOCHS=epochs) for _ in range(2))
    assert train(dropped, [first, bad, last], spoilt([2]))["dropped"] == 1
    train(expected, [first])
    expected.after_step()
    train(expected, [last])
    for run in (dropped, expected):
        run.share_statistics()
    assert differences(dropped.state(), expected.state()) == []
    assert (differences(dropped.average.state_dict(), dropped.model.state_dict()) == []) == (epochs == 0)


def test_validation_best_model_and_plateau_follow_the_average(run, tmp_path, monkeypatch):
    """Patience 1: the second epoch without a better Dice halves the rate of the next one. Higher is better."""
    seen, dice = [], [0.1, 0.2, 0.2, 0.2, 0.3, 0.1]

    def validate(model, *rest, inner=script.validate, **options):
        seen.append(copy.deepcopy(model.state_dict()))
        return inner(model, *rest, **options) | {"dice": dice[len(seen) - 1]}

    monkeypatch.setattr(script, "validate", validate)
    assert run("out", "--epochs", 6, "--average-epochs", 2, "--plateau-patience", 1, "--plateau-factor", 0.5,
               "--warmup-steps", 0, "--lr", 0.01) == 0
    state = read(tmp_path / "out")
    assert differences(state["average"], seen[5]) == [] and differences(state["model"], seen[5]) != []
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
    model, other = new_run().model, []
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
    def step(run):
        train(run, batches(2, 2))
        return flat(run.model)

    monkeypatch.setattr(script, "build_model", lambda *_: (network(), "random"))
    set_processor(monkeypatch, saved)
    run = new_run(LR_RANDOM_START=1e-2, WARMUP_STEPS=0)
    before, state = step(run), run.state()
    expected = step(run)
    set_processor(monkeypatch, now)
    again = new_run(state=state, LR_RANDOM_START=1e-2, WARMUP_STEPS=0)
    assert type(again.optimizer) is torch.optim.AdamW and all(group["fused"] for group in again.optimizer.param_groups)
    for weight, moments in again.optimizer.state.items():
        assert {moments[name].stride() for name in ("exp_avg", "exp_avg_sq")} == {weight.stride()}
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
