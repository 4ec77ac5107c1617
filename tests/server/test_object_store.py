"""Data-set runs from and to an object store: killed, gone on with, read by what trainers use."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import duckdb
import fsspec
import pytest
import webdataset
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from panotriton.errors import InvalidInput, StoreError
from panotriton.groups.store import open_store
from panotriton.pipeline.scratch import PREFIX, dead_folders
from tests.replica import Replica
from tests.server.cluster import replicas, write_panoramas

GROUPS = 6
BUCKET = "panoramas"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A store on loopback, and how its callers find it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "never-in-a-log",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(autouse=True)
def store(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    fsspec.config.conf.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return boto3.client("s3")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Replica]]:
    with replicas(2, "--seconds", 0.25) as started:
        yield started


@pytest.fixture
def panoramas(store: Any, tmp_path: Path) -> str:
    store.create_bucket(Bucket=BUCKET)
    for path in write_panoramas(tmp_path / "in", 6).iterdir():
        store.upload_file(str(path), BUCKET, f"in/{path.name}")
    return f"s3://{BUCKET}/in"


def names(store: Any, prefix: str) -> list[str]:
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def command(panoramas: str, output: str, kind: str, servers: list[Replica]) -> list[str]:
    run = [sys.executable, "-m", "panotriton", "dataset", panoramas, "-o", output]
    run += ["--url", ",".join(server.url for server in servers), "--format", kind]
    run += ["--crop-size", "64", "--interpolations", "2", "--upscale", "1", "--json"]
    return [*run, "--sample-n", str(GROUPS), "--license", "cc-by-4.0"]


def run_and_kill(words: list[str], output: str, store: Any) -> list[dict[str, Any]]:
    """kill -9 when some groups are recorded, then the same command again; all of results.json."""
    prefix = output.removeprefix(f"s3://{BUCKET}/")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while len(names(store, f"{prefix}/records/")) < 2 and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = {n: etag(store, n) for n in names(store, prefix) if n.count("0000000")}
    assert before
    assert not [name for name in before if "failed" in name], [
        store.get_object(Bucket=BUCKET, Key=n)["Body"].read() for n in before if "failed" in n
    ]
    left = {*dead_folders()}  # its copies of panoramas, which the next run that copies some removes
    assert any(path.name.startswith(f"{PREFIX}panoramas-") for path in left)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {*dead_folders()} <= left
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    assert {name: etag(store, name) for name in before} == before  # made once
    results: list[dict[str, Any]] = json.loads(open_store(output).read("results.json"))
    assert [entry["group_id"] for entry in results] == list(range(1, GROUPS + 1))
    return results


def etag(store: Any, name: str) -> tuple[str, str]:
    head = store.head_object(Bucket=BUCKET, Key=name)
    return head["ETag"], str(head["LastModified"])


def test_webdataset_reads_what_a_killed_run_has_made(
    store: Any, panoramas: str, servers: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"s3://{BUCKET}/tars"
    results = run_and_kill(command(panoramas, output, "webdataset", servers), output, store)
    monkeypatch.setitem(
        webdataset.gopen_schemes, "s3", lambda url, mode, buffering: fsspec.open(url, mode).open()
    )
    tars = [f"s3://{BUCKET}/{name}" for name in names(store, "tars/data/")]
    assert len(tars) == GROUPS
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert len(samples) == sum(len(entry["kept"]) for entry in results) > 0
    for sample in samples:
        assert sample["p1_00.jpg"].shape == sample["p2_03.jpg"].shape == (64, 64, 3)
        about = sample["json"]
        assert sample["__key__"].endswith(f"{about['group_id']:09d}-yaw{about['interval']:02d}")
        assert [len(cameras) for cameras in about["cameras"]] == [4, 4]
        assert sample["txt"] == "A view."
    assert 'license: "cc-by-4.0"' in open_store(output).read("README.md").decode()


def test_duckdb_reads_what_a_killed_run_has_made(
    store: Any, panoramas: str, servers: list[Replica]
) -> None:
    output = f"s3://{BUCKET}/rows"
    results = run_and_kill(command(panoramas, output, "parquet", servers), output, store)
    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3"))
        rows = connection.execute(
            f"select group_id, count(*), count(distinct key), min(octet_length(image.bytes)), "
            f"min(final_score) from '{output}/data/*.parquet' group by group_id order by group_id"
        ).fetchall()
    kept = {entry["group_id"]: len(entry["kept"]) for entry in results if entry["kept"]}
    assert {row[0]: row[1] for row in rows} == {group: 8 * count for group, count in kept.items()}
    assert all(keys == 1 and size > 100 and score > 0.8 for _, _, keys, size, score in rows)


def test_folders_lie_in_a_store_as_on_a_disk(
    store: Any, panoramas: str, servers: list[Replica], tmp_path: Path
) -> None:
    output = f"s3://{BUCKET}/folders"
    results = run_and_kill(command(panoramas, output, "folder", servers), output, store)
    local = tmp_path / "out"
    words = command(panoramas, str(local), "folder", servers)
    assert subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert json.loads((local / "results.json").read_text()) == results
    wanted = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    assert {name.removeprefix("folders/") for name in names(store, "folders/")} == wanted


def test_of_two_who_create_one_succeeds(store: Any) -> None:
    store.create_bucket(Bucket=BUCKET)
    where = open_store(f"s3://{BUCKET}/once")
    assert where.create("a/b.json", b"1")
    assert not where.create("a/b.json", b"2")
    assert where.read("a/b.json") == b"1"


def test_names_are_no_patterns(store: Any) -> None:
    store.create_bucket(Bucket=BUCKET)
    places = [open_store(f"s3://{BUCKET}/run{which}") for which in ("1", "2", "[12]")]
    for place in places:
        for name in ("group_0007/a.json", "group_0007/b/c.json", "group_0008.json"):
            place.write(name, b"{}")
    places[2].remove("group_0007")
    places[2].remove("group_0008.json")
    places[2].remove("group_0009")
    assert [sorted(place.list("")) for place in places] == [
        ["group_0007", "group_0008.json"]
    ] * 2 + [[]]


@pytest.mark.parametrize(
    ("code", "created"),
    [("PreconditionFailed", False), ("AccessDenied", None), ("ConditionalRequestConflict", True)],
)
def test_only_what_is_there_is_there(
    store: Any, monkeypatch: pytest.MonkeyPatch, code: str, created: bool | None
) -> None:
    """An account's number may hold a 412; where two put at once, one is asked to put again."""
    store.create_bucket(Bucket=BUCKET)
    where = open_store(f"s3://{BUCKET}/once")
    put, answers = where._files.pipe_file, [code]
    words = f"arn:aws:iam::204412345678:user/me ({code})"

    def answering(*given: Any, **named: Any) -> None:
        if answers and (created or answers[0] is code):
            answers.pop() if created else None
            raise OSError(words) from ClientError({"Error": {"Code": code}}, "PutObject")
        put(*given, **named)

    monkeypatch.setattr(where._files, "pipe_file", answering)
    if created is None:
        with pytest.raises(StoreError, match="204412345678"):
            where.create("a.json", b"1")
    else:
        assert where.create("a.json", b"1") is created


def test_an_interrupted_upload_leaves_what_was_there(store: Any) -> None:
    store.create_bucket(Bucket=BUCKET)
    where = open_store(f"s3://{BUCKET}/once")
    where.write("results.json", b"old")

    class Ends(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell():
                raise KeyboardInterrupt
            return super().read(1000)

    with pytest.raises(KeyboardInterrupt):
        where._upload("results.json", Ends(bytes(5000)))
    assert where.read("results.json") == b"old"


def test_a_url_with_credentials_is_refused_without_repeating_them() -> None:
    with pytest.raises(InvalidInput, match="carries credentials") as caught:
        open_store("s3://me:secret@bucket/x")
    assert "secret@" not in str(caught.value)
