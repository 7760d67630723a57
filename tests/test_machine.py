"""What the script makes of the machine: a GPU that lies idle, bfloat16, and the many forms of too little memory."""

import contextlib
import threading

import pytest
import torch
from conftest import FAST, script

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend a machine: whether it has nvidia-smi, the CUDA of the build, whether the driver works."""
    def pretend(nvidia_smi=True, cuda="12.4", driver_works=False):
        monkeypatch.setenv("PATH", str(tmp_path))
        if nvidia_smi:
            (tmp_path / "nvidia-smi").touch(0o755)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name, value in {"is_available": driver_works, "device_count": int(driver_works)}.items():
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)

    return pretend


@pytest.fixture
def card(monkeypatch):
    """Pretend a card: what the first kernel on it raises (None: it works). Returns the devices that were tried."""
    def pretend(error=None):
        tried, ones = [], torch.ones

        def first_kernel(*size, device):
            tried.append(str(device))
            if error:
                raise error
            return ones(*size)

        monkeypatch.setattr(torch, "ones", first_kernel)
        return tried

    return pretend


def checked(capsys, device="cpu"):
    """What check_gpu() prints: (standard output, standard error)."""
    cfg = script.default_settings()
    cfg.DEVICE = device
    script.check_gpu(cfg)
    return capsys.readouterr()


# --- a GPU that is there is used, or the user is told why not


@pytest.mark.parametrize("pretended, said", [
    ({"cuda": "13.2"}, ["WARNING", "built (nvidia-smi", "CUDA 13.2", "driver is too old", "README.md, 'GPU'"]),
    ({"cuda": None},  # pip answers "already satisfied" otherwise
     ["WARNING", "CPU-only build", "Uninstall torch and torchvision first", "README.md, 'GPU'"]),
    ({"driver_works": True}, []),  # the CPU was chosen
    ({"nvidia_smi": False}, []), ({"nvidia_smi": False, "cuda": None}, [])])
def test_a_gpu_that_lies_idle_is_explained(pretended, said, machine, capsys):
    machine(**pretended)
    text = "".join(checked(capsys))
    assert all(words in text for words in said) and bool(text) == bool(said)
    assert "driver is too old" in said or "driver" not in text


def test_a_card_that_works_is_used(machine, card, capsys):
    machine(driver_works=True)
    tried = card()
    assert checked(capsys, "cuda:0") == ("", "") and tried == ["cuda:0"]


# What PyTorch without code for a card raises, first as it was worded up to 2.8.
@pytest.mark.parametrize("error", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_a_card_that_does_not_work_is_refused(error, machine, card, data, tmp_path, capsys):
    machine(driver_works=True)
    card(error("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might ..."))
    assert script.main([*FAST, "--data-dir", str(data), "--output-dir", str(tmp_path), "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert all(part in err for part in ("cuda does not work", "no kernel image", "README.md, 'GPU'", "--device cpu"))
    assert "Traceback" not in err


def test_an_idle_gpu_does_not_end_a_run(machine, data, tmp_path, capsys):
    machine(cuda=None)
    assert script.main([*FAST, "--data-dir", str(data), "--output-dir", str(tmp_path), "--audit"]) == 0
    out, err = capsys.readouterr()
    assert "CPU-only build" in err and "Data OK." in out


def test_several_gpus_without_nccl_end_with_a_sentence(machine, tmp_path, capsys, monkeypatch):
    machine(driver_works=True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert script.main([*FAST, "--data-dir", str(tmp_path), "--output-dir", str(tmp_path), "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: several GPUs need Linux")


# --- bfloat16, and memory that runs out


@pytest.mark.parametrize("has_list", [True, False], ids=["get_capabilities", "PyTorch 2.6"])
@pytest.mark.parametrize("kernels, one_dnn, feature, expected", [
    ("AVX512", True, True, torch.bfloat16), ("AVX512", True, False, torch.float32),
    ("AVX512", False, True, torch.float32),  # as in the builds for ARM Macs
    ("AVX2", True, True, torch.float32)])  # PyTorch was told to use less than the processor has
def test_auto_is_bfloat16_where_the_processor_has_it(kernels, one_dnn, feature, expected, has_list, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: one_dnn)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": feature}, raising=False)
    if not has_list:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: feature)
    assert script.amp_dtype("auto", CPU) == expected
    with script.autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == (expected != torch.float32)
    assert [script.amp_dtype(name, CPU) for name in ("float32", "bfloat16")] == [torch.float32, torch.bfloat16]
    assert [script.amp_dtype(name, GPU) for name in ("auto", "float32")] == [torch.float16, torch.float32]


@pytest.mark.parametrize("features, expected", [({"amx_bf16": 1}, True), ({"bf16": 1}, True), ({"bf16": 0}, False)])
def test_other_processors_have_other_names_for_bfloat16(features, expected, monkeypatch):
    """AMX; ARM; one without."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert script.has_native_bfloat16() is expected


OUT_OF_MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), *map(RuntimeError, [
    "GET was unable to find an engine to execute this computation",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096",
    "[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried to allocate 4096"])]
IN_A_WORKER = "Caught {} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ..."


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_each_form_of_too_little_memory_is_recognised_and_answered(error):
    assert script.is_out_of_memory(error)
    assert all(word in script.advice(error) for word in ("memory ran out", "BATCH_SIZE", "NUM_WORKERS", "IMG_SIZE"))


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "), "--num-workers 0"),
    (RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"), "--num-workers 0"),
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "--compile"),  # Triton
    (RuntimeError("Compiler: cl is not found."), "--compile"),  # Windows
    (OSError(28, "No space left on device", "best.pth"), "No space left on device: 'best.pth'"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), ""), (ValueError("out of memory"), ""),
    # An edited augmentation fails in a worker: its trace is needed.
    (ValueError(IN_A_WORKER.format("ValueError")), ""), (RuntimeError(IN_A_WORKER.format("RuntimeError")), "")])
def test_other_errors_get_what_helps_and_what_nobody_foresaw_keeps_its_trace(error, words):
    found = script.advice(error)
    assert words in found and bool(found) == bool(words) and not script.is_out_of_memory(error)


@pytest.mark.parametrize("fails", [False, True])
def test_work_in_threads_leaves_the_number_of_pytorchs_own_threads_as_it_was(fails):
    """Each of them has one; a number that stayed would make the training after it several times slower."""
    def work(item):
        if fails:
            raise ValueError
        return item, torch.get_num_threads()

    before, later = torch.get_num_threads(), []
    torch.set_num_threads(3)
    with pytest.raises(ValueError) if fails else contextlib.nullcontext():
        assert script.in_threads(work, range(5), "Work", 2) == [(item, 1) for item in range(5)]
    new = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    new.start()
    new.join()
    here = torch.get_num_threads()
    torch.set_num_threads(before)
    assert later == [here] == [3]
