"""Thousands of devices and hundreds of controllers on one machine: what they cost, and how fast it stays."""
