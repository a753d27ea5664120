"""Fault-tolerant groups: membership, coordinator, transports. Usable alone, without Ray."""
