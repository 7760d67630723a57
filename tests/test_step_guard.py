"""Training steps with numbers that are not finite, or without enough memory."""

import numpy as np
import pytest
import torch
from background import (
    BFLOAT16,
    RISING,
    arguments,
    assert_same_run,
    copy_run,
    differences,
    load_best,
    read,
    run,
    table_rows,
    whole_run,
)
from conftest import script

BEST, LAST = script.BEST, script.LAST
CPU = torch.device("cpu")


# --- numbers that are not finite


class Faulty(torch.nn.Module):
    """The default criterion, spoilt at chosen calls. spoil: loss -> loss."""

    def __init__(self, calls, spoil):
        super().__init__()
        self.inner, self.calls, self.spoil, self.seen = script.LOSSES["dice_bce"](), calls, spoil, 0

    def forward(self, logits, targets):
        loss = self.inner(logits, targets)
        self.seen += 1
        return self.spoil(loss) if self.seen in self.calls else loss


class SpoiltGradient(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx, loss, value):
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value, None


SPOILS = {"NaN loss": lambda loss: loss * float("nan"), "infinite loss": lambda loss: loss + float("inf"),
          "NaN gradient": lambda loss: SpoiltGradient.apply(loss, float("nan")),
          "infinite gradient": lambda loss: SpoiltGradient.apply(loss, float("inf"))}


def settings(**changes):
    cfg = script.default_settings()
    vars(cfg).update({"PRECISION": "float32", "DEVICE": "cpu", "ACCUMULATION_STEPS": 1} | changes)
    return cfg


def fresh_model():
    torch.manual_seed(0)
    return script.build_model("mobilenet_v2", None)[0]


def batches(sizes, seed=0):
    """Batches as the loader sends them."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (size, 64, 64, 3), np.uint8), (rng.random((size, 64, 64)) < 0.3).astype(np.uint8))
            for size in sizes]


def one_epoch(loader, criterion, model=None, cfg=None, guard=None):
    """Train fresh weights on these batches; returns (statistics, [weights and buffers, optimizer state])."""
    cfg, model = cfg or settings(), model or fresh_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    scaler = script.make_scaler("float32", CPU)
    stats = script.train_one_epoch(model, loader, criterion, optimizer, scaler, CPU, cfg=cfg, guard=guard)
    return stats, [model.state_dict(), optimizer.state_dict()["state"]]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_step_leaves_no_trace(spoil):
    good, bad, last = batches([2, 2, 2])
    stats, state = one_epoch([good, bad, last], Faulty([2], SPOILS[spoil]))
    expected_stats, expected = one_epoch([good, last], Faulty([], None))
    assert stats["dropped"] == 1 and expected_stats["dropped"] == 0 and stats["persistent"] == 0
    assert differences(state, expected) == []  # weights, BatchNorm's statistics, moments and step counts
    assert stats["train_loss"] == expected_stats["train_loss"]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_batch_drops_its_whole_group(spoil):
    loader = batches([2, 2, 2, 2, 2, 2])
    cfg = settings(ACCUMULATION_STEPS=2)
    stats, state = one_epoch(loader, Faulty([3], SPOILS[spoil]), cfg=cfg)
    _, expected = one_epoch(loader[:2] + loader[4:], Faulty([], None), cfg=cfg)
    assert stats["dropped"] == 1
    assert differences(state, expected) == []


def test_a_bad_image_does_not_reach_batchnorm():
    """NaN pixels spoil the running statistics in the forward pass already."""
    good, bad, last = batches([2, 2, 2])
    poison = torch.full((2, 3, 64, 64), float("nan")), torch.zeros(2, 1, 64, 64)
    stats, state = one_epoch([good, poison, last], Faulty([], None))
    _, expected = one_epoch([good, last], Faulty([], None))
    assert stats["dropped"] == 1 and differences(state, expected) == []


def test_many_bad_steps_are_called_persistent():
    loader = batches([2] * 4)
    assert one_epoch(loader, Faulty([1, 2, 3], SPOILS["NaN loss"]))[0]["persistent"] == 1
    assert one_epoch(loader, Faulty([1, 2], SPOILS["NaN loss"]))[0]["persistent"] == 0


# In a run: the criterion is spoilt in chosen calls of the training (gradients are on there).
def bad_run(condition):
    return """
state = types.SimpleNamespace(step=0, precision=None)
def autocast(precision, device, inner=script.autocast):
    state.precision = precision
    return inner(precision, device)
script.autocast = autocast
class Criterion(torch.nn.Module):
    inner = script.LOSSES["dice_bce"]()
    def forward(self, logits, targets):
        loss = self.inner(logits, targets)
        if torch.is_grad_enabled():
            state.step += 1
            if CONDITION:
                loss = loss * float("nan")
        return loss
