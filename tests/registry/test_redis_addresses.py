"""The registry on a Redis behind TLS, on one that sentinels watch, and on a node of a cluster: real ones."""

import threading
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import Redis
from redis.exceptions import RedisError

from adapter_registry import redis_server
from adapter_registry.errors import CannotStartError, StoreUnavailableError
from adapter_registry.redis_address import RedisAddress
from adapter_registry.redis_store import RedisStore
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from local_stack.stack import free_ports
from tests.redis_process import LASTING, RedisProcess, SentinelProcess

pytestmark = pytest.mark.filterwarnings("ignore:The .* attribute with value:UserWarning")
"""FastAPI hides it while it builds a field, which the threads of two servers undo for each other."""

QUICK = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")


def settings(data_dir, url, **more):
    return RegistrySettings(port=0, data_dir=data_dir, redis_url=url, log_level="warning", **more)


def until(said):
    end = time.monotonic() + 60
    while not said():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def started(tmp_path_factory):
    """started(kind, *arguments): a process in a folder of its own, killed at the end."""
    with ExitStack() as running:

        def start(kind, *arguments):
            process = kind(tmp_path_factory.mktemp("r"), *arguments)
            running.callback(process.kill)
            return process

        yield start


def at(port):
    return Redis(host="127.0.0.1", port=port, decode_responses=True)


def is_online(client):
    return client.info("replication").get("slave0", {}).get("state") == "online"


def is_whole(client):
    return client.cluster("info")["cluster_state"] == "ok"


def answers(ask):
    with suppress(RedisError):
        return bool(ask())
    return False


def answered(ask):
    with suppress(StoreUnavailableError, httpx.TransportError):
        return bool(ask())
    return False


def clustered(port, bus):
    return ("--port", str(port), "--cluster-enabled", "yes", "--cluster-port", str(bus), *LASTING, *QUICK)


def own(process, first=0, last=16383):
    """These slots are the node's."""
    with Redis.from_url(process.url) as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
        if (first, last) == (0, 16383):
            until(lambda: is_whole(client))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:pass@h:1/2", "h:1/2"),
        (
            "redis+sentinel://u:pass@a:1,b/prad/3?sentinel_password=pass",
            "prad/3 by the sentinels a:1,b:26379",
        ),
        ("rediss+sentinel://[::1]:1,b:2/prad", "prad/0 by the sentinels [::1]:1,b:2"),
        ("redis+cluster://:pass@a,b:7?socket_keepalive=yes", "cluster a:6379,b:7"),
        ("rediss+cluster://a:7/0", "cluster a:7"),
    ],
)
def test_an_address_is_shown_without_its_password(url, shown):
    address = RedisAddress(url)
    address.check()
    assert str(address) == shown


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+sentinel://a:1", "a service by its name"),
        ("redis+sentinel://a:1/prad/x", "a database's number"),
        ("redis+sentinel://a:b/prad", "Port"),
        ("redis+sentinel:///prad", "no list of hosts"),
        ("redis+cluster://a:1,:2", "no list of hosts"),
        ("redis+cluster://a:1/2", "database 0 alone"),
        ("redis+nothing://a:1", "must specify one of the following schemes"),
    ],
)
def test_an_address_that_is_none_is_refused_and_the_forms_are_named(data_dir, url, why):
    with pytest.raises(CannotStartError, match=rf"redis_url cannot be read: .*{why}.*redis\+cluster://host"):
        RegistryServer(settings(data_dir, url))


