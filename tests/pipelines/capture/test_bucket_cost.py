"""What `plan` says of requests is what a server then counts."""

import dataclasses
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from decant.pipelines.capture import bucket_cost
from decant.pipelines.capture.bucket_cost import epoch_requests
from decant.pipelines.capture.estimate import estimate
from decant.pipelines.capture.estimate_report import print_estimate
from decant.pipelines.capture.job import precompute
from decant.schemas import open_cache
from decant.schemas.disk import stand_in
from decant.store import open_store
from decant.store.clients import region_of
from decant.store.urls import bucket_url
from decant.trainer.data import block_order
from tests.making.caches import tiny_settings, write_corpus
from tests.making.fault_proxy import FaultProxy

QUIET = Console(quiet=True)


class Counting(FaultProxy):
    """A proxy that spoils nothing and counts all."""

    def __init__(self, endpoint: str):
        super().__init__(endpoint, share=0)
        self.asked: Counter[str] = Counter()

    def fault_for(self, request):
        with self._lock:
            self.asked[request.verb] += 1

    @property
    def classes(self) -> tuple[int, int]:
        """PUT and the like, GET and HEAD."""
        asked = self.asked
        return (
            sum(asked[verb] for verb in ("put", "create", "swap", "list")),
            asked["get"] + asked["range"] + asked["head"],
        )


@pytest.mark.slow
def test_a_capture_and_an_epoch_ask_as_often_as_the_plan_says(
    bucket, s3_server, monkeypatch, tmp_path
):
    monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "mirror"))
    write_corpus(tmp_path / "corpus", files=12, words=600)
    config = tiny_settings(tmp_path, defaults=True)
    config = dataclasses.replace(config, output=Path(bucket))
    planned = estimate(config, console=QUIET)
    cost = planned.bucket
    assert cost is not None
    assert (cost.address, cost.region) == (bucket, "us-east-1")
    proxy = Counting(s3_server.endpoint)
    monkeypatch.setattr(stand_in, "_buckets", {})  # which know the server itself
    with proxy.serving() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        precompute(config, console=QUIET)
        put, get = proxy.classes
        assert cost.capture.put == pytest.approx(put, rel=0.1)
        assert cost.capture.get == pytest.approx(get, rel=0.1)
        sizes = dict(open_store(bucket).list())
        assert cost.objects == pytest.approx(len(sizes), rel=0.1)
        assert cost.capture.bytes == pytest.approx(sum(sizes.values()), rel=0.15)
        proxy.asked.clear()
        monkeypatch.setenv("DECANT_MIRROR", str(tmp_path / "reading"))
        cache = open_cache(bucket)
        for row in cache.rows("train").tolist():
            cache.read([row], targets=("sketch",))
        assert proxy.classes[1] <= cost.epoch.get
    told = StringIO()
    print_estimate(planned, Console(file=told, width=1000))
    assert (
        f"to {bucket} (region us-east-1): {cost.objects:,} objects; the capture" in told.getvalue()
    )
    assert f"by at most {cost.epoch.get:,} GET" in told.getvalue()


def test_blocks_are_as_long_as_those_of_the_trainer():
    assert bucket_cost._BLOCK_ROWS == block_order.BLOCK_ROWS


def test_twenty_billion_tokens_take_the_requests_of_the_arithmetic():
    """4,768 units of 4,096 rows of 1,024 tokens; 78 bytes a token, 2.1 of them of the rows."""
    corpus = {"rows": 4768 * 4096, "units": 4768, "array_files": 0, "bytes": 78 * 20 * 10**9}
    corpus["rows_bytes"] = 42 * 10**9
    each = epoch_requests(**corpus, records=2, in_blocks=False)
    blocks = epoch_requests(**corpus, records=2, in_blocks=True)
    assert each.get == pytest.approx(39.2e6, rel=0.01), "160,000 for rows, 19.5 M for each signal"
    assert blocks.get == pytest.approx(0.8e6, rel=0.02)
    assert blocks.bytes == pytest.approx(1.56e12, rel=0.01)


def test_the_region_is_named_where_it_is_known(monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    assert region_of(bucket_url("s3://b-b/c")) == "us-east-1", "where S3 is asked by default"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert region_of(bucket_url("s3://b-b/c")) == ""
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert region_of(bucket_url("s3://b-b/c")) == "eu-west-1"
    assert region_of(bucket_url("gs://b-b/c")) == ""
