"""Programs of the operator, run for the verbs of the driver `exec`."""
