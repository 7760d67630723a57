"""README, script and repository agree; also in an unpacked archive without git."""

import fnmatch
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "tests" / "BENCHMARKS.md").read_text(encoding="utf-8")
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
AGREED = {"brain_tumor_integrated_smp.py", "requirements_smp.txt", "README.md", "tests", "train", "valid", "test"}
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:work|opt|root|tmp|home|Users|mnt)/|[A-Z]:\\Users")


def ignored(path):
    """Whether .gitignore leaves out a file; its patterns are names without folders."""
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in IGNORED)


def tracked():
    """Files in the repository, as git says, or None without git or without its folder."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()] if done.returncode == 0 else None


def texts():
    """(name, content) of the text files of the project, with git or without."""
    found = [path for pattern in ("*", ".ci/*", "tests/*", "train/*.json", "valid/*.json", "test/*.json")
             for path in sorted(ROOT.glob(pattern))
             if path.is_file() and path.name != ".git" and not ignored(path.relative_to(ROOT))]  # of a worktree
    return [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in found]


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if "pip install" in line and "pytest tests" in line)
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert any(line.strip().startswith(command) for line in lines)


def test_the_readme_is_short_and_names_only_settings_and_flags_that_exist():
    assert len(README.splitlines()) <= 260
    known = {script.flag_name(name) for name in script.CONSTANTS} | {
        "--resume", "--audit", "--evaluate", "--check-labels", "--predict", "--help"}
    others = {"--nproc-per-node", "--index-url", "--dist"}  # of torchrun, pip and pytest
    for text in (README, BENCHMARKS):
        lines = [line for line in text.splitlines() if "benchmark.py" not in line]
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", "\n".join(lines))) <= known | others
    assert set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)", README)) <= {*script.CONSTANTS, "OMP_NUM_THREADS", "HF_ENDPOINT"}


def test_the_loading_recipe_is_the_one_that_is_tested():
    assert ('model = smp.create_model(settings["architecture"], settings["encoder"], encoder_weights=None, '
            'in_channels=3, classes=1)\nmodel.load_state_dict(torch.load("unet_plusplus_best.pth"))\n'
            'model.eval()') in README


@pytest.mark.parametrize("name", script.RUN_FILES)
def test_every_output_file_is_explained_and_ignored_by_git(name):
    explained = re.findall(r"^\| (`[^|]+`) \| .{20,}", README, re.M)  # the first cells of the tables
    assert any(f"`{name}`" in cell or f"`{name.removesuffix('.png')}.csv`, `.png`" == cell for cell in explained)
    assert any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)


@pytest.mark.parametrize("name", [".brain_tumor.lock", ".unet_plusplus_last.pth.tmp", "earlier_run_20260101-000000_1",
                                  "predictions", "predictions_2", "evaluation", "evaluation_2", "__pycache__", ".venv"])
def test_other_things_that_a_run_leaves_are_ignored_too(name):
    assert any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)


def test_the_pictures_of_the_readme_exist():
    for text, folder in ((README, ROOT), (BENCHMARKS, ROOT / "tests")):
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert pictures and all((folder / path).is_file() for path in pictures)


def test_the_links_within_the_readme_lead_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_top_level_holds_what_was_agreed_and_nothing_else():
    """Without git nobody knows which of the other files are the user's."""
    assert AGREED <= set(os.listdir(ROOT))
    names = tracked()
    assert names is None or {name.split("/")[0] for name in names if name[0] != "."} == AGREED


def test_no_file_names_a_folder_of_one_machine():
    found = texts()
    assert {"README.md", script.__name__ + ".py", ".ci/run", "tests/conftest.py"} <= {name for name, _ in found}
    assert [f"{name}: {match[0]}" for name, text in found for match in MACHINE_PATHS.finditer(text)] == []
