"""Buckets: listings are looked up each time, and what cannot be read here is a sentence.

The bucket is fsspec's file system in memory under Amazon's name, with listings that are kept as s3fs keeps them.
"""

import importlib.util
import inspect
import sys
import types
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from configs import digits
from mscm import atomic, cli, lease, remote, training_loop
from mscm.checkpoint import Checkpoints, reading
from mscm.config import ConfigError
from mscm.experiment import build
from mscm.metrics import files


class _Bucket(MemoryFileSystem):
    protocol = ("s3", "s3a")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True)
        entries = self.dircache[path] if path in self.dircache else super().ls(path, detail=True)
        return entries if detail else sorted(entry["name"] for entry in entries)


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket, and nothing that an earlier test has asked of fsspec."""
    monkeypatch.setattr(_Bucket, "store", {})
    monkeypatch.setattr(_Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", _Bucket)
    _Bucket.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield epath.Path("s3://bucket/run")
    backend.fsspec_backend._get_filesystem.cache_clear()
    _Bucket.clear_instance_cache()


def test_a_listing_is_never_old(bucket):
    """As of a writer elsewhere, of whom this process learns nothing."""
    remote.look_each_time()
    atomic.write_text(bucket / "one", "")
    assert [path.name for path in bucket.iterdir()] == ["one"]
    _Bucket.store["/bucket/run/two"] = _Bucket.store["/bucket/run/one"]
    assert sorted(path.name for path in bucket.iterdir()) == ["one", "two"]


def test_the_bucket_of_these_tests_keeps_listings(bucket):
    """As s3fs does: without the setting the test above would fail."""
    atomic.write_text(bucket / "one", "")
    assert [path.name for path in bucket.iterdir()] == ["one"]
    _Bucket.store["/bucket/run/two"] = _Bucket.store["/bucket/run/one"]
    assert [path.name for path in bucket.iterdir()] == ["one"]


def test_commands_look_each_time(bucket, monkeypatch):
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: main([]))
    monkeypatch.setattr(cli.logging, "set_verbosity", lambda level: None)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    with flagsaver.flagsaver():  # it defines one
        cli.run(lambda: None, doc="", required=())
    assert {name: options["use_listings_cache"] for name, options in fsspec.config.conf.items()} == {
        "gcs": False, "s3": False
    }


def test_files_of_a_bucket(bucket):
    """Written whole, appended to, read, and held by one process at a time."""
    remote.look_each_time()
    files.save(bucket / "a.npz", {"x": np.arange(3)}, {"kind": "test"})
    arrays, card = files.load(bucket / "a.npz")
    assert arrays["x"].tolist() == [0, 1, 2] and card == {"kind": "test"}
    for i in range(2):
        cli.append_json_line(bucket / "scores.jsonl", {"step": i})
    assert cli.read_json_lines(bucket / "scores.jsonl") == [{"step": 0}, {"step": 1}]
    with lease.holding(bucket / "owner.json", "evaluation") as held:
        held._renew()
        with pytest.raises(lease.LeaseError, match="is at work on this evaluation"):
            with lease.holding(bucket / "owner.json", "evaluation"):
                pass
        held.check()
    assert sorted(path.name for path in bucket.iterdir()) == ["a.npz", "scores.jsonl"]


def test_the_evaluator_sees_a_new_checkpoint(bucket, experiment, tmp_path, monkeypatch):
    """Written by a training elsewhere after the first look."""
    remote.look_each_time()
    state = experiment.random_state(jax.random.key(0))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (10, 20):
            checkpoints.save(state._replace(step=np.int32(step)), experiment.facts())
    monkeypatch.chdir(tmp_path)
    seen = []
    for step in (10, 20):
        for file in (tmp_path / "checkpoints" / str(step)).rglob("*"):
            if file.is_file():
                name = f"/bucket/run/{file.relative_to(tmp_path)}"
                _Bucket.store[name] = MemoryFile(_Bucket(), name, file.read_bytes())
        with reading(bucket) as checkpoints:
            seen.append((checkpoints.steps(), checkpoints.facts()["name"]))
    assert seen == [([10], experiment.name), ([10, 20], experiment.name)]


@pytest.fixture
def experiment():
    config = digits.teacher()
    config.model.middle.update(dict(width=32, num_blocks=1))
    return build(config)


def test_training_checks_a_directory_in_a_bucket(bucket, experiment, tmp_path, monkeypatch):
    """And leaves no local folder of its name."""
    remote.look_each_time()
    monkeypatch.chdir(tmp_path)
    training_loop.check(experiment, str(bucket))
    _Bucket.store = {}
    _Bucket.pseudo_dirs = [""]
    atomic.write_text(bucket, "")
    with pytest.raises(ConfigError, match="--workdir: got 's3://bucket/run', which is a file"):
        training_loop.make_directory(str(bucket))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gs://bucket/x", r"got 'gs://bucket/x', which needs the library gcsfs; .* pip install mscm\[gs\]"),
        ("s3://bucket/x", r"which needs the library s3fs; install it with pip install mscm\[s3\]"),
        ("memory://x", "got 'memory://x', expected a local path, or one that begins with gs:// or s3://"),
    ],
)
def test_what_cannot_be_read_here_is_a_sentence(monkeypatch, path, sentence):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=sentence):
        remote.check(path)
    flag = types.SimpleNamespace(name="workdir", value=path)
    with pytest.raises(ConfigError, match=f"--workdir: {sentence if 'got' in sentence else ''}"):
        inspect.unwrap(cli.path_of)(flag)


def test_what_can_be_read_is_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "gcsfs" or None)
    for path in ("gs://bucket/x", "/a/b", "a/b", Path("a"), "c:\\x"):
        remote.check(path)
