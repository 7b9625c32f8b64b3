"""A token bucket: how long to wait before going on, so that no more than a rate goes through. Pure: time is given.

One that is asked for more than it holds lets it through and is in debt for it: whoever comes next waits longer. So a
step may be larger than what the bucket holds, several may take from one bucket, and the rate is kept on the whole.
"""

from __future__ import annotations


class Bucket:
    """`rate` in units a second, 0 for no limit; `burst`: what may pass at once after a pause (half a second's)."""

    def __init__(self, rate: float, now: float, *, burst: float | None = None) -> None:
        self.rate = rate
        self._burst = rate / 2 if burst is None else burst
        self._tokens = self._burst
        self._at = now

    def __repr__(self) -> str:
        return f"Bucket({self.rate:.0f}/s, {self._tokens:.0f} left)"

    def take(self, amount: float, now: float) -> float:
        """Take; return the seconds to wait before the amount may pass."""
        if not self.rate:
            return 0.0
        self._fill(now)
        self._tokens -= amount
        return max(0.0, -self._tokens / self.rate)

    def change(self, rate: float, now: float) -> None:
        """Go on with another rate; debts stay."""
        self._fill(now)
        self.rate, self._burst = rate, rate / 2
        self._tokens = min(self._tokens, self._burst)

    def _fill(self, now: float) -> None:
        # A clock that was set back gives nothing, and takes nothing.
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self.rate)
        self._at = now
