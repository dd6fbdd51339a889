"""Certificates for tests: of 127.0.0.1, signed by itself; and of services, signed by an authority."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def certificate(folder: Path) -> tuple[Path, Path]:
    """Signed by itself, and its key."""
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    _openssl("req", "-x509", *_KEY, "-days", "2", *files, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    return folder / "cert.pem", folder / "key.pem"


class Authority:
    def __init__(self, folder: Path) -> None:
        self.cert, self._key = folder / "authority.crt", folder / "authority.key"
        _openssl("req", "-x509", *_KEY, "-days", "2", "-keyout", str(self._key), "-out", str(self.cert), "-subj", "/CN=authority")

    def sign(self, folder: Path, names: Sequence[str] = ("baton.internal",)) -> Path:
        """Fills `folder`, made if need be, as cert-manager fills a secret: tls.crt, tls.key, ca.crt."""
        folder.mkdir(exist_ok=True)
        request, extensions, new = folder / "request", folder / "extensions", folder / "new.crt"
        extensions.write_text(f"subjectAltName={','.join(f'DNS:{name}' for name in names)}\nextendedKeyUsage=serverAuth,clientAuth\n")
        _openssl("req", *_KEY, "-keyout", str(folder / "tls.key"), "-out", str(request), "-subj", "/CN=service")
        signed = ["-CA", str(self.cert), "-CAkey", str(self._key), "-CAcreateserial", "-days", "2", "-extfile", str(extensions)]
        _openssl("x509", "-req", "-in", str(request), *signed, "-out", str(new))
        new.rename(folder / "tls.crt")
        (folder / "ca.crt").write_bytes(self.cert.read_bytes())
        request.unlink()
        extensions.unlink()
        return folder


def settings(folder: Path, prefix: str = "security.") -> list[str]:
    """Of a service that has the certificate in `folder`."""
    files = {"cert": "tls.crt", "key": "tls.key", "authority": "ca.crt"}
    return [f"{prefix}{setting}={folder / file}" for setting, file in files.items()]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
