"""Files from the web, fetched once: they lie in a folder of the user's, and are found there without a network.

    fetch("https://download.pytorch.org/models/resnet18-f37072fd.pth")      -> .../minicnn/resnet18-f37072fd.pth

A file has its name only once it is whole: until then it is NAME.part, which the next call goes on with. What goes wrong ends in one
FetchError, whose line says what to fetch, from where, and where to put it.

Publishers write the beginning of a file's SHA-256 into its name (-f37072fd above), and what does not have it is not kept, nor taken
from the folder later: it is compared at every use, which takes half a second a GB. A file whose name has none lies in a folder of
its own, named after its address: two sites' model.pth are two files.
"""
from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import json
import os
import re
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

TIMEOUT = 30.0                  # seconds of silence
TRIES = 5                       # of a connection that breaks, each from where the last one ended
PAUSE = 1.0                     # seconds before the second; twice as many before each that follows
REDIRECTS = 5
CHUNK = 1 << 18                 # bytes


class FetchError(OSError):
    """A file that could not be fetched. One line: which, what is wrong, the cure."""


class _Again(Exception):
    """A try that failed, where another may not."""


def cache_folder() -> Path:
    """MINICNN_CACHE, or minicnn in the folder that the system keeps for what can be fetched again."""
    chosen = os.environ.get("MINICNN_CACHE")
    name, usual = {"win32": ("LOCALAPPDATA", "~/AppData/Local"), "darwin": ("", "~/Library/Caches")}.get(
        sys.platform, ("XDG_CACHE_HOME", "~/.cache"))
    given = os.environ.get(name, "")
    try:
        return Path(chosen or Path(given if os.path.isabs(given) else usual, "minicnn")).expanduser()
    except RuntimeError:
        raise FetchError("nobody's home folder can be found here: let MINICNN_CACHE name one for fetched files") from None


def fetch(url: str, cache: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """The file of an http or https address, in the folder `cache` (by default `cache_folder()`); fetched where it is not there yet.

    Goes on with what an earlier call has left, follows redirects, compares the SHA-256 that the name carries. Several processes may
    ask for one file: the first fetches it, the others wait. progress: a bar on a terminal, where tqdm is installed.
    Raises FetchError.
    """
    file = _File(url, cache_folder() if cache is None else Path(cache))
    file.get(progress)
    return file.path


def file_name(url: str) -> str:
    """What a file of this address is called: the last part of its path, which must be a plain name. FetchError otherwise."""
    name = unquote(_parts(url).path.rpartition("/")[2])
    if not re.fullmatch(r"\w([\w.+~=@-]{0,198}\w)?", name) or name.endswith(".part"):
        raise FetchError(f"{_shown(_parts(url))} ends in {name!r}, which is no name for a file here: letters, digits and -_.+~=@ "
                         "make one; fetch it yourself under another name, and give its path")
    return name


# ---------------------------------------------------------------- addresses
def _parts(url: str) -> SplitResult:
    """The parts of an http or https address, with every character quoted that needs it."""
    try:
        parts = urlsplit(quote(url, safe=string.punctuation))
        fit = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 0) >= 0      # a port may raise
    except ValueError:
        fit = None
    if not fit:                                     # there may be a password in it, and nobody knows where
        raise FetchError(f"{url.rpartition('@')[2]!r} is no address that files are fetched from: http://HOST/FILE or https://HOST/FILE")
    return parts


def _bare(parts: SplitResult) -> SplitResult:
    """Without name and password, which nobody is to see, and the fragment, which servers do not."""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")


def _shown(parts: SplitResult) -> str:
    return _bare(parts).geturl()


def _site(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, _bare(parts).netloc


def _login(parts: SplitResult) -> dict[str, str]:
    """The header that says the name and the password of an address."""
    import base64

    if parts.username is None:
        return {}
    words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}


