"""Files from the web, against a server of this process's own that drops, lies, redirects and waits; and models with weights."""
import contextlib
import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import minicnn as mc
from minicnn import models, train
from minicnn.data import Normalize
from minicnn.models import published
from minicnn.weights import fetch as fetching
from minicnn.weights.fetch import FetchError, cache_folder, fetch, file_name

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(250_000)


def named(content, stem="tiny", suffix=".npz"):
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"


NAME = named(CONTENT)


# ---------------------------------------------------------------- a web site, and what may go wrong on the way
class Site:
    """files: {path: bytes}. plan: what the next answers do instead of their duty. requests: (path, headers) of all so far."""

    def __init__(self):
        self.files, self.plan, self.requests = {f"/{NAME}": CONTENT, "/model.npz": CONTENT}, [], []
        self.over = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append((self.path, dict(self.headers)))
                answer = site.plan.pop(0) if site.plan else whole
                with contextlib.suppress(ConnectionError):
                    answer(self, site)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        self.host = f"127.0.0.1:{self.server.server_port}"

    def url(self, path=NAME):
        return f"http://{self.host}/{path}"

    def ranges(self):
        return [headers.get("Range") for _, headers in self.requests]

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def head(h, code, **headers):
    h.send_response(code)
    for name, value in headers.items():
        h.send_header(name.replace("_", "-"), str(value))
    h.end_headers()


def etag(content):
    return f'"{hashlib.md5(content).hexdigest()}"'


def reply(h, site, ranges=True, count=None, keep=lambda content: content, tag=etag, condition=True, shift=0, total=None):
    """A good answer, unless told otherwise: `count` bytes of it, changed by `keep`; with no ETag, no If-Range, another place."""
    content = site.files.get(h.path.partition("?")[0])
    if content is None:
        return head(h, 404, Content_Length=0)
    more = {"ETag": tag(content)} if tag else {}
    asked = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range") or "")
    start = int(asked[1]) if asked and ranges else 0
    if condition and h.headers.get("If-Range") not in (None, more.get("ETag")):
        start = 0
    if start and start >= len(content):
        return head(h, 416, Content_Length=0)
    if start:
        start += shift
        more["Content_Range"] = f"bytes {start}-{len(content) - 1}/{total or len(content)}"
    head(h, 206 if start else 200, Content_Length=len(content) - start, **more)
    h.wfile.write(keep(content[start:])[:count])
    return h.wfile.flush()


def whole(h, site):
    reply(h, site)


def with_(**faults):
    return lambda h, site: reply(h, site, **faults)


def cut(count, **faults):
    return with_(count=count, **faults)


def broken(count):
    """So many bytes, and then a reset."""
    def answer(h, site):
        reply(h, site, count=count)
        h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        h.rfile.close()
        h.wfile.close()
        h.connection.close()
    return answer


def silent(count):
    """So many bytes, and then nothing, until the test is over; None: not even the head."""
    def answer(h, site):
        if count is not None:
            reply(h, site, count=count)
        site.over.wait(60)
    return answer


def status(code):
    return lambda h, site: head(h, code, Content_Length=0)


def moved(where, code=302):
    return lambda h, site: head(h, code, Location=where, Content_Length=0)


def unmeasured(h, site):
    """No Content-Length; the end of the connection is the end of the file."""
    head(h, 200)
    h.wfile.write(site.files[h.path])


def chunked(*lengths, end=True):
    def answer(h, site):
        h.protocol_version = "HTTP/1.1"
        head(h, 200, Transfer_Encoding="chunked")
        place = 0
        for n in lengths:
            h.wfile.write(b"%x\r\n" % n + CONTENT[place:place + n] + b"\r\n")
            place += n
        if end:
            h.wfile.write(b"0\r\n\r\n")
    return answer


def flipped(content):
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.fixture
def site():
    made = Site()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no proxies, no pauses."""
    monkeypatch.setenv("MINICNN_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "PAUSE", 0)
    return tmp_path / "cache"


def left(cache):
    """All that lies in the cache, hidden files too."""
    return {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


def good(cache, site, **options):
    """Fetch, and there is the file and nothing else."""
    path = fetch(site.url(), **options)
    assert path == cache / NAME
    assert path.read_bytes() == CONTENT
    assert left(cache) == {NAME}
    return path


def fails(words, url, cache):
    """Fetching ends in one line with these words; nothing has the file's name."""
    with pytest.raises(FetchError) as caught:
        fetch(url)
    message = str(caught.value)
    assert re.search(words, message), message
    assert "\n" not in message
    assert NAME not in left(cache)
    return message


