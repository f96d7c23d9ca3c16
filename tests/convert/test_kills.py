"""Unplug it, run it again: the same bytes, wherever and how often it was killed.

KILLS=200 kills so many times; by default about fifty times.
"""

import os
import random
import signal
import time

import pytest

from dsv32_jax.checkpoint import random_checkpoint

from .killer import Killer, digest

OPTIONS = {"layers": "0-1", "group_bytes": 200_000, "max_memory": "4GiB", "workers": 2}
RANDOM = int(os.environ.get("KILLS", "0"))
CHAIN = 12
"""Random kills of one conversion before it may end."""
CHAINS = 9
"""Conversions that are killed before steps of every kind."""


@pytest.fixture(scope="module")
def killer():
    killer = Killer()
    yield killer
    killer.close()


@pytest.fixture(scope="module")
def undisturbed(killer, tmp_path_factory, tiny):
    """A source, the digest of what it becomes, the steps that takes, and the seconds."""
    root = tmp_path_factory.mktemp("kills")
    random_checkpoint.write(root / "hf", tiny, "nvfp4")
    steps = killer.trace(root / "hf", root / "out", OPTIONS)
    start = time.perf_counter()
    digest = killer.finish(root / "hf", root / "again", OPTIONS)
    return root / "hf", digest, steps, time.perf_counter() - start


def require_tidy(out):
    assert {entry.name for entry in out.iterdir()} == {".lock", "manifest.json", "weights"}


def test_steps_of_every_kind_are_seen(undisturbed):
    _, _, steps, _ = undisturbed
    for step in (
        "os.mkdir weights",
        "open .journal.jsonl.*.tmp",
        "os.fsync .journal.jsonl.*.tmp",
        "os.rename .journal.jsonl.*.tmp",
        "os.rename weights/#.unfinished",
        "os.fsync weights/#.unfinished",
        "os.fsync weights/#.unfinished/layers.#.ffn.w_up_EMD.codes/c.#.#.#",
        "open journal.jsonl",
        "os.fsync journal.jsonl",
        "os.fsync .manifest.json.*.tmp",
        "os.rename .manifest.json.*.tmp",
        "os.remove journal.jsonl",
    ):
        assert step in steps
    assert sum(step == "os.rename weights/#.unfinished" for step in steps) > 1


def test_everything_is_flushed_before_the_manifest(undisturbed):
    """A part is named in the journal before it is made and once it is flushed, the manifest's name comes last."""
    _, _, steps, _ = undisturbed
    written = [number for number, step in enumerate(steps) if step == "os.rename weights/#.unfinished"]
    noted = [number for number, step in enumerate(steps) if step == "os.fsync journal.jsonl"]
    flushed = [number for number, step in enumerate(steps) if step == "os.fsync weights"]
    assert len(noted) == 2 * len(written) > 2
    assert noted[0] < steps.index("os.mkdir weights/#.unfinished")
    for part, rename in enumerate(written):
        assert sum(line < rename for line in noted) > part
        assert any(rename < flush < line for flush in flushed for line in noted)
    end = steps.index("open .manifest.json.*.tmp")
    assert flushed[-1] < noted[-1] < end
    assert list(dict.fromkeys(steps[end:])) == [
        "open .manifest.json.*.tmp",
        "os.fsync .manifest.json.*.tmp",
        "os.rename .manifest.json.*.tmp",
        "os.fsync .",
        "os.remove journal.jsonl",
    ]


def test_killed_before_every_kind_of_step(killer, undisturbed, tmp_path):
    """Each output lives through several kills, the first of them early, the last of them late."""
    source, digest, steps, _ = undisturbed
    kinds = list(dict.fromkeys(steps))
    for chain in range(CHAINS):
        out = tmp_path / str(chain)
        for step in kinds[chain::CHAINS]:
            assert killer.before(source, out, OPTIONS, step=step) == -signal.SIGKILL, step
        assert killer.finish(source, out, OPTIONS) == digest, kinds[chain::CHAINS]
        require_tidy(out)


