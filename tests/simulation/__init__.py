"""The code that decides, over an etcd and on a clock that there are not: hours of it in seconds, always the
same."""
