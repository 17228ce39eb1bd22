"""Faults of etcd, and of the way to it, under clients that never stop writing."""
