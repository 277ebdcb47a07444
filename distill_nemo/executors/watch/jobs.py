"""Interface of a job on a cluster, and the loop that polls it until its end."""

import abc
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

POLL_SECONDS = 2.0
MAX_UNSEEN_POLLS = 30  # polls in a row without an answer before giving up
MAX_STUCK_POLLS = 15  # polls in a row that find the job unable to start before giving up


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
        """Reason that the job does not run yet; empty if it runs or no reason is known."""
        ...

    @property
    def stuck(self) -> bool:
        """True when the job is unlikely ever to run."""
        ...


class ClusterJob(abc.ABC):
    """One submitted job."""

    name: str
    id: str
    folder: str  # holds its logs

    @abc.abstractmethod
    def state(self) -> Any:
        """Return the job's state.

        Raises:
            UnseenError: if the cluster gives no answer.
        """

    @abc.abstractmethod
    def new_text(self) -> Iterator[str]:
        """Return the complete lines that were added to the logs since the last call."""

    @abc.abstractmethod
    def new_shown(self) -> Iterator[str]:
        """Return the ranks' output since the last call, filtered for the screen."""

    @abc.abstractmethod
    def why(self, state: Any) -> str:
        """Return the `error: ...` of a job that did not complete."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """Cancel the job.

        Raises:
            RuntimeError: if the cluster refuses, with its message.
        """

    def watched(self, lines: Callable[[], Iterator[str]]) -> Iterator[tuple[Any, str]]:
        """Poll until the job has ended. Each poll yields (state, "") and then (state, line) for each new line.

        Raises:
            UnseenError: after `MAX_UNSEEN_POLLS` polls in a row without an answer; the job itself continues. While
                the job runs, missing logs alone never raise: a lost node's logs return with its replacement.
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
                if unseen == MAX_UNSEEN_POLLS and state and state.ended:
                    return
                if unseen == MAX_UNSEEN_POLLS:
                    raise UnseenError(f"job {self.id} cannot be seen any more, but may continue: {error}") from None
            time.sleep(POLL_SECONDS)

    def follow(self, out: Any) -> Any:
        """Write the ranks' output to `out` until the job has ended or cannot start. Return its last state.

        Raises:
            UnseenError: as `watched`.
        """
        state, stuck = None, 0
        before = printed = ""
        for state, line in self.watched(self.new_shown):
            if line:
                print(line, end="", file=out, flush=True)
                continue
            # A reason is printed once it has lasted for two polls: some are gone at once.
            if state.waits == before and state.waits not in ("", printed):
                print(f"{self.name}: job {self.id} {state}", file=out, flush=True)
                printed = state.waits
            before, stuck = state.waits, stuck + 1 if state.stuck else 0
            if stuck > MAX_STUCK_POLLS:
                break
        return state
