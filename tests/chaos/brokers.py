"""A Kafka of several real nodes (KRaft), to be hurt while clients use it. Runs in the campaign's or the test's process.

Every node is broker and controller. Each *side* (a supervisor, say) reaches every broker through a TCP proxy of its
own, so that one supervisor can be cut off from one broker or from all while nobody else notices. The test's own
clients (producers, the checker) use listeners without a proxy.

Measured with three nodes on two cores: up after 6 s; the partitions of a killed or frozen leader have another one
after 3 s (its session), and a killed node is in the in-sync sets again 3 s after its restart. A client that has a
request at a frozen leader follows to the new one only when the request times out: librdkafka's ``socket.timeout.ms``,
60 s if it is left alone (a lane got its rows after 62.7 s), 11 s with 10,000. It must be long enough for a whole
response on a slow line.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata

from fixtures.kafka import ADMIN_SECONDS, START_SECONDS, Broker, Kafka, new_cluster_id
from fixtures.ports import HOST, free_port
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until

# The heap that a broker with a handful of partitions needs; its process is about twice that in memory.
JAVA_OPTIONS = ("-Xms128m", "-Xmx320m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")

# A killed or frozen node is noticed within seconds; what has been acknowledged survives the loss of any one node.
CLUSTER_PROPERTIES: Mapping[str, object] = {
    "min.insync.replicas": 2,
    "unclean.leader.election.enable": "false",
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.min.isr": 2,
    "share.coordinator.state.topic.min.isr": 2,
    "replica.lag.time.max.ms": 3000,
    "replica.socket.timeout.ms": 3000,
    "controller.quorum.fetch.timeout.ms": 2000,
    "controller.quorum.election.timeout.ms": 1000,
    "controller.quorum.request.timeout.ms": 1500,
    "controlled.shutdown.enable": "true",
    # Leaders go back to a node that has returned, so that they move twice for every fault.
    "leader.imbalance.check.interval.seconds": 10,
}

# How long a broker that is not frozen may take to answer, on a machine that is busy.
ANSWER_SECONDS = 3.0

REPLICATED = (
    "default.replication.factor",
    "offsets.topic.replication.factor",
    "transaction.state.log.replication.factor",
    "share.coordinator.state.topic.replication.factor",
)


class BrokerCluster(Kafka):
    """Nodes 0 … ``count`` - 1, their proxies, and everything that a test does with a `Kafka`.

    ``sides`` has, for each side, the address on which its proxies listen (a loopback address, or the host's end of a
    network namespace). A nemesis may call everything here from any thread; while a node is frozen, what asks the
    cluster to change (`add_partitions`, `delete_records`) may take some seconds or raise a KafkaException.
    """

    def __init__(
        self,
        folder: Path,
        count: int = 3,
        replication: int = 3,
        sides: Sequence[str] = (HOST,),
        properties: Mapping[str, object] | None = None,
    ) -> None:
        self.replication = replication
        cluster_id = new_cluster_id()
        controllers = [free_port() for _ in range(count)]
        voters = ",".join(f"{node}@{HOST}:{port}" for node, port in enumerate(controllers))
        self.nodes: list[Broker] = []
        self.proxies: list[list[Proxy]] = [[] for _ in sides]
        self._lock = threading.RLock()
        for node, controller_port in enumerate(controllers):
            home = folder / f"broker-{node}"
            home.mkdir()
            broker = Broker(home, node_id=node, cluster_id=cluster_id, java_options=JAVA_OPTIONS)
            listeners = {"DIRECT": (HOST, broker.port)}
            advertised = dict(listeners)
            for side, host in enumerate(sides):
                proxy = Proxy((HOST, free_port()), host=host)
                self.proxies[side].append(proxy)
                listeners[f"SIDE{side}"] = proxy.target
                advertised[f"SIDE{side}"] = (proxy.host, proxy.port)
            broker.configure(
                {
                    "controller.quorum.voters": voters,
                    "listeners": _addresses({**listeners, "CONTROLLER": (HOST, controller_port)}),
                    "advertised.listeners": _addresses(advertised),
                    "listener.security.protocol.map": ",".join(f"{n}:PLAINTEXT" for n in (*listeners, "CONTROLLER")),
                    **CLUSTER_PROPERTIES,
                    **dict.fromkeys(REPLICATED, replication),
                    **(properties or {}),
                }
            )
            self.nodes.append(broker)

    # --- addresses --------------------------------------------------------------------------------------------

    @property
    def bootstrap_servers(self) -> str:
        """All brokers, without a proxy: for producers and for the checker."""
        return ",".join(node.bootstrap_servers for node in self.nodes)

    def bootstrap_servers_of(self, side: int) -> str:
        """All brokers through the proxies of this side."""
        return ",".join(proxy.address for proxy in self.proxies[side])

    @property
    def admin(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient(
                {
                    "bootstrap.servers": self.bootstrap_servers,
                    "reconnect.backoff.max.ms": 250,
                    # A frozen broker answers nothing: the connection is given up soon, and another one is asked.
                    "socket.timeout.ms": int(ANSWER_SECONDS * 1000),
                    "socket.max.fails": 1,
                    "log_level": 0,
                }
            )
        return self._admin

    # --- life -------------------------------------------------------------------------------------------------

    def start(self) -> BrokerCluster:
        """Start every node at once, and wait until all of them serve."""
        for side in self.proxies:
            for proxy in side:
                proxy.start()
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_serving()
        return self

    def close(self) -> None:
        """End everything, whatever state the test left it in."""
        with contextlib.ExitStack() as cleanup:
            for proxies in self.proxies:
                for proxy in proxies:
                    cleanup.callback(proxy.close)
            for node in self.nodes:
                cleanup.callback(node.close)

    def __enter__(self) -> BrokerCluster:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- faults -----------------------------------------------------------------------------------------------

    def running(self) -> list[int]:
        """The nodes whose process runs (it may be frozen)."""
        return [index for index, node in enumerate(self.nodes) if node.process.running]

    def kill(self, index: int) -> None:
        """End a node with SIGKILL; `restart` brings it back, with its data and its ports."""
        self.nodes[index].kill()

    def restart(self, index: int, *, wait: bool = True) -> None:
        """Start a node again, after ending it in order if it runs. With ``wait``, until it serves."""
        with self._lock:
            node = self.nodes[index]
            if node.process.running:
                node.thaw()
                node.stop()
            node.launch()
        if wait:
            node.wait_until_serving()

    def stop(self, index: int) -> None:
        """Freeze a node (SIGSTOP): its connections stay open, and it answers nothing."""
        self.nodes[index].freeze()

    def cont(self, index: int) -> None:
        """Let a frozen node go on (SIGCONT)."""
        self.nodes[index].thaw()

    def leaders(self, topic: str) -> dict[int, int]:
        """Which node leads which partition (-1: none)."""

        def told() -> dict[int, int] | None:
            metadata = self._metadata()
            # A node that is behind does not know a new topic yet.
            found = None if metadata is None else metadata.topics.get(topic)
            return None if found is None else {number: one.leader for number, one in found.partitions.items()}

        leaders = wait_until(told, f"a broker tells who leads {topic}", timeout_seconds=ADMIN_SECONDS)
        assert leaders is not None
        return leaders

    def coordinator_of(self, group: str) -> int:
        """The node that coordinates this group."""
        answer = self.admin.describe_consumer_groups([group])[group].result(ADMIN_SECONDS)
        return int(answer.coordinator.id)

    def wait_until_healthy(self, *topics: str, timeout_seconds: float = START_SECONDS) -> None:
        """Wait until all nodes serve and every replica of the topics (all, if none is named) is in sync."""
        for node in self.nodes:
            node.wait_until_serving()
        wait_until(lambda: self.out_of_sync(*topics) == {}, "every replica is in sync", timeout_seconds=timeout_seconds)

    def out_of_sync(self, *topics: str) -> dict[str, list[int]]:
        """The partitions that miss a replica or a leader, of these topics or of all (the internal ones included)."""
        metadata = self._metadata()
        if metadata is None:
            return {"(no broker tells its metadata)": []}
        names = list(topics) or list(metadata.topics)
        if not set(names) <= set(metadata.topics):
            return {"(the broker does not know the topic yet)": []}
        missing = {
            name: [
                number
                for number, partition in metadata.topics[name].partitions.items()
                if partition.leader < 0 or len(partition.isrs) < len(partition.replicas)
            ]
            for name in names
        }
        return {name: numbers for name, numbers in missing.items() if numbers}

    def add_partitions(self, topic: str, total: int) -> None:
        """Add partitions, and wait until every broker that answers tells of them (each learns it by itself)."""
        super().add_partitions(topic, total)
        wait_until(
            # Any broker may answer: so many in a row are most likely all of them.
            lambda: all(len(self.leaders(topic)) == total for _ in range(5 * len(self.nodes))),
            f"the brokers tell of {total} partitions of {topic}",
        )

    def _metadata(self) -> ClusterMetadata | None:
        """What one of the brokers tells; None when the one that was asked is frozen or gone."""
        try:
            return self.admin.list_topics(timeout=ANSWER_SECONDS)
        except KafkaException:
            return None


def _addresses(listeners: Mapping[str, tuple[str, int]]) -> str:
    return ",".join(f"{name}://{host}:{port}" for name, (host, port) in listeners.items())
