"""A job on a cluster, watched from outside until its end."""

import abc
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

INTERVAL = 2.0  # seconds between two looks
UNSEEN = 30  # looks without an answer after which it is given up
MAX_STUCK_LOOKS = 15  # looks at a job that cannot start


class UnseenError(RuntimeError):
    """The cluster does not answer, or does not know the job."""


class State(Protocol):
    """State of a job; its `str()` is for the user."""

    @property
    def ended(self) -> bool:
        """True when the job is over."""
        ...

    @property
    def completed(self) -> bool:
        """True when the job succeeded."""
        ...

    @property
    def waits(self) -> str:
        """Why it does not run yet; empty when it does, or no reason is known."""
        ...

    @property
    def stuck(self) -> bool:
        """True when the job will hardly ever run."""
        ...


class ClusterJob(abc.ABC):
    """One submitted job."""

    name: str
    id: str
    folder: str  # of its logs

    @abc.abstractmethod
    def state(self) -> Any:
        """Return the job's state.

        Raises:
            UnseenError: when the cluster does not say.
        """

    @abc.abstractmethod
    def new_text(self) -> Iterator[str]:
        """Return the lines that the logs have gained since the last call, whole ones only."""

    @abc.abstractmethod
    def new_shown(self) -> Iterator[str]:
        """Return the ranks' output since the last call, as it is shown."""

    @abc.abstractmethod
    def why(self, state: Any) -> str:
        """`error: ...` of a job that did not complete."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """End it.

        Raises:
            RuntimeError: in the cluster's words, when it does not.
        """

    def watched(self, lines: Callable[[], Iterator[str]]) -> Iterator[tuple[Any, str]]:
        """Look after look until the job has ended: how it is then, with "", and with each of the new `lines`.

        Raises:
            UnseenError: when the cluster has not shown it `UNSEEN` times in a row. The job goes on. For logs alone it
                waits as long as the job runs: those of a node that is lost come back with another.
        """
        unseen, state = 0, None
        while True:
            runs = False
            try:
                state = self.state()
                runs = not state.ended
                yield state, ""
                for line in lines():
                    yield state, line
                unseen = 0
                if state.ended:
                    return
            except UnseenError as error:
                unseen = 0 if runs else unseen + 1
                if unseen == UNSEEN and state and state.ended:
                    return
                if unseen == UNSEEN:
                    raise UnseenError(f"job {self.id} is not seen any more, and perhaps goes on: {error}") from None
            time.sleep(INTERVAL)

    def follow(self, out: Any) -> Any:
        """Write what the ranks say to `out` until the job has ended, or cannot start; returns how it is then.

        Raises:
            UnseenError: as `watched`.
        """
        state, stuck = None, 0
        before = told = ""
        for state, line in self.watched(self.new_shown):
            if line:
                print(line, end="", file=out, flush=True)
                continue
            if state.waits == before and state.waits not in ("", told):  # some reasons last for a moment only
                print(f"{self.name}: job {self.id} {state}", file=out, flush=True)
                told = state.waits
            before, stuck = state.waits, stuck + 1 if state.stuck else 0
            if stuck > MAX_STUCK_LOOKS:
                break
        return state
