"""Programs of an operator that do what a driver has to: see `leasehold.controller.drivers.exec`."""