script.LOSSES["dice_bce"] = Criterion
""".replace("CONDITION", condition).replace("\nstate", "\nimport types\nstate", 1)


def finite_files(folder):
    def finite(value):
        if isinstance(value, torch.Tensor):
            return bool(torch.isfinite(value).all())
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return all(map(finite, items))

    return finite(read(folder, BEST)) and finite(read(folder, LAST))


def test_a_dropped_step_is_shown_in_the_line_and_the_table(tmp_path):
    code, text = run(arguments(tmp_path, "--epochs", 2), bad_run("state.step == 6"))
    assert code == 0, text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert "dropped" not in lines[0] and "dropped 1" in lines[1]
    rows = table_rows(tmp_path)
    assert [row[rows[0].index("dropped")] for row in rows[1:]] == ["0", "1"]
    assert finite_files(tmp_path)


def test_persistent_trouble_goes_back_once_and_on_in_float32(tmp_path):
    patch = BFLOAT16 + bad_run("state.step > 5 and state.precision != 'float32'")
    code, text = run(arguments(tmp_path, "--epochs", 3, "--precision", "bfloat16"), patch)
    assert code == 0, text
    assert text.count("Going back to the end of epoch 1 and on in float32") == 1
    assert [row[0] for row in table_rows(tmp_path)[1:]] == ["1", "2", "3"]
    assert finite_files(tmp_path) and load_best(tmp_path) == ""
    # The rest is what float32 gives after one epoch in bfloat16.
    first = tmp_path / "first"
    assert run(arguments(first, "--epochs", 1, "--precision", "bfloat16"), BFLOAT16)[0] == 0
    assert run(arguments(first, "--epochs", 3, "--precision", "float32", "--resume"), BFLOAT16)[0] == 0
    assert differences(read(first)["model"], read(tmp_path)["model"]) == []
    # And a resumed run stays in float32.
    code, text = run(arguments(tmp_path, "--epochs", 4, "--precision", "bfloat16", "--resume"),
                     BFLOAT16 + bad_run("state.precision != 'float32'"))
    assert code == 0 and "Going back" not in text, text


def test_persistent_trouble_in_float32_stops_with_an_explanation(tmp_path):
    code, text = run(arguments(tmp_path, "--epochs", 3), bad_run("state.step > 5"))
    assert code == 1, text
    assert text.count("Going back to the end of epoch 1") == 1
    assert "also after going back" in text and "LR" in text and "Traceback" not in text
    assert read(tmp_path)["epoch"] == 1 and finite_files(tmp_path) and load_best(tmp_path) == ""


def test_trouble_from_the_first_step_on_leaves_an_earlier_run_alone(tmp_path):
    folder = copy_run(whole_run(), tmp_path / "out")
    code, text = run(arguments(folder, "--seed", 5), bad_run("True"))
    assert code == 1 and "Going back to the end of epoch 0" in text and "also after going back" in text
    assert_same_run(folder, whole_run())


def test_trouble_in_the_first_epoch_only_goes_back_to_the_start(tmp_path):
    code, text = run(arguments(tmp_path, "--precision", "bfloat16"), bad_run("state.precision != 'float32'"))
    assert code == 0 and "Going back to the end of epoch 0" in text, text
    assert differences(read(tmp_path)["model"], read(whole_run())["model"]) == []


def test_a_validation_loss_that_is_not_finite_goes_back(tmp_path):
    patch = """
def validate(*args, cfg, inner=script.validate, **options):
    return inner(*args, cfg=cfg, **options) | ({"valid_loss": float("nan")} if cfg.PRECISION != "float32" else {})
script.validate = validate
"""
    code, text = run(arguments(tmp_path, "--epochs", 1, "--precision", "bfloat16"), BFLOAT16 + patch)
    assert code == 0 and "Going back" in text and finite_files(tmp_path), text


@pytest.mark.parametrize("spoil", ["model.state_dict()['encoder.features.0.0.weight'][0] = float('nan')",
                                   "model.state_dict()['encoder.features.0.1.running_var'][0] = float('inf')"])
def test_no_checkpoint_holds_a_number_that_is_not_finite(spoil, tmp_path):
    """Whatever goes wrong between validation and checkpoint, the files of the epoch before stay as they are."""
    patch = RISING + f"""
def spoilt(model, *args, inner=script.validate, **options):
    scores = inner(model, *args, **options)
    if scores["dice"] > 0.005:  # four steps an epoch: the second one
        {spoil}
    return scores