def test_killed_at_random_times(killer, undisturbed, tmp_path):
    """One output is killed again and again; each run finds what those before it left."""
    source, digest, steps, seconds = undisturbed
    dice = random.Random(0)
    kills = 0
    while kills < max(CHAIN, RANDOM):
        out = tmp_path / str(kills)
        for _ in range(CHAIN):
            if dice.random() < 0.5:
                kills += killer.after(source, out, OPTIONS, seconds=dice.uniform(0, seconds)) == -signal.SIGKILL
            else:
                kills += killer.before(source, out, OPTIONS, step=dice.randrange(len(steps))) == -signal.SIGKILL
            if (out / "manifest.json").exists():
                break
        assert killer.finish(source, out, OPTIONS) == digest
        require_tidy(out)


def test_other_limits_may_be_given_to_the_run_that_continues(killer, undisturbed, tmp_path):
    source, digest, steps, _ = undisturbed
    middle = [number for number, step in enumerate(steps) if step.startswith("open journal.jsonl")][1]
    assert killer.before(source, tmp_path / "out", OPTIONS, step=middle) == -signal.SIGKILL
    other = OPTIONS | {"group_bytes": 90_000, "max_memory": "2GiB", "workers": 1}
    assert killer.finish(source, tmp_path / "out", other) == digest
    require_tidy(tmp_path / "out")


LAST_PHASE = {
    "convert": ({"max_memory": "4GiB", "workers": 2}, "open .manifest.json.*.tmp"),
    "reshard": ({"mesh": "expert=4"}, "open .manifest.json.*.tmp"),
    "export": ({"family": "modelopt"}, "open .out.unfinished/.model.safetensors.index.json.*.tmp"),
}
"""By job, its options and the first step after everything large was written."""


@pytest.mark.parametrize("job", LAST_PHASE)
def test_killed_at_every_step_of_the_last_phase(job, originals, converted, tmp_path):
    """The same command ends in success, with the same output and nothing else."""
    options, first = LAST_PHASE[job]
    source = (originals if job == "convert" else converted)["nvfp4"]
    killer = Killer(job)
    try:
        (tmp_path / "whole").mkdir()
        steps = killer.trace(source, tmp_path / "whole" / "out", options)
        digest = killer.finish(source, tmp_path / "again" / "out", options)
        last = steps[steps.index(first) :]
        assert len(last) >= 6, steps
        for number, step in enumerate(last):
            (root := tmp_path / str(number)).mkdir()
            assert killer.before(source, root / "out", options, step=(first, number)) == -signal.SIGKILL
            assert killer.finish(source, root / "out", options) == digest, step
            assert [entry.name for entry in root.iterdir()] == ["out"]
            names = {entry.name for entry in (root / "out").iterdir()}
            assert names == {entry.name for entry in (tmp_path / "whole" / "out").iterdir()}
    finally:
        killer.close()


def test_killed_at_every_step_of_saving(tmp_path):
    """A session or a trace is the one before or the new one, whole, and is saved when it is saved again."""
    killer = Killer("save")
    try:
        (tmp_path / "whole").mkdir()
        steps = killer.trace("", tmp_path / "whole" / "file", {"size": 9})
        assert steps == ["open .file.*.tmp", "os.fsync .file.*.tmp", "os.rename .file.*.tmp", "os.fsync ."]
        new = killer.finish("", tmp_path / "whole" / "file", {"size": 9})
        for number, step in enumerate(steps):
            (root := tmp_path / str(number)).mkdir()
            old = killer.finish("", root / "file", {"size": 5})
            assert killer.before("", root / "file", {"size": 9}, step=number) == -signal.SIGKILL
            found = digest("save", root / "file")
            assert found == (new if step == "os.fsync ." else old), step
            assert killer.finish("", root / "file", {"size": 9}) == new
    finally:
        killer.close()
