"""The same update however a step is cut, and the same weights however often a training is killed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
WORKER = ROOT / "tests" / "workers" / "train.py"


DDP = ["--multi_gpu"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2"]
ZERO = ["--use_deepspeed", "--zero_stage", "2"]
LAYERS = [*FSDP2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
"""Each layer is cut by itself."""


def run(*arguments, ranks=1, check=True, how=DDP, worker=WORKER):
    """Run a worker, on several ranks through `accelerate launch`; it checks that they are so many.

    Accelerate starts several processes on CPUs only under MPI, unless it takes them for GPUs at first.
    """
    launch = [sys.executable, str(worker)]
    if ranks > 1:
        accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        flags = [*how, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        port = str(random.Random().randint(20000, 50000))
        launch = [*accelerate, *flags, "--num_processes", str(ranks), "--main_process_port", port, str(worker)]
    command = [*launch, *map(str, arguments), "--ranks", str(ranks)]
    here = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": here}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def weights(path, *arguments, **options):
    run(path, *arguments, **options)
    return load_file(path)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three updates in one piece."""
    return weights(tmp_path_factory.mktemp("whole") / "w.safetensors")


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_nothing(tmp_path, whole, accumulation):
    cut = weights(tmp_path / "w.safetensors", "--accumulation", accumulation)
    assert largest_difference(whole, cut) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_change_nothing(tmp_path, whole, accumulation):
    cut = weights(tmp_path / "w.safetensors", "--accumulation", accumulation, ranks=2)
    assert largest_difference(whole, cut) < 1e-6


def test_the_comparison_can_fail(tmp_path, whole):
    """One more update moves the weights by far more than the tolerance."""
    other = weights(tmp_path / "w.safetensors", "--steps", 4)
    assert largest_difference(whole, other) > 1e-4


