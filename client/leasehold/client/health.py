"""The standard health check of gRPC, grpc.health.v1, as it is on the wire: clients need no package for it."""

CHECK = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
"""HealthCheckResponse(status=SERVING)."""
WHOLE, ETCD = "", "leasehold.etcd"
"""The services: a daemon as a whole, and how it sees etcd."""


def request(service: str = WHOLE) -> bytes:
    """HealthCheckRequest(service=...), of a name of at most 127 characters."""
    return b"\x0a" + bytes((len(service),)) + service.encode() if service else b""
