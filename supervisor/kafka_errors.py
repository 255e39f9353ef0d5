"""What librdkafka complains of, with the remedy, for people (supervisor process, commands; loads no Kafka library)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from speedlayer.supervisor.core.trouble import TELLING

if TYPE_CHECKING:
    from confluent_kafka import KafkaError
    from confluent_kafka.admin import AdminClient

_SECURITY = "do security.protocol, sasl.* and ssl.* suit the broker's listener?"

_REMEDIES = {
    "_SSL": "check ssl.ca.location (whom we trust), ssl.certificate.location and ssl.key.location (who we are), that"
    " security.protocol suits the listener, and that the broker's certificate is in date and names its host",
    "_AUTHENTICATION": "check sasl.mechanism, sasl.username and sasl.password, and that security.protocol suits the"
    " listener",
    "_ALL_BROKERS_DOWN": f"are the addresses right, are the brokers up, and {_SECURITY}",
    "_TRANSPORT": f"is the address right, is the broker up, and {_SECURITY}",
    "_RESOLVE": "check the host names in bootstrap.servers, and those that the brokers advertise",
    "_TIMED_OUT": f"is the address right, is the broker up, and {_SECURITY}",
    "TOPIC_AUTHORIZATION_FAILED": "grant this client READ on the topic",
    "GROUP_AUTHORIZATION_FAILED": "grant this client READ on the group",
}


def remedy_of(error: KafkaError) -> str:
    """What to look at, "" for an error that points at nothing."""
    return _REMEDIES.get(error.name(), "")


def explain(error: KafkaError) -> str:
    """The error and what to look at."""
    remedy = remedy_of(error)
    return f"{error.str()} — {remedy}" if remedy else error.str()


class Complaints:
    """Keeps what an admin client complains of: its questions themselves end in "transport failure" or "timed out".

    `note` is the client's ``error_cb``.
    """

    def __init__(self) -> None:
        self._noted: list[KafkaError] = []

    def note(self, error: KafkaError) -> None:
        """Take a complaint in."""
        self._noted.append(error)

    def cause_of(self, failure: KafkaError, client: AdminClient) -> KafkaError:
        """What has made a question fail: the last telling complaint since the last time, else the failure itself."""
        client.poll(0)
        telling = [error for error in self._noted if error.name() in TELLING]
        self.forget()
        return telling[-1] if telling else failure

    def forget(self) -> None:
        """Nobody will ask for a cause of what was complained of so far."""
        self._noted.clear()
