"""A PostgreSQL of the distribution's, for what the embedded one cannot: TLS, certificates, passwords."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import psql

SERVERS = Path("/usr/lib/postgresql")
DATABASE = "telemetry"
HBA = """
local   all all                      trust
hostssl all +by_certificate localhost   cert
hostssl all +by_certificate samehost    cert
host    all +by_password    samehost    scram-sha-256
"""


class Authority:
    """A CA of the test's own, and what it signs."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.certificate, self._key = folder / "ca.crt", folder / "ca.key"
        self._openssl("req", "-x509", "-subj", f"/CN={name}", "-keyout", self._key, "-out", self.certificate,
                      "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip

    def issue(self, name: str, *, hosts: str = "", days: int = 1, passphrase: str = "") -> tuple[Path, Path]:
        """A certificate for a common name, valid for `days` from now on, and its key."""
        stem = f"{re.sub(r'[^a-z0-9]', '-', name)}{days if days < 0 else ''}{'-locked' if passphrase else ''}"
        certificate, key, request = (self.folder / f"{stem}.{end}" for end in ("crt", "key", "csr"))
        self._openssl("req", "-new", "-subj", f"/CN={name}", "-keyout", key, "-out", request,
                      passphrase=passphrase)  # fmt: skip
        extensions = self.folder / f"{stem}.ext"
        extensions.write_text(f"subjectAltName={hosts}\n" if hosts else "basicConstraints=CA:FALSE\n")
        run("openssl", "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-out",
            certificate, "-days", days, "-CAcreateserial", "-extfile", extensions)  # fmt: skip
        key.chmod(0o600)
        return certificate, key

    def _openssl(self, *arguments: object, passphrase: str = "") -> None:
        lock = ["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"]
        run("openssl", *arguments, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *lock)


def run(*command: object, user: str | None = None) -> str:
    """A program, which has to succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd="/", user=user,
                          group=user, extra_groups=[] if user else None)  # fmt: skip
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def programs() -> Path:
    """Where the newest server of the distribution is; without one, or without openssl, the test is skipped."""
    found = sorted(SERVERS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found or shutil.which("openssl") is None:
        pytest.skip(f"needs openssl and PostgreSQL in {SERVERS}: apt install postgresql openssl")
    return found[-1].parent


class TlsServer:
    """One server: TLS with a certificate for localhost; roles by certificate or by password, as groups of that name."""

    def __init__(self, folder: Path) -> None:
        self._programs, self.folder, self.data = programs(), folder, folder / "data"
        self._user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root.
        self.authority = Authority(folder / "ca", "The CA")
        folder.chmod(0o755)
        self.data.mkdir()
        if self._user:
            shutil.chown(self.data, self._user, self._user)
        run(self._programs / "initdb", "-D", self.data, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8",
            "-A", "trust", "--no-sync", user=self._user)  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        (self.data / "pg_hba.conf").write_text(HBA)
        with (self.data / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {self.port}\nlisten_addresses = 'localhost'\nssl = on\nfsync = off\n"
                           f"unix_socket_directories = '{self.data}'\nssl_ca_file = 'root.crt'\n"
                           "log_connections = on\n")  # fmt: skip
        self.show("root.crt", self.authority.certificate)
        self.present(*self.authority.issue("server", hosts="DNS:localhost"))
        run(self._programs / "pg_ctl", "-D", self.data, "-l", self.data / "log", "-w", "start", user=self._user)
        self.admin = f"postgresql://postgres@/{DATABASE}?host={quote(str(self.data))}&port={self.port}"
        psql(self.admin.replace(f"/{DATABASE}?", "/postgres?"), f"CREATE DATABASE {DATABASE}")
        psql(self.admin, "CREATE ROLE by_certificate", "CREATE ROLE by_password")

    def program(self, name: str) -> Path:
        """Of the server's own version."""
        return self._programs / name

    def show(self, name: str, path: Path) -> None:
        """A file of the server's own, in place of the one before; in force at `reload`."""
        new = self.data / f"{name}.new"
        shutil.copy(path, new)
        new.chmod(0o600)
        if self._user:
            shutil.chown(new, self._user, self._user)
        new.rename(self.data / name)

    def present(self, certificate: Path, key: Path) -> None:
        """The server's certificate from now on."""
        self.show("server.crt", certificate)
        self.show("server.key", key)

    def reload(self, *settings: str) -> None:
        """SIGHUP, and then whoever connects meets what was changed; those that are connected are cut off."""
        for setting in settings:
            psql(self.admin, f"ALTER SYSTEM SET {setting}")
        # Later than pg_reload_conf returns; a new session has the time from the server that started it.
        loaded = "SELECT pg_conf_load_time()"
        before = psql(self.admin, loaded)
        psql(self.admin, "SELECT pg_reload_conf()")
        while psql(self.admin, loaded) == before:
            pass
        self.cut()

    def cut(self) -> None:
        """End every connection over TCP."""
        psql(
            self.admin,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE client_addr IS NOT NULL",
        )

    def dsn(self, role: str, *, host: str = "localhost", **parameters: object) -> str:
        """Over TCP, with parameters such as sslmode."""
        query = "&".join(f"{name}={quote(str(value))}" for name, value in parameters.items())
        return f"postgresql://{quote(role, safe=':')}@{host}:{self.port}/{DATABASE}?{query}"

    def stop(self) -> None:
        run(self._programs / "pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop", user=self._user)


@contextmanager
def tls_server() -> Iterator[TlsServer]:
    """A server for the time being."""
    programs()
    folder = Path(tempfile.mkdtemp(prefix="ingestd-tls-", dir="/var/lib" if os.geteuid() == 0 else None))
    try:
        server = TlsServer(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