# ---------------------------------------------------------------- the way it is meant
def test_a_file_is_fetched_once(site, cache, capfd):
    path = good(cache, site)
    assert site.requests[0][1]["User-Agent"] == "minicnn"
    assert site.ranges() == [None]
    site.close()                                            # no network: the cache is enough
    assert fetch(site.url()) == path
    assert len(site.requests) == 1
    assert capfd.readouterr() == ("", "")                   # no terminal: no bar


def test_another_folder_can_be_named(site, cache, tmp_path):
    assert fetch(site.url(), tmp_path / "elsewhere" / "deep") == tmp_path / "elsewhere" / "deep" / NAME
    assert fetch(site.url(), str(tmp_path / "elsewhere" / "deep")).read_bytes() == CONTENT
    assert len(site.requests) == 1
    assert not cache.exists()


def test_a_file_put_there_by_hand_is_taken(site, cache):
    cache.mkdir()
    (cache / NAME).write_bytes(CONTENT)
    assert fetch(site.url()).read_bytes() == CONTENT
    assert not site.requests


def test_a_file_that_is_damaged_where_it_lies_is_told(site, cache):
    path = good(cache, site)
    path.write_bytes(flipped(CONTENT))
    with pytest.raises(FetchError, match=rf"{NAME} has the SHA-256 .* its name says {NAME[5:13]}: .*delete it, and it is"):
        fetch(site.url())
    path.unlink()
    good(cache, site)
    unnamed = fetch(site.url("model.npz"))                  # of a name without a hash nobody knows until it is read
    unnamed.write_bytes(b"milk, eggs")
    url = site.url("model.npz")
    for use in (lambda: models.resnet20(weights=url), lambda: train.load_published("resnet20", url)):
        with pytest.raises(mc.weights.WeightsError, match=rf"is damaged or not .* delete {unnamed}, and it is fetched again"):
            use()


def test_names_without_a_hash_are_kept_apart_by_their_address(site, cache):
    site.files["/v2/model.npz"] = OTHER
    first, second = fetch(site.url("model.npz")), fetch(site.url("v2/model.npz"))
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, OTHER)
    assert first.name == second.name == "model.npz"
    assert fetch(site.url("model.npz")) == first
    assert fetch(site.url("model.npz#there")) == first      # a fragment is no other file
    assert fetch(site.url("model.npz?v=2")) != first
    assert len(site.requests) == 3


@pytest.mark.parametrize("answer", [unmeasured, chunked(100_000, 200_000), with_(tag=None), with_(ranges=False)])
def test_servers_may_say_less(site, cache, answer):
    site.plan = [answer]
    good(cache, site)


def test_an_empty_file_is_a_file(site, cache):
    site.files["/" + named(b"")] = b""
    assert fetch(site.url(named(b""))).read_bytes() == b""


