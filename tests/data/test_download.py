"""Downloads from a server on this machine that stalls, breaks off, sends wrong headers or another file."""

import hashlib
import json
import random
import socket
from pathlib import Path

import pytest
import requests

from raydml.data.catalog import DataError
from raydml.data.download import Archive, NotServed, Patience, _Session, fetch
from tests.data.file_server import BODY, Answer, file_server, ranges

OTHER = random.Random(2).randbytes(300_000)
HASTE = Patience(stall_s=0.4, num_retries=2, wait_s=0.01)


@pytest.fixture
def server(monkeypatch):
    with file_server(monkeypatch) as server:
        yield server


def archive(server, body=BODY, **more):
    facts = {
        "url": server.url,
        "file_name": "archive.tgz",
        "num_bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "folder": "archive",
        "max_unpacked_bytes": 10**9,
    }
    return Archive(**{**facts, **more})


def get(one, folder, patience=HASTE, **more):
    return fetch(one, folder, patience=patience, **more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def partial_of(folder: Path) -> bytes:
    return (folder / "archive.tgz.partial").read_bytes()


def test_a_file_arrives_whole_under_its_name_and_nothing_else_stays(server, tmp_path):
    seen = []
    path = get(archive(server), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "archive.tgz"
    assert path.read_bytes() == BODY
    assert names(tmp_path) == ["archive.tgz"]
    assert ranges(server) == [None]
    assert (seen[0], seen[-1]) == ((0, 300_000), (300_000, 300_000))
    assert seen == sorted(seen)


def test_a_file_that_is_there_is_checked_and_not_fetched(server, tmp_path):
    (tmp_path / "archive.tgz").write_bytes(BODY)
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert server.requests == []


def test_a_file_of_that_name_that_is_another_is_refused_and_kept(server, tmp_path):
    (tmp_path / "archive.tgz").write_bytes(OTHER)
    with pytest.raises(DataError, match=f"exists already, but its sha256 is {hashlib.sha256(OTHER).hexdigest()}"):
        get(archive(server), tmp_path)
    assert (tmp_path / "archive.tgz").read_bytes() == OTHER
    assert server.requests == []


def test_a_cut_connection_is_resumed_at_the_byte_where_it_ended(server, tmp_path):
    headers = {"ETag": '"one"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    server.answers = [Answer(headers=headers, cut=100_000), Answer(headers=headers)]
    reported = []
    assert get(archive(server), tmp_path, report=reported.append).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]
    assert server.requests[1]["If-Range"] == '"one"'
    assert "the connection ended after 100,000 of 300,000 bytes" in reported[0]
    assert names(tmp_path) == ["archive.tgz"]


@pytest.mark.parametrize(
    ("headers", "if_range"),
    [
        ({"ETag": 'W/"one"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, "Mon, 01 Jan 2024 00:00:00 GMT"),
        ({"ETag": 'W/"one"'}, None),
        ({}, None),
    ],
)
def test_a_weak_etag_is_never_sent_as_if_range(server, tmp_path, headers, if_range):
    server.answers = [Answer(headers=headers, cut=100_000), Answer(headers=headers)]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-"]
    assert server.requests[1].get("If-Range") == if_range


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    server.answers = [Answer(headers={"ETag": '"one"'}, cut=120_000)]
    with pytest.raises(NotServed, match=r"120,000 bytes are in .*partial, and the same command continues there"):
        get(archive(server), tmp_path, patience=Patience(num_retries=0))
    assert partial_of(tmp_path) == BODY[:120_000]
    server.answers = [Answer(headers={"ETag": '"one"'})]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=120000-"]


def test_ctrl_c_leaves_what_has_come(server, tmp_path):
    def interrupt(done, _total):
        if done >= 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(archive(server), tmp_path, progress=interrupt)
    there = partial_of(tmp_path)
    assert len(there) >= 100_000
    assert there == BODY[: len(there)]
    server.answers = [Answer()]
    if len(there) < len(BODY):
        assert get(archive(server), tmp_path).read_bytes() == BODY
        assert ranges(server) == [None, f"bytes={len(there)}-"]


def test_a_body_that_was_whole_but_not_renamed_needs_no_request(server, tmp_path):
    def interrupt(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(archive(server), tmp_path, progress=interrupt)
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert len(server.requests) == 1


class Elsewhere(Answer):
    """An answer whose part begins at another byte than the requested one."""

    def start_of(self, handler):
        return None if handler.headers.get("Range") is None else 50_000


@pytest.mark.parametrize(
    ("answers", "more"),
    [([Answer(ranges=False)], []), ([Elsewhere()], [None]), ([Answer(b"", status=416), Answer()], [None])],
    ids=["ranges ignored", "a part that begins elsewhere", "416"],
)
def test_what_does_not_continue_the_file_is_read_from_the_beginning(server, tmp_path, answers, more):
    server.answers = [Answer(cut=100_000), *answers]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-", *more]


@pytest.mark.parametrize("if_range", [True, False])
def test_two_versions_are_never_joined(server, tmp_path, if_range):
    """Also when the server overlooks If-Range and sends the rest of the new version."""
    new = Answer(OTHER, headers={"ETag": '"two"'}, if_range=if_range)
    server.answers = [Answer(headers={"ETag": '"one"'}, cut=100_000), new]
    assert get(archive(server, OTHER, sha256=None), tmp_path).read_bytes() == OTHER
    assert ranges(server) == [None, "bytes=100000-"] + ([] if if_range else [None])


def test_a_new_size_is_a_new_version_too(server, tmp_path):
    server.answers = [Answer(cut=100_000, headers={"ETag": '"x"'}), Answer(OTHER + b"!", headers={"ETag": '"x"'})]
    one = archive(server, num_bytes=None, sha256=None)
    assert get(one, tmp_path).read_bytes() == OTHER + b"!"
    assert ranges(server) == [None, "bytes=100000-", None]


OTHER_ADDRESS = {"url": "http://127.0.0.1:1/x", "num_bytes": 300_000, "etag": '"one"', "last_modified": None}


@pytest.mark.parametrize(
    "note", [None, "", "[]", '{"url": "http://elsewhere/", "num_bytes": 1}', json.dumps(OTHER_ADDRESS)]
)
def test_bytes_of_unknown_origin_or_another_address_are_not_resumed_into(server, tmp_path, note):
    (tmp_path / "archive.tgz.partial").write_bytes(OTHER[:1000])
    if note is not None:
        (tmp_path / "archive.tgz.partial.json").write_text(note)
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None]
    assert names(tmp_path) == ["archive.tgz"]


def test_without_etag_date_and_digest_versions_cannot_be_distinguished(server, tmp_path):
    server.answers = [Answer(OTHER, cut=100_000), Answer()]
    assert get(archive(server, sha256=None), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, None]


def test_a_stalled_connection_is_given_up_retried_and_reported(server, tmp_path):
    server.answers = [Answer(cut=40_000, stalls=True)]
    with pytest.raises(NotServed, match=r"no byte came for 0\.4 s \(3 tries in a row\); 120,000 .*continues there"):
        get(archive(server), tmp_path)
    assert ranges(server) == [None, "bytes=40000-", "bytes=80000-"]
    assert partial_of(tmp_path) == BODY[:120_000]
    server.answers = [Answer()]
    assert get(archive(server), tmp_path).read_bytes() == BODY


def test_a_server_that_does_not_even_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait to be accepted for ever
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/archive.tgz"
        one = Archive(url, "archive.tgz", None, None, "archive", 1)
        with pytest.raises(NotServed, match=r"no byte came for 0\.2 s \(2 tries"):
            get(one, tmp_path, Patience(stall_s=0.2, num_retries=1, wait_s=0.01))
    with pytest.raises(NotServed, match=r"Connection refused.*\(2 tries .*nothing has arrived"):
        get(one, tmp_path, Patience(stall_s=0.2, num_retries=1, wait_s=0.01))


def test_a_connection_that_always_breaks_at_one_place_ends(server, tmp_path):
    server.answers = [Answer(cut=100_000, ranges=False)]
    with pytest.raises(NotServed, match="100,000 of 300,000 bytes"):
        get(archive(server), tmp_path)
    assert len(server.requests) == 3


def test_a_long_download_over_a_bad_line_arrives(server, tmp_path):
    """Six breaks with two retries: a try that brings a MiB does not count as failed."""
    body = random.Random(3).randbytes(8 << 20)
    server.answers = [Answer(body, cut=(1 << 20) + 50_000)]
    assert get(archive(server, body), tmp_path).read_bytes() == body
    assert len(server.requests) == 8


def test_an_error_that_may_pass_is_retried_and_one_that_will_not_is_not(server, tmp_path):
    server.answers = [Answer(b"", status=500), Answer(b"", status=503), Answer()]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    server.requests.clear()
    (tmp_path / "archive.tgz").unlink()
    server.answers = [Answer(b"", status=500)]
    with pytest.raises(NotServed, match=r"the server answered 500 .*\(3 tries"):
        get(archive(server), tmp_path)
    assert len(server.requests) == 3
    for status in (401, 403, 404, 410):
        server.requests.clear()
        server.answers = [Answer(b"gone", status=status)]
        with pytest.raises(NotServed, match=f"answers {status} "):
            get(archive(server), tmp_path)
        assert len(server.requests) == 1
    server.answers = [Answer(b"", status=204)]
    with pytest.raises(NotServed, match="204 No Content instead of"):
        get(archive(server), tmp_path)
    assert names(tmp_path) == []


def test_an_error_keeps_what_had_come(server, tmp_path):
    server.answers = [Answer(cut=100_000), Answer(b"", status=404)]
    with pytest.raises(NotServed, match="404"):
        get(archive(server), tmp_path)
    assert partial_of(tmp_path) == BODY[:100_000]


def test_a_length_that_is_too_long_is_a_broken_connection(server, tmp_path):
    server.answers = [Answer(length=400_000)]
    with pytest.raises(NotServed, match="300,000 of 400,000 bytes"):
        get(archive(server, num_bytes=None), tmp_path, patience=Patience(num_retries=0))


@pytest.mark.parametrize("length", [200_000, 400_000, 0])
def test_a_length_that_is_not_the_expected_one_is_refused_before_a_byte_is_written(server, tmp_path, length):
    server.answers = [Answer(length=length)]
    with pytest.raises(NotServed, match=f"offers {length:,} bytes where 300,000 are expected"):
        get(archive(server), tmp_path)
    assert len(server.requests) == 1
    assert names(tmp_path) == []


def test_a_length_that_is_too_short_is_found_by_the_digest(server, tmp_path):
    server.answers = [Answer(length=200_000)]
    with pytest.raises(DataError, match="its sha256 is"):
        get(archive(server, num_bytes=None), tmp_path)
    assert (tmp_path / "archive.tgz.rejected").read_bytes() == BODY[:200_000]


def test_without_a_length_the_expected_size_is_the_end(server, tmp_path):
    server.answers = [Answer(length=None, cut=100_000), Answer(length=None)]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    (tmp_path / "archive.tgz").unlink()
    server.answers = [Answer(BODY + b"!", length=None)]
    with pytest.raises(DataError, match="sends more than the 300,000 bytes"):
        get(archive(server), tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_digest_is_set_aside_and_never_resumed_into(server, tmp_path):
    server.answers = [Answer(OTHER)]
    found, expected = hashlib.sha256(OTHER).hexdigest(), hashlib.sha256(BODY).hexdigest()
    with pytest.raises(DataError, match=f"its sha256 is {found} where {expected} is expected.*--sha256 {found}"):
        get(archive(server), tmp_path)
    assert names(tmp_path) == ["archive.tgz.rejected"]
    server.answers = [Answer()]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, None]


def test_a_file_that_was_rejected_is_taken_back_where_the_user_accepts_it(server, tmp_path):
    server.answers = [Answer(OTHER)]
    one = archive(server, sha256="0" * 64)
    found = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(DataError, match=f"--sha256 {found}"):
        get(one, tmp_path)
    assert get(one, tmp_path, accepted_sha256=found.upper()).read_bytes() == OTHER
    assert len(server.requests) == 1
    assert names(tmp_path) == ["archive.tgz"]


def test_an_accepted_sha256_replaces_size_and_digest(server, tmp_path):
    body = OTHER[:1234]
    server.answers = [Answer(body)]
    accepted = hashlib.sha256(body).hexdigest()
    assert get(archive(server), tmp_path, accepted_sha256=accepted).read_bytes() == body
    with pytest.raises(DataError, match="not the one given with --sha256"):
        get(archive(server), tmp_path, accepted_sha256="0" * 64)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/archive.tgz", "data:,x", "gopher://x/"])
@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_redirect_to_another_scheme_is_refused(server, tmp_path, target, status):
    server.answers = [Answer(b"", status=status, headers={"Location": target})]
    with pytest.raises(NotServed, match="No connection adapters were found"):
        get(archive(server), tmp_path)
    assert len(server.requests) == 1
    assert names(tmp_path) == []


def test_a_redirect_on_the_web_is_followed_with_its_range(server, tmp_path):
    redirect = Answer(b"", status=302, headers={"Location": server.url.replace("archive.tgz", "moved")})
    server.answers = [Answer(cut=100_000), redirect, Answer()]
    assert get(archive(server), tmp_path).read_bytes() == BODY
    assert ranges(server) == [None, "bytes=100000-", "bytes=100000-"]


@pytest.mark.parametrize("target", ["http://elsewhere/x", "HTTP://elsewhere/x"])
def test_a_redirect_from_https_to_http_is_refused(target):
    answer = requests.Response()
    answer.status_code, answer.url, answer.headers["Location"] = 302, "https://here/x", target
    with pytest.raises(NotServed, match="not encrypted"):
        _Session().get_redirect_target(answer)
    answer.headers["Location"] = "/moved"
    assert _Session().get_redirect_target(answer) == "/moved"


def test_a_circle_of_redirects_ends(server, tmp_path):
    server.answers = [Answer(b"", status=302, headers={"Location": server.url})]
    with pytest.raises(NotServed, match="Exceeded 30 redirects"):
        get(archive(server), tmp_path)
    assert len(server.requests) == 31


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "archive.tgz"])
def test_other_addresses_are_not_opened(server, tmp_path, url):
    with pytest.raises(NotServed, match=r"No connection adapters|No scheme supplied"):
        get(archive(server, url=url), tmp_path)


def test_what_cannot_fit_is_refused_before_a_byte_is_written(server, tmp_path):
    server.answers = [Answer(length=10**16)]
    with pytest.raises(DataError, match=r"bytes free; 10,000,000,000,000,000 more are to come.*Make room"):
        get(archive(server, num_bytes=10**16), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_disk_that_fills_up_is_an_error_with_a_cure(server, tmp_path):
    (tmp_path / "archive.tgz.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"cannot write .*No space left.*; nothing has arrived; the same command"):
        get(archive(server), tmp_path)