script.validate = spoilt
"""
    code, text = run(arguments(tmp_path), patch)
    assert code == 1 and "not finite" in text and "Traceback" not in text, text
    assert read(tmp_path)["epoch"] == 1 and finite_files(tmp_path) and load_best(tmp_path) == ""


# --- out of memory


class Limited(torch.nn.Module):
    """A model for at most `most` images at a time. BatchNorm is frozen, so that micro-batches must not matter."""

    def __init__(self, most, frozen=True):
        super().__init__()
        self.inner, self.most, self.sizes = fresh_model(), most, []
        for module in self.inner.modules():
            if frozen and isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module

    def forward(self, images):
        out = self.inner(images)  # first the forward pass, which changes BatchNorm's statistics
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return out


class Recorder(torch.optim.SGD):
    """Keeps the gradients of each step and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def gradients(model, sizes, accumulation=1):
    recorder = Recorder(model.parameters(), 0.0)
    cfg = settings(ACCUMULATION_STEPS=accumulation, GRAD_CLIP=0.0)
    stats = script.train_one_epoch(model, batches(sizes), script.LOSSES["dice_bce"](), recorder,
                                   script.make_scaler("float32", CPU), CPU, cfg=cfg)
    return torch.cat([gradient.flatten() for gradient in recorder.gradients]), stats


@pytest.mark.parametrize("sizes, accumulation, most", [([8], 1, 4), ([8], 1, 1), ([7], 1, 3), ([5, 3], 2, 2)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(sizes, accumulation, most, capfd):
    whole, expected = gradients(Limited(100), sizes, accumulation)
    model = Limited(most)
    parts, stats = gradients(model, sizes, accumulation)
    assert "out of GPU memory" in capfd.readouterr().err
    assert (parts - whole).norm() < 1e-3 * whole.norm()  # float32 sums in another order
    assert stats["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert stats["dropped"] == 0 and max(model.sizes[-2:]) <= most


def test_the_batch_size_is_halved_until_it_fits_and_stays_there(capfd):
    model = Limited(2)
    gradients(model, [8, 8])
    assert model.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    err = capfd.readouterr().err
    assert "at most 4 image(s)" in err and "at most 2 image(s)" in err and "BatchNorm" in err


def test_a_repeated_step_counts_once_for_batchnorm():
    """What the failed forward passes did to the running statistics is undone."""
    tried, direct = Limited(2, frozen=False), Limited(100, frozen=False)
    guard = script.StepGuard(direct, CPU)
    guard.micro_batch = 2
    one_epoch(batches([8]), Faulty([], None), model=tried)
    one_epoch(batches([8]), Faulty([], None), model=direct, guard=guard)
    assert tried.sizes == [8, 4, 2, 2, 2, 2] and direct.sizes == [2, 2, 2, 2]
    assert differences(tried.state_dict(), direct.state_dict()) == []


def test_memory_that_runs_out_in_the_backward_pass_is_handled_too():
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if len(gradient) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return gradient

    class Model(Limited):
        def forward(self, images):
            return Late.apply(self.inner(images))

    whole, _ = gradients(Limited(100), [4])
    parts, _ = gradients(Model(100), [4])
    assert (parts - whole).norm() < 1e-3 * whole.norm()


def test_not_even_one_image_fits():
    with pytest.raises(script.TrainerError) as caught:
        gradients(Limited(0), [4])
    assert caught.value.exit_code == 1
    assert all(word in str(caught.value) for word in ("single image", "IMG_SIZE", "ENCODER", "--device cpu"))


def test_validation_halves_its_batches():
    loader = batches([6, 5])
    criterion, model = script.LOSSES["dice_bce"](), Limited(2)
    expected = script.validate(Limited(100), loader, criterion, CPU, cfg=settings())
    assert script.validate(model, loader, criterion, CPU, cfg=settings()) == pytest.approx(expected, rel=1e-4)
    assert {size for size in model.sizes if size <= 2} == {1, 2}
    with pytest.raises(script.TrainerError, match="single image"):
        script.validate(Limited(0), loader, criterion, CPU, cfg=settings())


def test_prediction_without_memory_gives_the_remedies():
    model = Limited(0)
    model.prediction_settings = {"img_size": 64, "mean": script.MEAN, "std": script.STD, "threshold": 0.5}
    with pytest.raises(script.TrainerError, match="IMG_SIZE"):
        script.predict_mask(model, np.zeros((50, 50, 3), np.uint8))


def test_a_run_goes_on_after_running_out_of_memory(tmp_path):
    patch = """
def forward(self, images, inner=script.smp.UnetPlusPlus.forward):
    if len(images) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")
    return inner(self, images)
script.smp.UnetPlusPlus.forward = forward
"""
    code, text = run(arguments(tmp_path, "--epochs", 2), patch)
    assert code == 0, text
    assert text.count("out of GPU memory") == 1 and "Traceback" not in text
    assert len(table_rows(tmp_path)) == 3


@pytest.mark.parametrize("place", ["torch.optim.AdamW.step", "torch.nn.Module.to", "script.to_input"])
def test_memory_that_runs_out_elsewhere_gives_a_message(place, tmp_path):
    patch = f"""
def fail(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")
{place} = fail
"""
    code, text = run(arguments(tmp_path), patch)
    assert code == 1 and "memory" in text and "Traceback" not in text, text
    assert "--resume" not in text  # there is nothing to resume
