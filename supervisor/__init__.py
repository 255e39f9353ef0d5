"""What runs in the supervisor process, and the Python interface to it.

    from speedlayer.supervisor import KafkaSource, SimpleStreamingEngine

A worker may import this package again (it imports its parent's ``__main__``), so importing it loads no Kafka library.
"""

from speedlayer.supervisor.engine import SimpleStreamingEngine, StreamingDataFrame
from speedlayer.supervisor.errors import ConfigurationError, SpeedlayerError, StreamingOverloadException
from speedlayer.supervisor.settings import BrakeSettings
from speedlayer.supervisor.sources import KafkaSource

__all__ = [
    "BrakeSettings",
    "ConfigurationError",
    "KafkaSource",
    "SimpleStreamingEngine",
    "SpeedlayerError",
    "StreamingDataFrame",
    "StreamingOverloadException",
]
