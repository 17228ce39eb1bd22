"""The fencer: a process that ends what can still write when a hold is over or the controller is dead."""
