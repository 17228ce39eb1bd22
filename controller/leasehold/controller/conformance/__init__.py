"""Does a driver keep what it promises? What `leasehold driver-check` tries."""
