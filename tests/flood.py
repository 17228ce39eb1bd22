"""A process that writes as fast as it is let, over several connections at once.

    python flood.py PATH EPOCH CONNECTIONS BLOCKS

Connection n writes its own BLOCKS blocks of the export, again and again, with many requests under way. Prints
"flowing" once each has had replies, and ends when each was refused or cut off: "refused", and how many blocks
were acknowledged.
"""

import sys
import threading

from leasehold.client.nbd import NbdClient
from stamps import BLOCK, stamped

AHEAD = 32
"""Requests of one connection under way."""
PATIENCE = 60.0
"""Seconds for an answer: the server is frozen for some."""
WARM = 200
"""Blocks acknowledged on each connection before it counts as flowing."""
_WRITE = 1


class Flood:
    def __init__(self, path: str, epoch: int, connections: int, blocks: int) -> None:
        self._path, self._epoch, self._blocks = path, epoch, blocks
        self._warm = threading.Barrier(connections + 1)
        self._acknowledged = [0] * connections
        self._threads = [threading.Thread(target=self._pour, args=(number,)) for number in range(connections)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        self._warm.wait(PATIENCE)
        print("flowing", flush=True)
        for thread in self._threads:
            thread.join()
        print(f"refused {sum(self._acknowledged)}", flush=True)

    def _pour(self, number: int) -> None:
        client = NbdClient(self._path, timeout=PATIENCE)
        places = range(number * self._blocks, (number + 1) * self._blocks)
        data = [memoryview(stamped(place, self._epoch)) for place in places]
        warm = False
        try:
            while True:
                for start in range(0, self._blocks, AHEAD):
                    for at in range(start, start + AHEAD):
                        client._send(_WRITE, (places.start + at) * BLOCK, BLOCK, data[at])
                    for _ in range(AHEAD):
                        if client._receive(16)[4:8] != bytes(4):
                            return
                        self._acknowledged[number] += 1
                if not warm and self._acknowledged[number] >= WARM:
                    warm = True
                    self._warm.wait(PATIENCE)
        except OSError:
            # The reset that a refusal ends with.
            return
        finally:
            client.close()


if __name__ == "__main__":
    Flood(sys.argv[1], *map(int, sys.argv[2:])).run()
