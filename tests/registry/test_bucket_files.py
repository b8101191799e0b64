"""Files of adapters in a bucket, without a registry around: who may remove what, and what lies here too."""

import os
import shutil
from contextlib import contextmanager

import pytest

from adapter_registry.bucket import Bucket
from adapter_registry.bucket_files import ArtefactBucket
from adapter_registry.copies import Copies
from adapter_registry.errors import StoreUnavailableError
from adapter_registry.sources.places import parse
from adapter_registry.staging import Staging
from prad.artefact import WEIGHTS, files_digest
from tests.registry.conftest import BUCKET


@pytest.fixture
def files(bucket, tmp_path):
    """files(name) opens the files of a registry; another name, another machine's registry on the same."""
    opened = []

    def open_files(name, capacity=1 << 30):
        found = ArtefactBucket(Bucket(parse(BUCKET), "of-all", None), tmp_path / name, capacity)
        opened.append(found)
        return found

    yield open_files
    for each in opened:
        each.close()


def names(s3):
    return sorted(key.rpartition("/")[2] for key in s3.find("adapters"))


def digests(s3):
    return {key.split("/")[-3] for key in s3.find("adapters")}


def copied(folder, target):
    """The adapter's files in `target`; their digest."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return files_digest(target)


@contextmanager
def staged(files, adapter, seed=1):
    with files.stage() as folder:
        yield folder, copied(adapter(seed), folder)


def keep(files, adapter, seed=1):
    with staged(files, adapter, seed) as (folder, digest), files.kept([(folder, digest)]):
        return digest


def nobody():
    return frozenset()


def test_nobody_removes_what_another_pushes(files, adapter, bucket):
    one, two = files("one"), files("two")
    digest = keep(one, adapter)
    with (
        staged(two, adapter) as (folder, _),
        two.kept([(folder, digest)]),
    ):
        # Its version is not entered yet, so nobody needs the digest.
        one.remove(digest, nobody)
        assert [name for name in names(bucket) if name != ".pushing"] == [WEIGHTS, "prad.json"]
        assert one.sweep(nobody) == 0
        assert ".pushing" in names(bucket)
    assert names(bucket) == [WEIGHTS, "prad.json"]
    one.remove(digest, lambda: frozenset({digest}))
    assert one.file(digest, "prad.json").is_file()
    one.remove(digest, nobody)
    assert names(bucket) == []


def test_a_version_entered_while_another_looks_keeps_its_files(files, adapter, bucket):
    """The push ends between the list that the remover makes, and its deletion."""
    one, two = files("one"), files("two")
    digest = keep(one, adapter)

    def looked():
        keep(two, adapter)
        return frozenset()

    one.remove(digest, looked)
    assert names(bucket) == [WEIGHTS, "prad.json"]
    shutil.rmtree(two.file(digest, WEIGHTS).parent)
    assert files_digest(two.file(digest, WEIGHTS).parent) == digest


def test_a_sweep_removes_what_nobody_needs(files, adapter, bucket, monkeypatch):
    one = files("one")
    kept, orphan = keep(one, adapter, 1), keep(one, adapter, 2)
    with staged(one, adapter, 3) as (folder, pushed):
        one._send(folder, pushed)
        assert one.sweep(lambda: frozenset({kept, "f" * 64})) == 1
        assert digests(bucket) == {kept, pushed}
    monkeypatch.setattr("adapter_registry.bucket_files._ABANDONED_S", -5.0)  # as if a day went by
    one.sweep(lambda: frozenset({kept}))
    assert digests(bucket) == {kept}
    assert orphan != kept


def test_what_may_have_been_entered_stays_until_it_is_known(files, adapter, bucket, monkeypatch):
    one = files("one")

    def keep_and_lose(seed):
        with (
            pytest.raises(StoreUnavailableError),
            staged(one, adapter, seed) as (folder, digest),
            one.kept([(folder, digest)]),
        ):
            raise StoreUnavailableError("whether it was entered is not known")
        return digest

    deleted = keep_and_lose(1)
    one.remove(deleted, nobody)
    assert names(bucket) == [], "it was entered, and can be deleted at once"
    entered, refused = keep_and_lose(2), keep_and_lose(3)
    one.sweep(nobody)
    assert digests(bucket) == {entered, refused}, "it may be entered yet"
    monkeypatch.setattr("adapter_registry.bucket_files._UNSURE_S", -5.0)  # as if some minutes went by
    one.sweep(lambda: frozenset({entered}))
    assert digests(bucket) == {entered}
    assert names(bucket) == [WEIGHTS, "prad.json"], "what is known to be entered has no mark"
    assert one.file(entered, WEIGHTS).is_file()


def test_many_pages_of_objects(bucket, monkeypatch):
    client = Bucket(parse(BUCKET), "of-all", None)
    for number in range(5):
        client.put(f"d/{number}/x", b"x")
    page = Bucket._list_page
    monkeypatch.setattr(
        Bucket, "_list_page", lambda *given: page(given[0], given[1], {**given[2], "MaxKeys": 2})
    )
    assert [entry.key for entry in client.entries()] == [f"d/{number}/x" for number in range(5)]


def test_copies_are_bounded_and_read_before_they_are_believed(tmp_path, adapter):
    staging = Staging(tmp_path)
    copies = Copies(tmp_path, staging, 1)

    def keep_copy(seed):
        folder = staging.new_folder()
        digest = copied(adapter(seed), folder)
        copies.keep(folder, digest)
        return digest

    first, second = keep_copy(1), keep_copy(2)
    assert copies.find(first) is not None, "whoever was just told of it may read it"
    os.utime(tmp_path / "copies" / first, (0, 0))
    os.utime(tmp_path / "copies" / second, (1, 1))
    third = keep_copy(3)
    assert [copies.find(each) is not None for each in (first, second, third)] == [False, False, True]
    (tmp_path / "copies" / third / WEIGHTS).write_bytes(b"torn")
    assert Copies(tmp_path, staging, 1).find(third) is None
    staging.close()
