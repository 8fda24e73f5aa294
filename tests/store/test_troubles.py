"""What goes wrong with a bucket is said in one line, within seconds, and without a secret."""

import os
import time

import pytest

from decant.store import StoreError, open_store
from decant.store.credentials import aws_provider
from decant.store.objects import ObjectStore
from decant.store.opening import require_conditions
from decant.store.patience import Patience
from tests.making.small_server import answering, google_bucket

SECRET = "thesecretkey0123456789"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """No credentials of any cloud, and a home without files."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "GCE_", "STORAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someid")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def told_by(act, *, within: float = 6.0) -> str:
    """The error's text, of one line and without the secret, in a few seconds."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        act()
    assert time.monotonic() - began < within
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 300
    assert SECRET not in repr(caught.getrepr(chain=True, showlocals=False))
    return told


def test_without_credentials_the_cloud_s_own_ways_to_log_in_are_named():
    told = told_by(lambda: open_store("s3://b-b/c"))
    assert "no AWS credentials were found. Set AWS" in told
    assert told.endswith("A public bucket is read without them: set AWS_SKIP_SIGNATURE=true")
    told = told_by(lambda: open_store("gs://b-b/c"))
    assert told.endswith("A public bucket is read without them: set GOOGLE_SKIP_SIGNATURE=true")
    assert told.startswith("gs://b-b/c: no Google credentials were found. Run `gcloud auth")


ANSWERS = [
    (400, "ExpiredToken", "have expired. Renew them"),
    (403, "RequestTimeTooSkewed", "clock is wrong by more than 15 minutes. Set it"),
    (403, "AccessDenied", "no permission to read. Ask"),
    (403, "SignatureDoesNotMatch", "the credentials are wrong. Check AWS_ACCESS_KEY_ID"),
    (404, "NoSuchBucket", "there is no such bucket. Check its name"),
    (301, "PermanentRedirect", "in another region. Set AWS_REGION"),
    (400, "AuthorizationHeaderMalformed", "in another region. Set AWS_REGION"),
    (405, "MethodNotAllowed", "the server refused the request (405 MethodNotAllowed)"),
]


@pytest.mark.parametrize(("status", "code", "told"), ANSWERS, ids=lambda value: str(value))
def test_each_answer_of_a_server_has_a_message_of_its_own(status, code, told, keys, monkeypatch):
    with answering(status, f"<Error><Code>{code}</Code><X>{SECRET}</X></Error>") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        assert told in told_by(lambda: open_store("s3://b-b/c").get("key"))


def test_a_busy_server_is_asked_again_and_then_named(keys, monkeypatch):
    with answering(503, "<Error><Code>SlowDown</Code></Error>", {"Retry-After": "1"}) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        client = open_store("s3://b-b/c").client
        store = ObjectStore(client, url="s3://b-b/c", patience=lambda: Patience(long=1.0))
        for act in (lambda: store.get("k"), lambda: store.put("k", b""), lambda: [*store.list()]):
            assert "busy or failing (503 SlowDown)" in told_by(act)


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("http://no-such-host.invalid", "the server's name is unknown. Check AWS_ENDPOINT_URL"),
        ("http://127.0.0.1:9", "the server does not answer"),
    ],
)
def test_a_server_that_is_not_there_is_no_long_wait(endpoint, told, keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert told in told_by(lambda: open_store("s3://b-b/c").put("key", b""))


def test_a_real_server_refuses_wrong_keys_other_buckets_and_writes_of_readers(
    s3_server, monkeypatch
):
    def use(keys):
        for name, value in s3_server.environment(keys).items():
            monkeypatch.setenv(name, value)

    use((s3_server.owner[0], SECRET))
    wrong = "s3://tests/x/key: the credentials are wrong. Check AWS_ACCESS_KEY_ID"
    for verb in ("get", "head", "delete"):
        assert wrong in told_by(lambda verb=verb: getattr(open_store("s3://tests/x"), verb)("key"))
    use(s3_server.owner)
    absent = open_store("s3://nobody-made-it/x")
    assert "there is no such bucket" in told_by(lambda: absent.get("key"))
    use(s3_server.reader)
    store = open_store("s3://tests/x")
    assert store.head("key") is None
    assert "no permission to write" in told_by(lambda: store.create("key", b""))
    assert "no permission to write" in told_by(lambda: open_store("s3://tests/x", writing=True))


@pytest.mark.parametrize(
    ("cloud", "endpoint", "url"),
    [("AWS", "AWS_ENDPOINT_URL", "s3://b-b/c"), ("GOOGLE", "GOOGLE_BASE_URL", "gs://b-b/c")],
)
def test_a_public_bucket_is_read_without_credentials(cloud, endpoint, url, monkeypatch):
    facts = {"ETag": '"9dd4e461268c8034f5c8564e155c67a6"', "Content-Range": "bytes 0-0/1"}
    asked: list[dict[str, str]] = []
    with answering(
        200, "x", {**facts, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, asked=asked
    ) as address:
        monkeypatch.setenv(endpoint, address)
        monkeypatch.setenv(f"{cloud}_SKIP_SIGNATURE", "true")
        assert open_store(url).get("key") == b"x"
    assert asked
    assert not any("authorization" in headers for headers in asked)


def test_keys_of_a_profile_are_used_and_read_again_when_they_are_renewed(
    s3_server, monkeypatch, tmp_path
):
    file = tmp_path / ".aws/credentials"
    file.parent.mkdir()
    key, secret = s3_server.owner
    lines = "[mine]\naws_access_key_id = {}\naws_secret_access_key = {}\nendpoint_url = {}\n"
    file.write_text(lines.format(key, secret, s3_server.endpoint))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = open_store("s3://tests/profile")
    store.put("a", b"x")
    assert secret not in repr(store) + repr(store.client)
    file.write_text(lines.format("another", SECRET, s3_server.endpoint))
    assert aws_provider()()["access_key_id"] == "another"


def test_a_profile_that_cannot_be_read_or_needs_boto3_is_named(tmp_path, monkeypatch):
    file = tmp_path / ".aws/credentials"
    file.parent.mkdir()
    file.write_text(f"aws_secret_access_key = {SECRET}\n")
    assert "cannot be read as AWS writes it" in told_by(lambda: open_store("s3://b-b"))
    file.write_text("")
    (tmp_path / ".aws/config").write_text("[profile sso]\nsso_session = x\n")
    monkeypatch.setenv("AWS_PROFILE", "sso")
    monkeypatch.setattr("decant.store.credentials.find_spec", lambda name: None)
    assert "'sso' logs in in a way that needs boto3" in told_by(lambda: open_store("s3://b-b"))


def test_a_bucket_of_google_keeps_conditions_by_generation(monkeypatch):
    with google_bucket() as (address, objects):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        store = open_store("gs://b-b/pre", writing=True)
        assert store.create("a", b"one")
        assert not store.create("a", b"two")
        version = store.head("a").version
        assert store.swap("a", b"three", version)
        assert not store.swap("a", b"four", version)
        assert store.get("a", start=1, length=3) == b"hre"
        assert list(store.list()) == [("a", 5)]
        store.put("b/c", b"")
        store.delete("a")
        assert store.head("a") is None
        assert objects == {"pre/b/c": b""}


def test_a_server_of_google_s_kind_that_ignores_conditions_is_refused(monkeypatch):
    with google_bucket(heeds_conditions=False) as (address, objects):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        store = open_store("gs://b-b/pre")
        told = told_by(lambda: require_conditions(store))
        assert told.startswith("gs://b-b/pre: this server ignores conditions")
        assert objects == {}
