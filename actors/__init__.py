"""Hosts (Ray, processes) and the thin shells around the decisions of everstep.platform."""
