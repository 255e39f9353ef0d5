"""Each fault of the cluster really strikes, strikes only whom it is meant for, and really ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from chaos.brokers import BrokerCluster
from fixtures.kafka import Message, PacedProducer
from fixtures.ports import HOST
from fixtures.waiting import wait_until
from fixtures.workspace import announced, private_folder

PARTITIONS = 6
# A node's session of 3 s, an election, and a client's retries, on a machine that is busy.
NOTICED_SECONDS = 30.0


@pytest.fixture(scope="module")
def cluster(pytestconfig: pytest.Config) -> Iterator[BrokerCluster]:
    with private_folder("cluster") as folder:
        cluster = BrokerCluster(folder, sides=(HOST, HOST))
        try:
            with announced(pytestconfig, "three Kafka brokers"):
                cluster.start()
            yield cluster
        finally:
            cluster.close()


@pytest.fixture
def topic(cluster: BrokerCluster) -> Iterator[str]:
    topic = cluster.create_topic(partitions=PARTITIONS)
    cluster.wait_until_healthy(topic)
    yield topic
    for proxies in cluster.proxies:
        for proxy in proxies:
            proxy.heal()


def looking_on(bootstrap_servers: str) -> Consumer:
    return Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "never-joined", "log_level": 0})


def reaches(bootstrap_servers: str, topic: str, timeout_seconds: float = 3.0) -> bool:
    """Whether a client that begins there gets the topic's metadata and one of its offsets."""
    consumer = looking_on(bootstrap_servers)
    try:
        for partition in range(PARTITIONS):
            consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_seconds)
    except KafkaException:
        return False
    finally:
        consumer.close()
    return True


def produced(cluster: BrokerCluster, topic: str) -> PacedProducer:
    return PacedProducer(
        cluster, topic, lambda number: Message(b"%d" % number, partition=number % PARTITIONS), per_second=500
    )


def assert_topic_holds(cluster: BrokerCluster, topic: str, sent: int) -> None:
    assert sorted(int(record.value or b"") for record in cluster.read(topic)) == list(range(sent))


def test_every_node_leads_and_every_partition_has_three_replicas(cluster: BrokerCluster, topic: str) -> None:
    assert set(cluster.leaders(topic).values()) == {0, 1, 2}
    partitions = cluster.admin.list_topics(topic).topics[topic].partitions.values()
    assert [len(partition.replicas) for partition in partitions] == [3] * PARTITIONS


def test_a_killed_node_leads_no_longer_nothing_acknowledged_is_lost_and_it_comes_back(
    cluster: BrokerCluster, topic: str
) -> None:
    victim = cluster.leaders(topic)[0]
    producer = produced(cluster, topic).start()
    wait_until(lambda: producer.sent > 500, "it produces")
    cluster.kill(victim)
    assert victim not in cluster.running()
    wait_until(
        lambda: victim not in cluster.leaders(topic).values() and -1 not in cluster.leaders(topic).values(),
        "others lead",
        timeout_seconds=NOTICED_SECONDS,
    )
    before = producer.sent
    wait_until(lambda: producer.sent > before + 500, "it goes on producing", timeout_seconds=NOTICED_SECONDS)
    cluster.restart(victim)
    cluster.wait_until_healthy(topic)
    assert_topic_holds(cluster, topic, producer.stop())


def test_a_frozen_node_is_left_by_its_partitions_and_follows_again_when_it_goes_on(
    cluster: BrokerCluster, topic: str
) -> None:
    victim = cluster.leaders(topic)[0]
    producer = produced(cluster, topic).start()
    cluster.stop(victim)
    try:
        assert victim in cluster.running()
        wait_until(
            lambda: victim not in cluster.leaders(topic).values(), "others lead", timeout_seconds=NOTICED_SECONDS
        )
        assert cluster.out_of_sync(topic) != {}
    finally:
        cluster.cont(victim)
    cluster.wait_until_healthy(topic)
    assert_topic_holds(cluster, topic, producer.stop())


def test_a_running_node_is_restarted_in_order(cluster: BrokerCluster, topic: str) -> None:
    before = cluster.nodes[1].pid
    cluster.restart(1)
    assert cluster.nodes[1].pid != before
    cluster.wait_until_healthy(topic)


def test_one_side_is_cut_off_while_the_others_notice_nothing(cluster: BrokerCluster, topic: str) -> None:
    assert reaches(cluster.bootstrap_servers_of(0), topic)
    for proxy in cluster.proxies[0]:
        proxy.refuse()
    assert not reaches(cluster.bootstrap_servers_of(0), topic)
    assert reaches(cluster.bootstrap_servers_of(1), topic)
    assert reaches(cluster.bootstrap_servers, topic)
    for proxy in cluster.proxies[0]:
        proxy.heal()
    assert reaches(cluster.bootstrap_servers_of(0), topic, timeout_seconds=10)


def test_a_side_goes_through_its_own_proxies_alone(cluster: BrokerCluster, topic: str) -> None:
    """Also after the first metadata: what the brokers advertise on a side's listener are the proxies of that side."""
    for side in (0, 1):
        metadata = AdminClient({"bootstrap.servers": cluster.bootstrap_servers_of(side)}).list_topics(timeout=10)
        ports = {broker.id: broker.port for broker in metadata.brokers.values()}
        assert ports == {index: proxy.port for index, proxy in enumerate(cluster.proxies[side])}


def test_a_side_is_cut_off_from_one_node_only(cluster: BrokerCluster, topic: str) -> None:
    cluster.proxies[0][2].deaf()
    assert not reaches(cluster.bootstrap_servers_of(0), topic)
    led_by_others = [partition for partition, leader in cluster.leaders(topic).items() if leader != 2]
    consumer = Consumer(
        {"bootstrap.servers": cluster.bootstrap_servers_of(0), "group.id": "never-joined", "log_level": 0}
    )
    try:
        for partition in led_by_others:
            assert consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10) == (0, 0)
    finally:
        consumer.close()


def test_deleted_records_are_gone_and_the_end_stays(cluster: BrokerCluster, topic: str) -> None:
    cluster.produce(topic, [Message(b"%d" % number, partition=0) for number in range(100)])
    cluster.delete_records(topic, 0, 60)
    assert cluster.start_offsets(topic)[0] == 60
    assert cluster.end_offsets(topic)[0] == 100
    assert len(cluster.read(topic)) == 40


def test_retention_eats_what_is_old(cluster: BrokerCluster) -> None:
    topic = cluster.create_topic(partitions=1, retention_ms=1_000, segment_ms=1_000)
    cluster.produce(topic, [b"soon gone"] * 100)
    wait_until(lambda: cluster.start_offsets(topic) == {0: 100}, "retention has eaten it all", timeout_seconds=60)


def test_partitions_are_added(cluster: BrokerCluster, topic: str) -> None:
    cluster.add_partitions(topic, PARTITIONS + 3)
    assert cluster.partitions(topic) == list(range(PARTITIONS + 3))
    cluster.produce(topic, [Message(b"new", partition=PARTITIONS + 2)])
