"""The supervisor's pure core: events in, actions out; no I/O, no clock, no thread."""