@pytest.mark.parametrize("best", [False, True])
def test_resume_after_kill_is_bit_identical(tmp_path, best):
    """Killed without warning at several steps, on and off a checkpoint, in and after an epoch."""
    options = ["--steps", 14, "--dropout", 0.1, *(["--best"] if best else [])]
    uninterrupted = weights(tmp_path / "a.safetensors", *options, "--folder", tmp_path / "a")
    for kill_at in (2, 5, 9, 12):
        killed = run(
            tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b", "--kill-at", kill_at, check=False
        )
        assert killed.returncode == -9
    resumed = weights(tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_stages_are_the_same_on_two_ranks(tmp_path, whole):
    """Parameters that come into play later are in step on both, and those that rest are left alone."""
    staged = weights(tmp_path / "one.safetensors", "--stages")
    cut = weights(tmp_path / "two.safetensors", "--stages", "--accumulation", 2, ranks=2)
    assert largest_difference(staged, cut) < 1e-6
    assert largest_difference(staged, whole) > 1e-4


def test_resume_over_the_border_of_a_stage_is_bit_identical(tmp_path):
    """Stages change at steps 6 and 10 of 14; it goes on from steps 3 and 9, before each border."""
    options = ["--steps", 14, "--dropout", 0.1, "--stages"]
    uninterrupted = weights(tmp_path / "a.safetensors", *options, "--folder", tmp_path / "a")
    for kill_at in (5, 11):
        killed = run(
            tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b", "--kill-at", kill_at, check=False
        )
        assert killed.returncode == -9
    resumed = weights(tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b")
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_resume_on_two_ranks_is_bit_identical(tmp_path):
    options = ["--steps", 8, "--dropout", 0.1]
    uninterrupted = weights(tmp_path / "a.safetensors", *options, "--folder", tmp_path / "a", ranks=2)
    killed = run(
        tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b", "--kill-at", 5, ranks=2, check=False
    )
    assert killed.returncode != 0
    resumed = weights(tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b", ranks=2)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_what_needs_whole_weights_is_refused(tmp_path):
    arguments = [tmp_path / "w.safetensors", "--gradients-every", 2]
    refused = run(*arguments, ranks=2, how=FSDP2, check=False)
    assert "ValueError: each term's gradient cannot be measured under FSDP2" in refused.stderr


def test_weights_that_are_cut_change_nothing(tmp_path, whole):
    """Updates, clipping by the whole gradient's norm, evaluations, checkpoints, and the student at the end."""
    arguments = [
        tmp_path / "w.safetensors",
        "--accumulation",
        2,
        "--folder",
        tmp_path / "kept",
        "--best",
    ]
    done = run(*arguments, ranks=2, how=LAYERS)
    assert sorted(done.stdout.splitlines()) == [
        "rank 0: done after 3",
        "rank 0: weights are cut",
        "rank 1: done after 3",
    ]
    cut = load_file(arguments[0])
    assert largest_difference(whole, cut) < 1e-6
    checkpoint = load_file(tmp_path / "kept" / "step-00000003" / "distiller.safetensors")
    assert largest_difference(checkpoint, cut) == 0


def test_resume_with_weights_that_are_cut_is_bit_identical(tmp_path):
    options = ["--steps", 8, "--dropout", 0.1]
    uninterrupted = weights(tmp_path / "a.safetensors", *options, "--folder", tmp_path / "a", ranks=2, how=FSDP2)
    arguments = [tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b"]
    killed = run(*arguments, "--kill-at", 5, ranks=2, check=False, how=FSDP2)
    assert killed.returncode != 0
    resumed = weights(*arguments, ranks=2, how=FSDP2)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_an_optimizer_that_is_cut_changes_nothing(tmp_path, whole):
    """By DeepSpeed, where it is installed: updates, and a training that was killed and resumed."""
    pytest.importorskip("deepspeed")
    cut = weights(tmp_path / "w.safetensors", "--accumulation", 2, ranks=2, how=ZERO)
    assert largest_difference(whole, cut) < 1e-6
    options = ["--steps", 8, "--dropout", 0.1]
    uninterrupted = weights(tmp_path / "a.safetensors", *options, "--folder", tmp_path / "a", ranks=2, how=ZERO)
    arguments = [tmp_path / "b.safetensors", *options, "--folder", tmp_path / "b"]
    run(*arguments, "--kill-at", 5, ranks=2, check=False, how=ZERO)
    assert (tmp_path / "b" / "step-00000003").is_dir()
    resumed = weights(*arguments, ranks=2, how=ZERO)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_a_rank_without_examples_changes_nothing(tmp_path):
    """Of 33 examples in batches of 16, one is left over for two ranks."""
    options = ["--examples", 33, "--accumulation", 2]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert largest_difference(weights(one, *options), weights(two, *options, ranks=2)) < 1e-6


def test_ranks_stop_together(tmp_path):
    """A callback, which lives on rank 0 alone, stops both ranks; a resume trains no further."""
    options = ["--steps", 8, "--stop-at", 3, "--folder", tmp_path / "a"]
    stopped = run(tmp_path / "a.safetensors", *options, ranks=2)
    assert sorted(stopped.stdout.splitlines()) == ["rank 0: enough after 3", "rank 1: enough after 3"]
    again = run(tmp_path / "b.safetensors", *options[:2], *options[4:], ranks=2)
    assert sorted(again.stdout.splitlines()) == ["rank 0: enough after 3", "rank 1: enough after 3"]
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_interrupted_rank_stops_both(tmp_path):
    options = ["--steps", 6, "--dropout", 0.1, "--best"]
    uninterrupted = weights(tmp_path / "a.safetensors", *options, "--folder", tmp_path / "a", ranks=2)
    options += ["--folder", tmp_path / "b"]
    stopped = run(tmp_path / "b.safetensors", *options, "--interrupt-at", 4, 1, ranks=2)
    said = f"interrupted at step 4; what was trained is kept in {tmp_path / 'b' / 'step-00000004'}"
    assert sorted(stopped.stdout.splitlines()) == [f"rank 0: {said}", f"rank 1: {said}"]
    resumed = weights(tmp_path / "b.safetensors", *options, ranks=2)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
