"""How a controller stands, for its service manager: in a sentence, and whether a new start would mend it.

It would where the fencer is gone or does not look, or leases are not looked after. It would not where etcd
does not answer: a new start could not register either, and what goes on without etcd would end.
"""

from collections import Counter

from leasehold.controller.agent import Agent
from leasehold.controller.fencer.channel import FencerChannel
from leasehold.controller.hold import Phase
from leasehold.controller.session import Session
from leasehold.runtime.notify import Condition, EtcdWords
from leasehold.store.alarms import Alarms
from leasehold.store.leases import LeaseKeeper

_WORDS = {
    Phase.SERVING: "served",
    Phase.PREPARING: "being prepared",
    Phase.ENDING: "being given up",
    Phase.PROVED: "being passed on",
}


class Observed:
    """One controller that has started."""

    def __init__(
        self, agent: Agent, session: Session, fencer: FencerChannel, keeper: LeaseKeeper, alarms: Alarms
    ) -> None:
        self._agent = agent
        self._session = session
        self._fencer = fencer
        self._keeper = keeper
        self._alarms = alarms
        self._etcd = EtcdWords()

    def condition(self) -> Condition:
        """As of now."""
        return Condition(f"{self._devices()}{self._troubles()}", self._amiss())

    def _devices(self) -> str:
        phases = Counter(hold.phase for hold in self._agent.holds.values())
        if not phases:
            return "no devices held"
        parts = [f"{phases[phase]} {words}" for phase, words in _WORDS.items() if phases[phase]]
        total = phases.total()
        return f"{total} {'device' if total == 1 else 'devices'} held: {', '.join(parts)}"

    def _troubles(self) -> str:
        told = [self._etcd.say(self._alarms)]
        if self._session.me is None:
            told.append("not registered")
        return "".join(f"; {words}" for words in told if words)

    def _amiss(self) -> str:
        if not self._fencer.present:
            return "there is no fencer"
        if self._fencer.stale:
            return f"the fencer, process {self._fencer.pid}, does not look"
        if self._keeper.neglected:
            return "leases are not looked after"
        return ""