def test_a_bar_is_shown_on_a_terminal_alone(site, cache, monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    import io
    shown = {}
    for terminal, wanted in ((True, True), (True, False), (False, True)):
        (cache / NAME).unlink(missing_ok=True)
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        good(cache, site, progress=wanted)
        shown[terminal, wanted] = NAME in stream.getvalue()
    assert shown == {(True, True): True, (True, False): False, (False, True): False}
    monkeypatch.setattr(sys, "stderr", None)                # a program without a console
    (cache / NAME).unlink()
    good(cache, site)


def test_without_tqdm_there_is_no_bar_and_no_error(site, cache, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    good(cache, site)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- connections that break
def test_what_was_cut_short_goes_on_from_there(site, cache):
    site.plan = [cut(100_000), cut(70_000)]
    good(cache, site)
    assert site.ranges() == [None, "bytes=100000-", "bytes=170000-"]
    assert [headers.get("If-Range") for _, headers in site.requests] == [None, etag(CONTENT), etag(CONTENT)]


def test_a_connection_that_is_reset_is_no_end(site, cache):
    site.plan = [broken(100_000), broken(0)]                # what had not arrived by then is lost, so where it goes on is not known
    good(cache, site)
    assert len(site.requests) == 3


def test_a_chunked_answer_that_breaks_is_not_taken_for_a_whole_one(site, cache):
    site.plan = [chunked(100_000, 1000, end=False)]
    good(cache, site)
    assert site.ranges() == [None, "bytes=101000-"]


def test_silence_ends(site, cache, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    site.plan = [silent(None), silent(50_000)]
    good(cache, site)
    assert site.ranges() == [None, None, "bytes=50000-"]


def test_silence_for_good_is_told(site, cache, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.1)
    site.plan = [silent(None)] * fetching.TRIES
    fails(r"\(the last: 127\.0\.0\.1: timed out\)", site.url(), cache)
    site.plan = [silent(10)] * fetching.TRIES
    fails(r"\(the last: the connection broke: timed out\)", site.url(), cache)


def test_a_line_that_never_holds_is_given_up_and_the_next_call_goes_on(site, cache):
    site.plan = [cut(10_000)] * fetching.TRIES
    message = fails(rf"did not come whole in {fetching.TRIES} tries \(the last: cut short after 50,000 of 300,000 bytes\): "
                    "call again, to go on from the 50,000 bytes", site.url(), cache)
    assert f"fetch {site.url()} yourself, and save it as {cache / NAME}" in message
    assert left(cache) == {f"{NAME}.part", f".{NAME}.json"}
    good(cache, site)
    assert site.ranges()[fetching.TRIES:] == ["bytes=50000-"]


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_a_server_in_trouble_is_asked_again(site, cache, code):
    site.plan = [status(code)] * 2
    good(cache, site)
    site.plan = [status(code)] * fetching.TRIES
    (cache / NAME).unlink()
    fails(f"answers {code} ", site.url(), cache)


@pytest.mark.parametrize("code", [404, 403, 401, 410, 416])
def test_a_refusal_is_told_at_once(site, cache, code):
    site.plan = [status(code)]
    message = fails(rf"^127\.0\.0\.1 answers {code} \w+.*: check the address, or fetch http", site.url(), cache)
    assert str(cache / NAME) in message
    assert len(site.requests) == 1
    assert left(cache) == set()


def test_an_answer_without_a_file_is_none(site, cache):
    site.plan = [status(204)]
    fails("answers 204 No Content", site.url(), cache)


# ---------------------------------------------------------------- parts that do not fit
def began(site, count=100_000, path=NAME, **faults):
    """As after a call that was interrupted."""
    site.plan = [cut(count, **faults), *[status(500)] * (fetching.TRIES - 1)]
    with pytest.raises(FetchError):
        fetch(site.url(path))
    site.requests.clear()


def test_a_server_that_ignores_the_range_starts_over(site, cache):
    began(site)
    site.plan = [with_(ranges=False)]
    good(cache, site)
    assert site.ranges() == ["bytes=100000-"]


@pytest.mark.parametrize("answer", [
    with_(),                                                # knows If-Range: sends all of the new file
    with_(condition=False),                                 # does not: sends the new file's rest, with the new ETag
    with_(condition=False, tag=None)])                      # nor ETags: only the length is another
def test_a_file_that_has_changed_between_two_parts_starts_over(site, cache, answer):
    began(site, path="model.npz")
    site.files["/model.npz"] = OTHER
    site.plan = [answer]
    assert fetch(site.url("model.npz")).read_bytes() == OTHER
    assert site.requests[0][1]["Range"] == "bytes=100000-"
    assert site.requests[0][1]["If-Range"] == etag(CONTENT)


def test_without_a_hash_or_a_version_no_two_parts_are_joined(site, cache):
    began(site, path="model.npz", tag=None)
    site.files["/model.npz"] = CONTENT[::-1]                # of the same length
    assert fetch(site.url("model.npz")).read_bytes() == CONTENT[::-1]
    assert site.ranges() == [None]


def test_a_weak_etag_is_no_condition_but_is_compared(site, cache):
    def weak(content):
        return f"W/{etag(content)}"
    began(site, path="model.npz", tag=weak)
    site.files["/model.npz"] = CONTENT[::-1]
    site.plan = [with_(tag=weak)]
    assert fetch(site.url("model.npz")).read_bytes() == CONTENT[::-1]
    assert "If-Range" not in site.requests[0][1]
    assert site.ranges() == ["bytes=100000-", None]


def test_another_part_than_asked_for_starts_over(site, cache):
    began(site)
    site.plan = [with_(shift=7)]
    good(cache, site)
    assert site.ranges() == ["bytes=100000-", None]


def test_a_part_nobody_asked_for_is_not_taken(site, cache):
    site.plan = [lambda h, site: (head(h, 206, Content_Length=5), h.wfile.write(b"12345"))] * fetching.TRIES
    fails("another part than asked for", site.url(), cache)


def test_a_file_that_is_shorter_now_starts_over(site, cache):
    began(site, 260_000, "model.npz")
    site.files["/model.npz"] = OTHER
    site.plan = [with_(condition=False)]                    # 416: there is no such part
    assert fetch(site.url("model.npz")).read_bytes() == OTHER
    assert site.ranges() == ["bytes=260000-", None]


def test_a_part_that_is_whole_needs_its_name_alone(site, cache):
    began(site)
    (cache / f"{NAME}.part").write_bytes(CONTENT)           # as after a crash in front of the last step
    good(cache, site)
    assert not site.requests


@pytest.mark.parametrize("spoil", [
    lambda cache: (cache / f".{NAME}.json").unlink(), lambda cache: (cache / f".{NAME}.json").write_text("{"),
    lambda cache: (cache / f".{NAME}.json").write_text("[1]"), lambda cache: (cache / f"{NAME}.part").unlink(),
    lambda cache: (cache / f"{NAME}.part").write_bytes(b""), lambda cache: (cache / f"{NAME}.part").write_bytes(bytes(400_000))])
def test_leavings_that_cannot_be_used_start_over(site, cache, spoil):
    began(site)
    spoil(cache)
    good(cache, site)
    assert site.ranges() == [None]


# ---------------------------------------------------------------- the hash
def test_a_file_that_is_not_what_its_name_says_is_not_kept(site, cache):
    site.plan = [with_(keep=flipped)]
    digest = hashlib.sha256(flipped(CONTENT)).hexdigest()
    fails(rf"has the SHA-256 {digest[:16]}\.\.\., and its name says {NAME[5:13]}: it is damaged or another file, and was not kept",
          site.url(), cache)
    assert left(cache) == set()
    assert len(site.requests) == 1
    good(cache, site)


def test_a_damaged_beginning_is_fetched_again(site, cache):
    began(site)
    (cache / f"{NAME}.part").write_bytes(flipped(CONTENT)[:100_000])
    good(cache, site)
    assert site.ranges() == ["bytes=100000-", None]


def test_without_a_length_the_hash_sees_the_cut(site, cache):
    site.files[f"/{NAME}"] = CONTENT[:-1]
    site.plan = [unmeasured]
    fails("its name says", site.url(), cache)


def test_a_hash_may_have_capital_letters(site, cache):
    digest = hashlib.sha256(CONTENT).hexdigest()
    size = next(n for n in range(8, 65) if re.search("[a-f]", digest[:n]))
    name = f"tiny-{digest[:size].upper()}.npz"
    site.files |= {f"/{name}": CONTENT, "/tiny-ABCDEF012345.npz": CONTENT}
    assert fetch(site.url(name)) == cache / name
    fails("its name says abcdef012345", site.url("tiny-ABCDEF012345.npz"), cache)


def test_the_whole_hash_may_stand_in_the_name(site, cache):
    name = f"tiny-{hashlib.sha256(CONTENT).hexdigest()}.npz"
    wrong = name[:-5] + ("0" if name[-5] != "0" else "1") + ".npz"
    site.files |= {f"/{name}": CONTENT, f"/{wrong}": CONTENT}
    assert fetch(site.url(name)).read_bytes() == CONTENT
    fails("its name says", site.url(wrong), cache)


# ---------------------------------------------------------------- redirects
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site, cache, code):
    site.files["/there/other"] = CONTENT
    site.plan = [moved(site.url("there"), code), moved("there/other", code)]        # whole, and relative
    good(cache, site)
    assert [path for path, _ in site.requests] == [f"/{NAME}", "/there", "/there/other"]


def test_the_range_is_asked_for_behind_a_redirect_too(site, cache):
    began(site)
    site.plan = [moved(f"/{NAME}")]
    good(cache, site)
    assert site.ranges() == ["bytes=100000-"] * 2


def test_a_loop_of_redirects_ends(site, cache):
    site.plan = [moved(f"/{NAME}")] * 50
    fails(f"redirects more than {fetching.REDIRECTS} times", site.url(), cache)
    assert len(site.requests) == fetching.REDIRECTS + 1


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[", "http://h:port/"])
def test_redirects_lead_nowhere_but_to_http(site, cache, where):
    site.plan = [moved(where)]
    fails("redirects to what is no http or https address, and is not followed there", site.url(), cache)
    assert left(cache) == set()


def test_a_redirect_without_a_place_is_a_refusal(site, cache):
    site.plan = [status(302)]
    fails("answers 302 Found", site.url(), cache)


def test_a_redirect_to_where_nobody_is(site, cache):
    site.plan = [moved(f"http://127.0.0.1:{free_port()}/x")]
    fails(r"cannot reach 127\.0\.0\.1 \(Connection refused\)", site.url(), cache)


def test_https_never_becomes_http(site, cache, monkeypatch):
    class Opener:
        def open(self, request, timeout):
            from email.message import Message
            from urllib.error import HTTPError
            headers = Message()
            headers["Location"] = site.url()
            raise HTTPError(request.full_url, 302, "Found", headers, None)

    monkeypatch.setattr(fetching, "_opener", Opener)
    fails("redirects to plain http, and is not followed there", f"https://example.org/{NAME}", cache)
    assert not site.requests


def test_nothing_but_http_can_be_opened():
    from urllib.error import URLError
    for url in (Path(__file__).as_uri(), "ftp://127.0.0.1/x", "data:,x"):
        with contextlib.suppress(URLError):
            assert fetching._opener().open(url) is None


# ---------------------------------------------------------------- no network
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_without_a_network_the_line_says_what_to_do(cache):
    url = f"http://127.0.0.1:{free_port()}/models/{NAME}"
    message = fails("", url, cache)
    assert message == (f"cannot reach 127.0.0.1 (Connection refused): fetch {url} yourself, and save it as {cache / NAME}")
    (cache / NAME).write_bytes(CONTENT)                     # and does it
    assert fetch(url) == cache / NAME


def test_a_name_that_nobody_knows(cache, monkeypatch):
    def nobody(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    fails(r"^cannot reach download\.pytorch\.org \(Name or service not known\): fetch https://download", published.PUBLISHED[
        "imagenet"]["resnet18"], cache)


def test_a_server_that_speaks_no_http(site, cache):
    site.plan = [lambda h, site: h.wfile.write(b"220 mail.example.org \x1b[31mESMTP\r\n")]
    message = fails(r"^cannot reach 127\.0\.0\.1 \(220 mail", site.url(), cache)
    assert message.isprintable()


@pytest.mark.parametrize("url", ["", "resnet18", "/a/path.pth", "file:///etc/passwd", "ftp://host/x.pth", "http:///x.pth", "http://[::1/x",
                                 "http://host:port/x.pth", "javascript:x", "http://host:99999/x.pth", "https:host/x.pth"])
def test_what_is_no_address(cache, url):
    fails("is no address that files are fetched from: http://HOST/FILE or https://HOST/FILE", url, cache)


def test_a_host_that_can_have_no_address(cache):
    fails(r"^cannot reach a\.\.b \(", f"http://a..b/{NAME}", cache)


# ---------------------------------------------------------------- names, passwords
@pytest.mark.parametrize("path", [
    "", "a/", "..", "a/..", ".", ".hidden.npz", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f" + NAME, "a%5cb.npz", "a%2fb.npz",
    "a%00.npz", "a%0a.npz", "C%3ax.npz", "x.part", "a b.npz", "x.", "~x", "-x", "x" * 201 + ".npz", "%ff.npz", "x*.npz"])
def test_names_that_would_escape_the_cache_are_refused(site, cache, tmp_path, path):
    fails("which is no name for a file here", site.url(path), cache)
    assert not site.requests
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path, name", [
    ("a/b/x.pth", "x.pth"), ("x.pth?a=/../y&b=z.npz#c/d", "x.pth"), ("a%2B1@v2.pth", "a+1@v2.pth"),
    ("gr%C3%B6%C3%9Fe.npz", "größe.npz"), ("größe.npz", "größe.npz"), ("resnet20-12fca82f.th", "resnet20-12fca82f.th")])
def test_names_are_the_last_part_of_the_path(path, name):
    assert file_name(f"https://host/{path}") == name


def test_an_address_may_hold_any_letter(site, cache):
    site.files["/gr%C3%B6%C3%9Fe.npz"] = CONTENT
    assert fetch(site.url("größe.npz")).read_bytes() == CONTENT


def test_a_password_is_sent_and_not_shown(site, cache):
    from base64 import b64decode
    secret = f"http://user:se%20cr%2Fet@{site.host}/{NAME}"
    site.plan = [status(404)]
    message = fails("answers 404", secret, cache)
    assert f"fetch {site.url()} yourself" in message
    assert not re.search("user|se%20|se cr|et@", message)
    assert b64decode(site.requests[0][1]["Authorization"].removeprefix("Basic ")) == b"user:se cr/et"
    assert site.requests[0][1]["Host"] == site.host
    fetch(secret)
    assert left(cache) == {NAME}


def test_a_password_stays_with_its_own_site(site, cache):
    other = Site()
    site.plan = [moved(site.url("there")), moved(f"http://them:theirs@{other.host}/{NAME}")]
    fetch(f"http://user:secret@{site.host}/{NAME}")
    assert [("Authorization" in headers) for _, headers in [*site.requests, *other.requests]] == [True, True, False]
    other.close()


@pytest.mark.parametrize("url", [f"ftp://user:secret@host/{NAME}", f"https:user:secret@host/{NAME}", f"http://user:se/secret@host/{NAME}",
                                 f"http://user:secret@host:port/{NAME}", "http://user:secret@host/..", f"http://user:secret@127.0.0.1:1/{NAME}",
                                 f"http://user:secret@a..b/{NAME}"])
def test_no_error_shows_a_password(cache, url):
    message = fails("", url, cache)
    assert "secret" not in message
    assert "user" not in message


# ---------------------------------------------------------------- where the cache is
@pytest.mark.parametrize("platform, environment, expected", [
    ("linux", {}, "~/.cache/minicnn"), ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/minicnn"),
    ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache/minicnn"),          # which its specification says to pass over
    ("linux", {"XDG_CACHE_HOME": "/x", "MINICNN_CACHE": "/y"}, "/y"),
    ("linux", {"MINICNN_CACHE": "~/y"}, "~/y"), ("freebsd14", {}, "~/.cache/minicnn"),
    ("darwin", {"XDG_CACHE_HOME": "/x"}, "~/Library/Caches/minicnn"), ("darwin", {"MINICNN_CACHE": "/y"}, "/y"),
    ("win32", {"LOCALAPPDATA": "/local"}, "/local/minicnn"), ("win32", {}, "~/AppData/Local/minicnn")])
def test_the_cache_is_the_users(monkeypatch, tmp_path, platform, environment, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(fetching, "sys", types.SimpleNamespace(platform=platform))
    for name in ("MINICNN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected).expanduser()


def test_without_a_home_one_line_asks_for_a_cache(monkeypatch, site):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "expanduser", homeless)
    for name in ("MINICNN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FetchError, match="let MINICNN_CACHE name one"):
        fetch(site.url())


def test_a_cache_that_cannot_be_written(site, cache):
    cache.write_text("a file, where the folder should be")
    with pytest.raises(FetchError, match=r"^cannot use .*cache \(File exists\) while fetching http.*MINICNN_CACHE"):
        fetch(site.url())
    assert not site.requests


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may read and write everywhere")
def test_a_cache_that_may_not_be_looked_into(site, cache):
    cache.mkdir(mode=0)
    with pytest.raises(FetchError, match=r"^cannot use .*\(Permission denied\)"):
        fetch(site.url())
    cache.chmod(0o700)


def test_a_folder_in_the_files_place(site, cache):
    (cache / NAME / "x").mkdir(parents=True)
    with pytest.raises(FetchError, match=r"^cannot use .*Is a directory|^cannot use .*Directory not empty"):
        fetch(site.url())


def test_a_full_disk_is_told_and_the_next_call_goes_on(site, cache):
    """No file can be larger than 100,000 bytes: what a full disk answers, but for the number of the error."""
    resource = pytest.importorskip("resource", reason="the system has no limits")
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = fails(r"^cannot use .*\.part \(File too large\) while fetching http", site.url(), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "or let MINICNN_CACHE name another folder" in message
    assert len(site.requests) == 1                          # nothing that another try would mend
    good(cache, site)
    assert int(site.ranges()[1][6:-1]) <= 100_000


# ---------------------------------------------------------------- two at once
PROGRAM = """
import sys
from minicnn.weights import fetch
fetch.PAUSE = 0
print("ready", flush=True)
sys.stdin.readline()
print(fetch.fetch(sys.argv[1]), flush=True)
"""


def another(url):
    """A process that fetches it once it gets a line."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=Path(mc.__file__).parents[1])
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def test_two_processes_at_once_fetch_it_once(site, cache):
    def slow(h, site):
        go(second)                                          # comes while the first is in the middle
        time.sleep(0.3)
        whole(h, site)
    site.plan = [slow]
    first, second = another(site.url()), another(site.url())
    go(first)
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert (out, err) == (f"{cache / NAME}\n", "")
    assert (cache / NAME).read_bytes() == CONTENT
    assert left(cache) == {NAME}
    assert len(site.requests) == 1


def test_where_one_process_fails_the_other_goes_on(site, cache):
    """Killed in the middle: its lock is gone with it, its bytes are not."""
    site.plan = [silent(100_000)]
    first = another(site.url())
    go(first)
    wait_for(lambda: (cache / f"{NAME}.part").exists() and (cache / f"{NAME}.part").stat().st_size > 0)
    found = []
    waiting = threading.Thread(target=lambda: found.append(fetch(site.url())), daemon=True)
    waiting.start()
    first.kill()
    first.communicate()
    waiting.join(60)
    assert found == [cache / NAME]
    assert (cache / NAME).read_bytes() == CONTENT
    assert left(cache) == {NAME}
    assert re.fullmatch(r"bytes=\d+-", site.ranges()[1])


def test_many_threads_at_once(site, cache):
    site.plan = [cut(1000), cut(2000)]
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(site.url()).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8
    assert len(site.requests) == 3
    assert left(cache) == {NAME}


def test_a_lock_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    lock, locked, tries = tmp_path / "lock", fetching._locked, []

    def late(file):                                         # opened before the one who had it removed it, locked after
        if not tries:
            lock.unlink()
        tries.append(file)
        return locked(file)
    monkeypatch.setattr(fetching, "_locked", late)
    with fetching._alone(lock):
        assert lock.exists()
        with open(lock, "ab") as another:
            assert not locked(another)
    assert len(tries) == 2
    assert not lock.exists()


def test_a_drive_without_locks_still_takes_files(site, cache, monkeypatch):
    import errno
    import fcntl

    def none(*words):
        raise OSError(errno.EOPNOTSUPP, "no locks")
    monkeypatch.setattr(fcntl, "flock", none)
    good(cache, site)


# ---------------------------------------------------------------- models
@pytest.fixture
def weights_of(site, tmp_path):
    """Publish a model's weights, named as publishers do; returns the name."""
    def publish(model, suffix=".pth", stem="weights"):
        path = tmp_path / f"published{suffix}"
        mc.save(path, model.state_dict())
        content = path.read_bytes()
        name = named(content, stem, suffix)
        site.files[f"/{name}"] = content
        return name
    return publish


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_a_model_takes_weights_by_address_by_path_and_by_name(site, cache, weights_of, tmp_path, monkeypatch, suffix):
    original = models.resnet20(seed=5)
    name = weights_of(original, suffix)
    same(models.resnet20(weights=site.url(name)), original)
    same(models.build("resnet20", weights=site.url(name)), original)
    same(models.resnet20(weights=str(cache / name)), original)
    same(models.resnet20(10, (3, 32, 32), weights=cache / name, seed=7), original)
    assert len(site.requests) == 1
    monkeypatch.setitem(published.PUBLISHED, "imagenet", {"resnet20": site.url(name)})
    same(models.resnet20(weights="imagenet"), original)
    same(models.build("resnet20", weights="imagenet"), original)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11_bn"])
def test_published_weights_of_a_model_for_imagenet(site, weights_of, monkeypatch, name):
    """Files as torchvision's are named and laid out; VGG's with a narrow classifier, for 500 MB less."""
    options = {"hidden": 8, "pool": 1} if name.startswith("vgg") else {}
    original = models.build(name, 7, (3, 32, 32), seed=3, **options)
    monkeypatch.setitem(published.PUBLISHED, "imagenet", {name: site.url(weights_of(original, stem=name))})
    model = models.build(name, 7, (3, 32, 32), weights="imagenet", **options)
    same(model, original)
    assert model.in_shape == (3, 32, 32)
    double = getattr(models, name)(7, (3, 40, 40), weights="imagenet", dtype=np.float64, **options)
    assert (double.in_shape, double.dtype) == ((3, 40, 40), np.float64)


def test_googlenets_published_weights_have_heads_that_are_passed_over_and_a_smaller_kernel(site, weights_of, monkeypatch):
    """A file as torchvision's: with auxiliary heads, which come before the last layer, and 3x3 in the third branch."""
    original = models.googlenet(7, (3, 32, 32), seed=3, branch5x5=3)

    state, shapes = original.state_dict(), {"conv.conv.weight": (128, 512, 1, 1), "conv.bn.running_var": (128,), "fc2.bias": (7,)}
    heads = {f"aux{i}.{name}": np.ones(shape, np.float32) for i in (1, 2) for name, shape in shapes.items()}
    last = {name: state.pop(name) for name in ("fc.weight", "fc.bias")}
    url = site.url(weights_of(types.SimpleNamespace(state_dict=lambda: {**state, **heads, **last}), stem="googlenet"))
    monkeypatch.setitem(published.PUBLISHED, "imagenet", {"googlenet": url})
    same(models.googlenet(7, (3, 32, 32), weights="imagenet"), original)
    with pytest.raises(ValueError, match=r"9 mismatched: inception3a.branch3.1.conv.weight: \(32, 16, 3, 3\) given"):
        models.googlenet(7, (3, 32, 32), weights=url, branch5x5=5)
    trained = train.load_published("googlenet", "imagenet", in_shape=(3, 32, 32))
    same(trained.model, original)
    assert trained.normalize == Normalize((0.5,) * 3, (0.5,) * 3) and trained.classes == [str(i) for i in range(7)]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4), np.uint8)
    mean, std = (np.array(values)[:, None, None] for values in published.IMAGENET_PIXELS)
    transform_input = Normalize(*published.IMAGENET_PIXELS)(pixels, np.float64) * (std / 0.5) + (mean - 0.5) / 0.5
    np.testing.assert_allclose(trained.normalize(pixels, np.float64), transform_input, atol=1e-12)
    assert published.pixels_of("resnet18") == published.IMAGENET_PIXELS


def test_a_file_says_which_shortcuts_a_resnet_has(weights_of, cache, site):
    original = models.resnet20(4, shortcut="B", seed=2)
    url = site.url(weights_of(original))
    same(models.resnet20(4, weights=url), original)
    same(train.load_published("resnet20", url, normalize=Normalize((0.5,) * 3, (0.5,) * 3)).model, original)
    with pytest.raises(ValueError, match="12 unexpected: layer2.0.shortcut.0.weight"):
        models.resnet20(4, weights=url, shortcut="A")


def test_a_file_that_somebody_did_publish(site, cache):
    """Of its name, its layout and its hash, though it comes from here."""
    path = Path(os.environ.get("MINICNN_DATA", ""), "resnet20-12fca82f.th")
    if not path.is_file():
        pytest.skip("MINICNN_DATA has no resnet20-12fca82f.th")
    site.files["/resnet20-12fca82f.th"] = path.read_bytes()
    site.plan = [cut(300_000)]
    model = models.resnet20(weights=site.url(path.name))
    assert left(cache) == {path.name}
    assert model.load_state_dict(mc.load(path)) == ([], [], [])
    same(model, models.resnet20(weights=path))


def test_weights_that_do_not_fit_raise_the_ordinary_error(site, weights_of, cache):
    url = site.url(weights_of(models.resnet20()))
    for build in (lambda: models.resnet20(100, weights=url), lambda: models.resnet20(shortcut="B", weights=url),
                  lambda: models.resnet32(weights=url), lambda: models.resnet18(in_shape=(3, 32, 32), weights=url)):
        with pytest.raises(ValueError, match="the state does not fit the model"):
            build()
    with pytest.raises(ValueError, match=r"2 mismatched: linear.weight: \(10, 64\) given, \(100, 64\) here"):
        models.resnet20(100, weights=url)
    assert len(site.requests) == 1                          # the file is not lost over it
    assert len(left(cache)) == 1


def test_a_file_that_is_no_checkpoint(site, cache):
    with pytest.raises(mc.weights.WeightsError, match=f"{NAME} is damaged or not an .npz file"):
        models.resnet20(weights=site.url())


@pytest.mark.parametrize("name", [name for name in models.names() if re.fullmatch(r"resnet(20|32|44|56|110)", name)])
def test_a_model_without_published_weights_says_which_have(name):
    with pytest.raises(ValueError, match=f"{name} has no 'imagenet' weights; those that have: vgg11, .*resnet152"):
        models.build(name, weights="imagenet")


def test_all_models_for_imagenet_have_published_weights_that_have_hashes():
    table = published.PUBLISHED["imagenet"]
    assert set(table) == {name for name in models.names() if models.default_in_shape(name) == (3, 224, 224)}
    for name, url in table.items():
        assert re.fullmatch(rf"https://download\.pytorch\.org/models/{name}-[0-9a-f]{{8}}\.pth", url)
    assert len(set(table.values())) == len(table) == 14


@pytest.mark.parametrize("weights, error, words", [
    ("imagnet", ValueError, "weights='imagnet' is none of 'imagenet', a file that ends in .npz, .safetensors, .pth"),
    ("", ValueError, "weights='' is none of"), ("model.zip", ValueError, "weights='model.zip' is none of"),
    (Path("imagenet"), ValueError, "weights='imagenet' is none of"), ("http://host/a.zip", ValueError, "a.zip: the suffix names"),
    ("https://host/model-0123abcd", ValueError, "model-0123abcd: the suffix"), ("ftp://host/x.pth", FetchError, "is no address"),
    ("nowhere/x.pth", FileNotFoundError, "nowhere/x.pth does not exist"), (True, TypeError, "bool")])
def test_what_are_no_weights(weights, error, words):
    with pytest.raises(error) as caught:
        models.resnet20(weights=weights)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_without_a_network_say_what_to_fetch(cache, monkeypatch):
    def nobody(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(FetchError) as caught:
        models.vgg16(weights="imagenet")
    assert str(caught.value) == (
        "cannot reach download.pytorch.org (Temporary failure in name resolution): fetch https://download.pytorch.org/models/"
        f"vgg16-397923af.pth yourself, and save it as {cache / 'vgg16-397923af.pth'}")


def test_every_model_function_says_that_it_takes_weights():
    import inspect
    for name in models.names():
        signature = inspect.signature(getattr(models, name))
        *given, rest = signature.parameters
        assert given[:3] == ["num_classes", "in_shape", "weights"]
        assert rest == ("dropout" if name in ("nin", "googlenet") else "options")
        assert signature.parameters["weights"].default is None
        assert getattr(models, name).__doc__
    assert models.resnet20(weights=None).out_shape == (10,)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieghts'"):
        models.resnet20(wieghts="imagenet")