# ---------------------------------------------------------------- a file
class _File:
    """A file on its way from `parts` to `path`."""

    def __init__(self, url: str, folder: Path) -> None:
        self.parts, name = _parts(url), file_name(url)
        self.shown = _shown(self.parts)
        match = re.search(r"-([0-9a-fA-F]{8,64})\.\w+$", name)
        self.promised = match[1].lower() if match else ""   # the first digits of its SHA-256
        self.path = (folder if match else folder / hashlib.sha256(self.shown.encode()).hexdigest()[:16]) / name
        self.part = self.path.with_name(f"{name}.part")
        self.notes = self.path.with_name(f".{name}.json")   # which version of the file the part is of
        self.yourself = f"fetch {self.shown} yourself, and save it as {self.path}"
        self.reached = False                                # whether the server has ever answered

    def get(self, progress: bool) -> None:
        """Fetch it, unless it is there, or another process does: then wait for that one, which may fail."""
        try:
            if self.path.is_file():
                self.compare()
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.with_name(f".{self.path.name}.lock")):
                if self.path.is_file():                     # another process has fetched and compared it
                    return
                self.try_often(progress)
        except FetchError:
            raise
        except OSError as error:                            # what the network raises is caught where it is used
            raise FetchError(f"cannot use {error.filename or self.part} ({error.strerror or _words(error)}) while fetching "
                             f"{self.shown}: mend that, or let MINICNN_CACHE name another folder") from None

    def compare(self) -> None:
        """FetchError where what is in the file's place has another hash than its name says."""
        if self.promised and not (digest := _digest(self.path)).startswith(self.promised):
            raise FetchError(f"{self.path} has the SHA-256 {digest[:16]}..., and its name says {self.promised}: it is damaged or "
                             f"another file; delete it, and it is fetched from {self.shown} again")

    def try_often(self, progress: bool) -> None:
        """Try, as long as another try may do better."""
        for n in range(TRIES):
            try:
                resumed = self.receive(progress)
                return self.finish(resumed)
            except _Again as error:
                why = error
            if n < TRIES - 1:
                time.sleep(PAUSE * 2 ** n)
        raise FetchError(f"{self.shown} did not come whole in {TRIES} tries (the last: {why}): call again, to go on from the "
                         f"{self.kept()[0]:,} bytes that have come, or {self.yourself}") from None

    def kept(self) -> tuple[int, dict[str, Any]]:
        """How many bytes an earlier try has left, and the version they are of; 0 where nothing could tell that from another one."""
        try:
            size, version = self.part.stat().st_size, json.loads(self.notes.read_text("utf-8"))
        except (OSError, ValueError):
            return 0, {}
        if not isinstance(version, dict) or not (self.promised or version.get("etag") or version.get("modified")):
            return 0, {}
        return (size, version) if size <= (version.get("length") or size) else (0, {})

    def discard(self) -> None:
        """Start over."""
        for file in (self.part, self.notes):
            file.unlink(missing_ok=True)

    def receive(self, progress: bool) -> bool:
        """Bring the part to its full length; whether it began with what was there before. _Again where it does not get there."""
        start, version = self.kept()
        if start and start == version.get("length"):
            return True                                     # and only its name is missing
        with self.answer(_range(start, version) if start else {}) as response:
            found, begins = _version(response), _begins(response)
            if begins not in (0, start) or (begins and not _same(version, found)):
                self.discard()
                raise _Again("the server's file has changed" if begins == start else "the answer is another part than asked for")
            end = None if response.length is None else begins + response.length     # of this answer; not every server says
            whole = found["length"] or (version.get("length") if begins else None) or end
            with open(self.part, "r+b" if begins else "wb") as out, _bar(self.path.name, begins, whole, progress) as bar:
                if not begins:                              # all of it, whatever was asked for
                    self.notes.write_text(json.dumps(found), "utf-8")
                came = out.seek(begins)
                while chunk := _read(response, CHUNK if end is None else min(CHUNK, end - came)):
                    came += out.write(chunk)
                    bar(len(chunk))
        if whole and came < whole:
            raise _Again(f"cut short after {came:,} of {whole:,} bytes")
        return begins > 0

    def finish(self, resumed: bool) -> None:
        """Give the part its name, if it is what the name says."""
        digest = _digest(self.part)
        with open(self.part, "rb+") as file:
            os.fsync(file.fileno())                         # on the disk before it has its name
        if not digest.startswith(self.promised):
            self.discard()
            if resumed:
                raise _Again("its parts do not make up a whole")
            raise FetchError(f"{self.shown} has the SHA-256 {digest[:16]}..., and its name says {self.promised}: it is damaged or "
                             f"another file, and was not kept; if that is no hash but a date, fetch it yourself, save it under "
                             "another name, and give its path")
        os.replace(self.part, self.path)
        self.notes.unlink(missing_ok=True)

    def answer(self, headers: Mapping[str, str]) -> Any:
        """The answer to a request, 200 or 206, after the redirects on the way."""
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.request import Request

        parts = self.parts
        for _ in range(REDIRECTS + 1):
            host = parts.hostname
            login = _login(self.parts) if _site(parts) == _site(self.parts) else {}        # a password is for its own site
            request = Request(_shown(parts), headers={"User-Agent": "minicnn", **headers, **login})
            try:
                response = _opener().open(request, timeout=TIMEOUT)
            except HTTPError as error:
                error.close()
                if error.code in (301, 302, 303, 307, 308) and error.headers.get("Location"):
                    parts = self.redirected(parts, error.headers["Location"])
                    continue
                raise self.refused(error.code, host, "Range" in headers) from None
            except (OSError, HTTPException, ValueError) as error:           # ValueError: a host that can have no address
                if self.reached or isinstance(error, (ConnectionError, TimeoutError)):      # connected, and then lost
                    raise _Again(f"{host}: {_words(error)}") from None
                raise FetchError(f"cannot reach {host} ({_words(error)}): {self.yourself}") from None
            if response.status in (200, 206):
                self.reached = True
                return response
            response.close()
            raise self.refused(response.status, host, False)
        raise FetchError(f"{self.shown} redirects more than {REDIRECTS} times: {self.yourself}")

    def redirected(self, parts: SplitResult, where: str) -> SplitResult:
        """Where an answer sends us, if we go there: never to another kind of address, nor from https to http."""
        try:
            to = _parts(urljoin(_shown(parts), where))
        except (FetchError, ValueError):
            to = None
        if to is None or (parts.scheme, to.scheme) == ("https", "http"):
            where = "plain http" if to else "what is no http or https address"
            raise FetchError(f"{self.shown} redirects to {where}, and is not followed there: check the address, or {self.yourself}")
        return to

    def refused(self, code: int, host: str | None, partly: bool) -> Exception:
        """What an answer without the file means."""
        from http.client import responses

        words = f"{host} answers {code} {responses.get(code, '')}".rstrip()
        if code == 416 and partly:                          # there is no such part: the file is shorter than it was
            self.discard()
            return _Again(words)
        if code >= 500 or code in (408, 425, 429):
            return _Again(words)
        return FetchError(f"{words}: check the address, or {self.yourself}")