def certificate(folder):
    """A key, and a certificate of 127.0.0.1 that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "certificate", folder / "key"


@pytest.mark.parametrize("kind", ["rediss", "rediss+cluster"])
def test_over_tls_with_a_password(data_dir, tmp_path, started, adapter, serving, monkeypatch, kind):
    monkeypatch.setattr(redis_server, "_START_S", 1.0)
    trusted, key = certificate(tmp_path)
    (port, bus) = free_ports(2)
    tls = ("--tls-port", str(port), "--tls-cert-file", str(trusted), "--tls-key-file", str(key))
    more = ("--tls-ca-cert-file", str(trusted), "--tls-auth-clients", "no", "--requirepass", "of-many-words")
    clustered = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--tls-cluster", "yes")
    running = started(RedisProcess, *tls, *more, *LASTING, *(clustered if "cluster" in kind else ()))
    if "cluster" in kind:
        socket = running.url.removeprefix("unix://")
        with Redis(unix_socket_path=socket, password="of-many-words") as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            until(lambda: is_whole(client))
    for wrong in (
        f"{kind}://:of-many-words@localhost:{port}",
        f"{kind}://localhost:{port}?ssl_ca_certs={trusted}",
    ):
        with pytest.raises(CannotStartError, match="cannot be used") as refused:
            RedisStore(wrong)
        assert "of-many-words" not in str(refused.value)
    url = f"{kind}://:of-many-words@localhost:{port}?ssl_ca_certs={trusted}"
    with serving(settings(data_dir, url)) as one, serving(settings(data_dir, url)) as two:
        one.verified(adapter(1))
        until(lambda: two.client.changes(0, 0) is not None)
        assert two.client.task("support").routing.default == 1


def test_what_was_acknowledged_survives_a_failover(data_dir, started, adapter, serving):
    """Acknowledged is what a replica has as well: the master is killed among pushes and promotions."""
    master_port, replica_port, sentinel_port = free_ports(3)
    master = started(RedisProcess, "--port", str(master_port), *LASTING, *QUICK)
    following = ("--replicaof", "127.0.0.1", str(master_port))
    started(RedisProcess, "--port", str(replica_port), *following, *LASTING, *QUICK)
    with at(master_port) as client:
        until(lambda: is_online(client))
    started(SentinelProcess, sentinel_port, master_port)
    with at(sentinel_port) as client:
        until(lambda: answers(lambda: client.sentinel_slaves("prad")))
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel_port}/prad/0"
    acknowledged, promoted, ended = {}, {}, threading.Event()

    def keep_changing(http):
        seed = 0
        while not ended.is_set():
            seed += 1
            pushed = http.post("/v1/tasks/support/versions", json={"path": str(adapter(seed))})
            if pushed.status_code != 201:
                assert pushed.json()["error"]["code"] == "store_unavailable", pushed.text
                time.sleep(0.05)
                continue
            number = pushed.json()["version"]
            acknowledged[number] = pushed.json()["digest"]
            path = f"/v1/tasks/support/versions/{number}"
            if http.post(f"{path}/probe", json={"ok": True}).status_code == 200:
                routed = http.post(f"{path}/promote")
                if routed.status_code == 200:
                    promoted[routed.json()["routing"]["revision"]] = number

    both = settings(data_dir, url, redis_replicas=1)
    with serving(both) as one, serving(both) as two:
        assert one.http.get("/ready").json().get("warnings", []) == []
        changing = threading.Thread(target=keep_changing, args=(one.http,))
        changing.start()
        until(lambda: len(promoted) >= 5)
        master.kill()
        before = dict(acknowledged)
        with at(replica_port) as client, at(sentinel_port) as sentinel:
            until(lambda: sentinel.sentinel_masters()["prad"]["port"] == replica_port)
            with pytest.raises(StoreUnavailableError):  # nobody else has it, so it is not acknowledged
                two.client.retire("support", 1)
            master.start()
            with at(master_port) as old:
                old.execute_command("REPLICAOF", "127.0.0.1", replica_port)
            until(lambda: len(acknowledged) >= len(before) + 5)
            ended.set()
            changing.join()
            assert client.role()[0] == "master"
        task = two.client.task("support")
        stored = {version.version: version.digest for version in task.versions}
        assert acknowledged.items() <= stored.items()
        assert task.routing.revision >= max(promoted)
        heard = two.client.state().revision
        one.push(adapter(1000))
        assert two.client.changes(heard, 30) is not None, "the other hears of changes at the new master"


def test_without_a_replicas_word_it_warns_of_failovers(started, stored_adapter):
    port, bus = free_ports(2)
    alone = started(RedisProcess, *clustered(port, bus))
    own(alone)
    store = RedisStore(f"redis+cluster://127.0.0.1:{port}")
    (warning,) = store.warnings()
    assert "set redis_replicas" in warning
    store.close()
    asked = RedisStore(f"redis+cluster://127.0.0.1:{port}", replicas=1)
    assert asked.warnings() == ()
    with pytest.raises(StoreUnavailableError, match="only 0 of its replicas have it"):
        asked.push("support", stored_adapter(1))
    assert asked.task("support").versions, "it says so: the change may have been made"
    asked.close()


def test_in_a_cluster_the_node_with_the_registrys_slot_is_found_and_followed(
    data_dir, started, adapter, serving
):
    """Three nodes: two share the slots, the third is a copy of the one that has ours, and takes its place."""
    ports = free_ports(6)
    nodes = [started(RedisProcess, *clustered(*ports[n : n + 2])) for n in (0, 2, 4)]
    clients = [at(ports[n]) for n in (0, 2, 4)]
    slot = clients[0].execute_command("CLUSTER KEYSLOT", "{prad}:registry")
    own(nodes[0], 0, slot - 1)
    own(nodes[1], slot, 16383)
    for n, client in enumerate(clients):  # one after the other knows the ones before
        client.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
        if n:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", ports[2 * n], ports[2 * n + 1])
    for client in clients:
        until(lambda client=client: is_whole(client))
    copied = clients[1].execute_command("CLUSTER MYID")
    until(lambda: answers(lambda: clients[2].execute_command("CLUSTER REPLICATE", copied)))
    until(lambda: is_online(clients[1]))
    url = f"redis+cluster://127.0.0.1:1,127.0.0.1:{ports[0]}"
    both = settings(data_dir, url, redis_replicas=1)
    with serving(both) as one, serving(both) as two:
        until(lambda: answered(lambda: one.push(adapter(1))))
        assert clients[1].exists("{prad}:registry")
        revision = two.client.state().revision

        clients[2].execute_command("CLUSTER FAILOVER", "TAKEOVER")
        until(lambda: answered(lambda: one.push(adapter(2))))
        assert clients[2].hget("{prad}:registry", "revision") == str(one.client.state().revision)
        until(
            lambda: answered(
                lambda: (two.client.changes(revision, 1) or two.client.state()).revision > revision
            )
        )
        nodes[2].kill()
        assert one.http.get("/ready").status_code == 503
        clients[1].execute_command("CLUSTER FAILOVER", "TAKEOVER")
        until(lambda: one.http.get("/ready").status_code == 200)
        assert [v.version for v in one.client.task("support").versions] == [1, 2]
    for client in clients:
        client.close()
