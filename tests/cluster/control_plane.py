"""A Kubernetes control plane of the tests' own: etcd, API server, controller manager, scheduler.

    with ControlPlane(directory) as control_plane:
        control_plane.kubectl("get", "namespaces")

All listen on one address of this machine (loopback unless nodes must reach it) and on ports that were free at the start,
so several run side by side. Certificates live a day. The programs die with the process that started them; what a killed
one left in the directory is removed by the next start.
"""

from __future__ import annotations

import base64
import datetime
import http.client
import ipaddress
import json
import shutil
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from tests.cluster.kubernetes_binaries import find
from tests.cluster.processes import ClusterError, Daemon, run, wait_until
from tests.cluster.server import Server

SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"
LIFETIME = datetime.timedelta(days=1)


class ControlPlane:
    """A context manager; `start()` and `stop()` do the same.

    `directory` is its own: emptied at the start, removed at the stop. `address` is where it listens. Without
    `controllers` there is neither controller manager nor scheduler: no garbage collection, no ServiceAccounts, no
    namespace ever quite deleted.
    """

    def __init__(self, directory: Path, *, address: str = "127.0.0.1", controllers: bool = True) -> None:
        self.directory = directory
        self.address = address
        self.controllers = controllers
        self.kubeconfig = directory / "admin.conf"
        self.server = ""  # the URL, once started
        self._api: Server | None = None
        self.pki = Pki(directory / "pki")
        self._daemons: list[Daemon] = []

    def __enter__(self) -> ControlPlane:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- life

    def start(self) -> None:
        """Returns when the API server is ready, and the controllers are healthy: some 4 s.

        Raises `ClusterError` when one of them ends or does not get ready.
        """
        controllers = ("kube-controller-manager", "kube-scheduler") if self.controllers else ()
        for name in ("etcd", "kube-apiserver", "kubectl", *controllers):
            find(name)  # what is missing is made, and said, before anything runs
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, mode=0o700)
        try:
            self._start()
        except BaseException:
            self.stop(keep_logs=True)
            raise

    def stop(self, *, keep_logs: bool = False) -> None:
        """End all and remove the directory. May be called twice."""
        for daemon in reversed(self._daemons):
            daemon.kill()
        self._daemons.clear()
        if self._api:
            self._api.close_all()
        if not keep_logs:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        self.pki.write_authorities()
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        self.pki.issue("apiserver", "kube-apiserver", names=[self.address, "127.0.0.1", API_SERVICE, *names])
        self.pki.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", groups=["system:masters"])
        self.pki.issue("front-proxy-client", "front-proxy-client", authority="front-proxy-ca")
        etcd_port, peer_port, api_port, manager_port, scheduler_port = free_ports(self.address, 5)
        self.server = f"https://{self.address}:{api_port}"
        self._api = Server(self.kubeconfig_for("admin", groups=["system:masters"]))
        self._run_etcd(etcd_port, peer_port)
        self._run_apiserver(etcd_port, api_port)
        self._wait_for("kube-apiserver", api_port, "/readyz")
        if self.controllers:
            self._run_controllers(manager_port, scheduler_port)
            self._wait_for("kube-controller-manager", manager_port, "/healthz")
            self._wait_for("kube-scheduler", scheduler_port, "/readyz")
            self.create_namespace("default")

    def _run(self, name: str, *options: str) -> None:
        self._daemons.append(Daemon(name, [find(name), *options], self.directory / f"{name}.log"))

    def _run_etcd(self, port: int, peer_port: int) -> None:
        client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        self._run(
            "etcd",
            "--name=etcd",
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=etcd={peer}",
        )

    def _run_apiserver(self, etcd_port: int, port: int) -> None:
        pki = self.pki.directory
        options = [
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={port}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            "--anonymous-auth=false",
            "--allow-privileged=true",
            "--enable-admission-plugins=NodeRestriction",
            f"--client-ca-file={pki}/ca.crt",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
            f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={pki}/service-accounts.pub",
            f"--service-account-signing-key-file={pki}/service-accounts.key",
            # As itself, to aggregated APIs.
            f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
            f"--proxy-client-key-file={pki}/front-proxy-client.key",
            "--profiling=false",
        ]
        if ipaddress.ip_address(self.address).is_loopback:
            # A loopback address cannot be an endpoint: the reconciler would log an error every 10 s.
            options.append("--endpoint-reconciler-type=none")
        self._run("kube-apiserver", *options)

    def _run_controllers(self, manager_port: int, scheduler_port: int) -> None:
        pki = self.pki.directory
        for name, port, options in (
            (
                "kube-controller-manager",
                manager_port,
                [
                    f"--service-account-private-key-file={pki}/service-accounts.key",
                    f"--root-ca-file={pki}/ca.crt",
                    "--use-service-account-credentials=true",
                    f"--cluster-signing-cert-file={pki}/ca.crt",
                    f"--cluster-signing-key-file={pki}/ca.key",
                    # A lost node and a busy engine are seen in seconds, not minutes: tests wait for both.
                    "--node-monitor-grace-period=12s",
                    "--node-monitor-period=1s",
                    "--horizontal-pod-autoscaler-sync-period=1s",
                ],
            ),
            ("kube-scheduler", scheduler_port, []),
        ):
            kubeconfig = self.kubeconfig_for(f"system:{name}")
            self._run(
                name,
                f"--kubeconfig={kubeconfig}",
                f"--authentication-kubeconfig={kubeconfig}",
                f"--authorization-kubeconfig={kubeconfig}",
                "--leader-elect=false",
                f"--bind-address={self.address}",
                f"--secure-port={port}",
                *options,
            )

    def _wait_for(self, name: str, port: int, path: str) -> None:
        context = ssl.create_default_context(cafile=str(self.pki.directory / "ca.crt"))
        context.load_cert_chain(self.pki.directory / "admin.crt", self.pki.directory / "admin.key")
        if name != "kube-apiserver":
            # They sign their own certificates in memory; what is asked is only whether they live.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE

        def healthy() -> bool:
            connection = http.client.HTTPSConnection(self.address, port, timeout=5, context=context)
            try:
                connection.request("GET", path)
                return connection.getresponse().status == 200
            except OSError:
                return False
            finally:
                connection.close()

        wait_until(healthy, f"{name} healthy", daemons=self._daemons)

    # ---- use

    @property
    def api(self) -> Server:
        """Asked as admin, without a process of kubectl. Once started."""
        assert self._api
        return self._api

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """One of its programs is killed, and started again at the end: as it was, on the same port."""
        index = next(i for i, daemon in enumerate(self._daemons) if daemon.name == name)
        self._daemons[index].kill()
        try:
            yield
        finally:
            self._daemons[index] = self._daemons[index].again()
            wait_until(self._answers, f"{name} answers again", daemons=self._daemons)

    def _answers(self) -> bool:
        try:
            return self.api.text("/readyz") == "ok"
        except (ClusterError, OSError):
            return False

    def kubeconfig_for(self, user: str, *, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig of any user: what RBAC lets it do is what it can do."""
        name = user.replace(":", "-")
        certificate, key = self.pki.issue(name, user, groups=groups)
        encoded = {path: base64.b64encode(path.read_bytes()).decode() for path in (certificate, key)}
        authority = base64.b64encode((self.pki.directory / "ca.crt").read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "tests", "cluster": {"server": self.server, "certificate-authority-data": authority}}
            ],
            "users": [
                {
                    "name": user,
                    "user": {"client-certificate-data": encoded[certificate], "client-key-data": encoded[key]},
                }
            ],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": user}}],
            "current-context": "tests",
        }
        path = self.directory / f"{name}.conf"
        _write_private(path, json.dumps(config, indent=1).encode())
        return path

    def kubectl(self, *words: str, stdin: str | None = None, timeout_seconds: float = 60) -> str:
        """What `kubectl` printed, run as admin; `ClusterError` with its last line when it fails."""
        kubeconfig = f"--kubeconfig={self.kubeconfig}"
        return run(find("kubectl"), kubeconfig, *words, stdin=stdin, timeout_seconds=timeout_seconds)

    def get(self, *words: str) -> Any:
        """What `kubectl get WORDS -o json` prints of one kind: an object, or a list with `items`. Raises `ClusterError`."""
        return self.api.find(*words)

    def create_namespace(self, name: str, **labels: str) -> None:
        """A namespace that takes pods at once: the controller manager makes its ServiceAccount seconds later.

        `labels` without their prefix `pod-security.kubernetes.io/`, such as `enforce="privileged"`.
        """
        marks = {f"pod-security.kubernetes.io/{key}": value for key, value in labels.items()}
        self.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": marks}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}},
        )

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Apply manifests given as dictionaries, server-side, one after the other. Raises `ClusterError`."""
        for manifest in manifests:
            self.api.write(manifest)

    def define(self, *definitions: dict[str, Any]) -> None:
        """Apply definitions of kinds; returns when the server has them."""
        self.apply(*definitions)
        for definition in definitions:
            name = definition["metadata"]["name"]

            def established(name: str = name) -> bool:
                conditions = self.get("crd", name).get("status", {}).get("conditions") or []
                return ("Established", "True") in ((c["type"], c["status"]) for c in conditions)

            wait_until(established, f"crd/{name} established", daemons=self._daemons)

    def delete_namespace(self, name: str) -> None:
        """With all in it; does not wait for its end."""
        self.api.delete(f"/api/v1/namespaces/{name}")


class Pki:
    """Certificates of two authorities: `ca` for all, `front-proxy-ca` for the API server's aggregated APIs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._authorities: dict[str, tuple[x509.Certificate, ec.EllipticCurvePrivateKey]] = {}

    def write_authorities(self) -> None:
        self.directory.mkdir(parents=True, mode=0o700)
        for name in ("ca", "front-proxy-ca"):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            certificate = (
                _certificate(subject, subject, key)
                .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
                .add_extension(usage, critical=True)
                .sign(key, hashes.SHA256())
            )
            self._authorities[name] = (certificate, key)
            self._write(name, certificate, key)
        tokens = ec.generate_private_key(ec.SECP256R1())
        _write_private(self.directory / "service-accounts.key", _pem(tokens))
        public = tokens.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (self.directory / "service-accounts.pub").write_bytes(public)

    def issue(
        self,
        name: str,
        common_name: str,
        *,
        groups: Sequence[str] = (),
        names: Iterable[str] = (),
        authority: str = "ca",
    ) -> tuple[Path, Path]:
        """The files `name`.crt and `name`.key of a certificate for client and server; `names` are hosts and addresses."""
        issuer, issuer_key = self._authorities[authority]
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        builder = (
            _certificate(subject, issuer.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if alternatives := [_general_name(one) for one in names]:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return self._write(name, builder.sign(issuer_key, hashes.SHA256()), key)

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        paths = (self.directory / f"{name}.crt", self.directory / f"{name}.key")
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_private(paths[1], _pem(key))
        return paths


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFETIME)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def free_ports(address: str, count: int) -> list[int]:
    """Ports that nobody uses now on any address: etcd listens on the loopback interface, whatever `address` is.

    All are held together before they are let go, so that they differ.
    """
    held = []
    try:
        for host in (address, *[""] * count):
            one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(one)
            one.bind((host, 0))
        return [one.getsockname()[1] for one in held[1:]]
    except OSError as error:
        raise ClusterError(f"{address}: {error.strerror}; a control plane needs an address of this machine") from None
    finally:
        for one in held:
            one.close()