def _digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- answers
def _opener() -> Any:
    """Opens http and https, through the proxies of the environment, and nothing else. A redirect is an error to it."""
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPDefaultErrorHandler,
                    request.HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


def _version(response: Any) -> dict[str, Any]:
    """What tells a file from the one that comes after it."""
    said = {name: " ".join((response.headers.get(header) or "").split()) for name, header in
            (("etag", "ETag"), ("modified", "Last-Modified"))}
    if response.status == 206:
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range") or "")
        return {**said, "length": int(total[1]) if total else None}
    return {**said, "length": response.length}


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether nothing that is said of both differs."""
    return all(a.get(name) == b[name] for name in b if a.get(name) and b[name])


def _begins(response: Any) -> int:
    """Where in the file the answer begins; -1 for a part that does not say."""
    if response.status == 200:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found[1]) if found else -1


def _range(start: int, version: Mapping[str, Any]) -> dict[str, str]:
    """The headers that ask for the rest: of this version, or else for all of the new one. Weak ETags cannot tell."""
    etag = version.get("etag") or ""
    sure = etag if etag and not etag.startswith("W/") else version.get("modified")
    return {"Range": f"bytes={start}-", **({"If-Range": sure} if sure else {})}


def _read(response: Any, count: int) -> bytes:
    """What has arrived, at most `count` bytes; none at the end."""
    from http.client import HTTPException

    try:
        found: bytes = response.read1(count) if count else b""      # read1 itself may wait for more than there will be
    except (OSError, HTTPException) as error:
        raise _Again(f"the connection broke: {_words(error)}") from None
    return found


def _words(error: Any) -> str:
    """An error's own words, on one line, whoever chose them."""
    error = getattr(error, "reason", None) or error         # inside a URLError
    words = getattr(error, "strerror", None) or f"{error}"
    return "".join(c if c.isprintable() else "?" for c in " ".join(words.split())) or type(error).__name__


@contextmanager
def _bar(name: str, start: int, total: int | None, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A function to call with every number of bytes that came."""
    if not (shown and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None):
        yield lambda count: None
        return
    with importlib.import_module("tqdm").tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1024,
                                              leave=False, dynamic_ncols=True) as bar:
        yield bar.update


# ---------------------------------------------------------------- one at a time
@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other has the lock, and hold it. However a process ends, the system takes its lock from it."""
    while True:
        with open(lock, "ab") as file:
            if _locked(file) and _is(file, lock):
                try:
                    yield
                finally:
                    with suppress(OSError):                 # Windows removes no file that is open
                        lock.unlink()
                return
        time.sleep(0.1)


def _locked(file: BinaryIO) -> bool:
    """Whether the file's lock is ours now. Where files have no locks, on some network drives, it counts as ours."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
    return True


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether this open file is the one of that name: who had the lock before has removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
