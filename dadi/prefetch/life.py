"""The life of a prefetch job: a table of states and events. Pure.

    QUEUED ──BEGIN──► RESOLVING ──RESOLVED──► WAITING ──DUE──► INDEXING ──INDEXED──► WARMING ──WARMED──► VERIFYING
                                                                                                            │
      unknown image, no space, a deadline                                                     VERIFIED ──► READY
      that cannot be met: said here, at once                                                     LACKS ──► FAILED

    any that is not over ──FAIL──► FAILED, ──CANCEL──► CANCELLED, ──AGAIN──► QUEUED
                           AGAIN: a restart; registry or sibling away; credentials came; the trace was learnt anew
    any that is over     ──RETRY──► QUEUED (`retry`, or asked for again)

What a job has brought stays where it is, whatever happens to the job: it begins anew and finds it.
"""

from __future__ import annotations

import enum

from dadi.errors import Conflict


class State(enum.Enum):
    """Where a job is. The values are what messages and files say."""

    QUEUED = "queued"
    RESOLVING = "resolving"
    WAITING = "waiting"
    INDEXING = "indexing"
    WARMING = "warming"
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in _OVER


class Event(enum.Enum):
    """What can happen to a job."""

    BEGIN = "begin"
    RESOLVED = "resolved"
    DUE = "due"
    INDEXED = "indexed"
    WARMED = "warmed"
    VERIFIED = "verified"
    LACKS = "lacks"
    FAIL = "fail"
    CANCEL = "cancel"
    AGAIN = "again"
    RETRY = "retry"


_OVER = {State.READY, State.FAILED, State.CANCELLED}
_UNDER_WAY = [state for state in State if state not in _OVER]

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.BEGIN): State.RESOLVING,
    (State.RESOLVING, Event.RESOLVED): State.WAITING,
    (State.WAITING, Event.DUE): State.INDEXING,
    (State.INDEXING, Event.INDEXED): State.WARMING,
    (State.WARMING, Event.WARMED): State.VERIFYING,
    (State.VERIFYING, Event.VERIFIED): State.READY,
    (State.VERIFYING, Event.LACKS): State.FAILED,
    **{(state, Event.FAIL): State.FAILED for state in _UNDER_WAY},
    **{(state, Event.CANCEL): State.CANCELLED for state in _UNDER_WAY},
    **{(state, Event.AGAIN): State.QUEUED for state in _UNDER_WAY},
    **{(state, Event.RETRY): State.QUEUED for state in _OVER},
}


def after(state: State, event: Event) -> State:
    """Return the state that follows; raise Conflict, and say so, if the event cannot happen there."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        hint = "dadi prefetch status shows what has become of it"
        raise Conflict(f"a job that is {state.value} has no {event.value!r}", hint=hint) from None
