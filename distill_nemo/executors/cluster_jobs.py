"""A job on a cluster, watched from outside until its end."""

import abc
import time
from collections.abc import Iterator
from typing import Any, Protocol

INTERVAL = 2.0  # seconds between two looks
UNSEEN = 30  # looks without an answer after which it is given up
STUCK = 15  # looks at a job that cannot start


class UnseenError(RuntimeError):
    """The cluster does not answer, or does not know the job."""


class State(Protocol):
    """How a job is; `str()` of it is for the user."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        ...

    @property
    def completed(self) -> bool:
        """Whether it ended well."""
        ...

    @property
    def waits(self) -> str:
        """Why it does not run yet; empty when it does, or no reason is known."""
        ...

    @property
    def stuck(self) -> bool:
        """Whether it will hardly ever run."""
        ...


class ClusterJob(abc.ABC):
    """One submitted job."""

    name: str
    id: str
    folder: str  # of its logs

    @abc.abstractmethod
    def state(self) -> Any:
        """How it is.

        Raises:
            UnseenError: when the cluster does not say.
        """

    @abc.abstractmethod
    def new_text(self) -> Iterator[str]:
        """What its logs have got since the last call, whole lines only."""

    @abc.abstractmethod
    def new_shown(self) -> Iterator[str]:
        """What its ranks have said since the last call, as it is shown."""

    @abc.abstractmethod
    def why(self, state: Any) -> str:
        """`error: ...` of a job that did not complete."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """End it.

        Raises:
            RuntimeError: in the cluster's words, when it does not.
        """

    def follow(self, out: Any) -> Any:
        """Write what the ranks say to `out` until the job has ended, or cannot start; returns how it is then.

        Raises:
            UnseenError: when the cluster has not shown it `UNSEEN` times in a row. The job goes on. For logs alone it
                waits as long as the job runs: those of a node that is lost come back with another.
        """
        unseen = stuck = 0
        before = told = ""
        state = None
        while True:
            runs = False
            try:
                state = self.state()
                runs = not state.ended
                if state.waits == before and state.waits not in ("", told):  # some reasons last for a moment only
                    print(f"{self.name}: job {self.id} {state}", file=out, flush=True)
                    told = state.waits
                before, stuck = state.waits, stuck + 1 if state.stuck else 0
                for line in self.new_shown():
                    out.write(line)
                unseen = 0
                if state.ended or stuck >= STUCK:
                    return state
            except UnseenError as error:
                unseen = 0 if runs else unseen + 1
                if unseen == UNSEEN and state and state.ended:
                    return state
                if unseen == UNSEEN:
                    raise UnseenError(f"job {self.id} is not seen any more, and perhaps goes on: {error}") from None
            finally:
                out.flush()
            time.sleep(INTERVAL)
