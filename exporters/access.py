"""Who may read the endpoint: passwords and tokens, TLS, and certificates of clients.

Secrets are read from a file, never from a setting, so that they stand neither in a process list nor in the store. What
is kept of them are digests; a presented one is compared with all of them, in a time that tells nothing. No error shows
a line of the file.

Certificates are renewed and tokens changed while a run goes on for weeks: `Access.renewed` looks whether a file is
another one by now. What cannot be used (a renewal that is half done, a file that is gone) leaves what there was. Change
a file by renaming a new one over it: of one written in place, a half may pass for the whole until the next look.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import ssl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from lm_telemetry.errors import SettingsError

_log = logging.getLogger("lm_telemetry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What `Authorization` may say."""

    digests: tuple[bytes, ...]
    challenge: str
    """value of `WWW-Authenticate`"""

    @classmethod
    def read(cls, path: str) -> Self:
        """From a file of lines `bearer TOKEN` or `basic USER:PASSWORD`; empty ones and those with # are skipped.

        Raises:
            SettingsError: it cannot be read, holds none, or a line is neither.
        """
        try:
            lines = Path(path).read_bytes().splitlines()  # bytes: an error of decoding would carry them
        except OSError as error:
            raise _refused("prometheus_auth", path, f"cannot be read: {_reason(error)}") from None
        digests, schemes = [], set()
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            name, _, secret = line.strip().partition(b" ")
            scheme, secret = name.lower().decode("latin-1"), secret.strip()
            fits = {"bearer": bool(secret) and b" " not in secret, "basic": secret.find(b":") > 0}
            if not fits.get(scheme, False):
                raise _refused(
                    "prometheus_auth", path, f"line {number}: expected `bearer TOKEN` or `basic USER:PASSWORD`"
                )
            digests.append(_digest(scheme, secret))
            schemes.add(scheme)
        if not digests:
            raise _refused("prometheus_auth", path, "expected a line `bearer TOKEN` or `basic USER:PASSWORD`")
        challenges = {"basic": 'Basic realm="lm-telemetry", charset="UTF-8"', "bearer": 'Bearer realm="lm-telemetry"'}
        return cls(digests=tuple(digests), challenge=", ".join(challenges[scheme] for scheme in sorted(schemes)))

    def admit(self, authorization: str) -> bool:
        """Whether the header's value, as it came, is one of them."""
        scheme, _, presented = authorization.partition(" ")
        scheme, secret = scheme.lower(), presented.strip().encode("latin-1")
        if scheme == "basic":
            try:
                secret = base64.b64decode(secret, validate=True)
            except binascii.Error:
                return False
        digest, found = _digest(scheme, secret), False
        for known in self.digests:  # all of them, found or not
            found |= hmac.compare_digest(digest, known)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How the endpoint is guarded; by default not at all, which is meant for 127.0.0.1."""

    credentials: Credentials | None = None
    tls: ssl.SSLContext | None = None
    files: tuple[tuple[str, str], ...] = ()
    """what `load` was given: (argument, path)"""
    stamps: tuple[tuple[int, ...], ...] = ()
    """which files those were when they were read"""

    @classmethod
    def load(
        cls,
        *,
        certificate: str | None = None,
        key: str | None = None,
        client_ca: str | None = None,
        auth: str | None = None,
    ) -> Self:
        """From files, see the settings `prometheus_certificate`, `_key`, `_client_ca` and `_auth`.

        Raises:
            SettingsError: one cannot be used; `.setting` names it.
        """
        for name, value in (("prometheus_key", key), ("prometheus_client_ca", client_ca)):
            if value is not None and certificate is None:
                raise _refused(name, value, "needs `prometheus_certificate` beside it")
        given = (("certificate", certificate), ("key", key), ("client_ca", client_ca), ("auth", auth))
        files = tuple((name, path) for name, path in given if path is not None)
        stamps = _stamps(files)  # before they are read: a change meanwhile is then seen as one
        tls = None
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            for name, path in (("prometheus_certificate", certificate), ("prometheus_key", key)):
                _check_readable(name, path)
            try:
                # Without a password at all, openssl would ask the terminal for that of an encrypted key.
                tls.load_cert_chain(certificate, key, password="")
            except (OSError, ValueError) as error:
                why = f"is no certificate in PEM with its key, or the key is encrypted or another's ({_reason(error)})"
                raise _refused("prometheus_certificate", certificate, why) from None
            if client_ca is not None:
                _check_readable("prometheus_client_ca", client_ca)
                try:
                    tls.load_verify_locations(client_ca)
                except OSError as error:
                    why = f"holds no certificates in PEM ({_reason(error)})"
                    raise _refused("prometheus_client_ca", client_ca, why) from None
                tls.verify_mode = ssl.CERT_REQUIRED
        credentials = None if auth is None else Credentials.read(auth)
        return cls(credentials=credentials, tls=tls, files=files, stamps=stamps)

    def renewed(self) -> Self:
        """What the files say by now; where they have not changed or cannot be used, what they said before.

        Of files that cannot be used the log is told once a change. Costs a `stat` of each.
        """
        stamps = _stamps(self.files)
        if stamps == self.stamps:
            return self
        try:
            return type(self).load(**dict(self.files))
        except SettingsError as error:
            _log.warning("lm-telemetry: the endpoint stays with what it had read before: %s", error)
            return replace(self, stamps=stamps)

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return "http" if self.tls is None else "https"

    @property
    def asks_who(self) -> bool:
        """Whether a client has to say who it is."""
        return self.credentials is not None or (self.tls is not None and self.tls.verify_mode is ssl.CERT_REQUIRED)


def _digest(scheme: str, secret: bytes) -> bytes:
    return hashlib.sha256(scheme.encode() + b" " + secret).digest()


def _stamps(files: tuple[tuple[str, str], ...]) -> tuple[tuple[int, ...], ...]:
    """Of each file what changes when it is written or another takes its name; nothing of one that is gone."""
    found: list[tuple[int, ...]] = []
    for _, path in files:
        try:
            status = Path(path).stat()
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(())
    return tuple(found)


def _check_readable(setting: str, path: str | None) -> None:
    if path is not None:
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            raise _refused(setting, path, f"cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What went wrong, without what it went wrong on."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
    return str(reason or type(error).__name__)


def _refused(setting: str, path: str, why: str) -> SettingsError:
    return SettingsError(f"{setting}: {path} {why}", setting=setting, value=path)
