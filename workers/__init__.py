"""What runs in the worker processes: decoding, transforms, sinks; and the messages both processes share."""
