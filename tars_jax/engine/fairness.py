"""Who is served next: by priority, then the client that has been served least, then arrival. Plain Python.

Each client has a count of the tokens it was served, output tokens weighing more; whoever comes new or comes back starts at the least
count of those that are there, so that idling earns no credit (virtual token counters, Sheng et al. 2024, arXiv 2401.00588).
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterator

from tars_jax.engine.sequence import Sequence

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # cost of a token
MAX_IDLE = 4096  # clients without requests whose counts are remembered


class FairQueue:
    """The waiting sequences, and what each client has been served."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Sequence]] = {}  # by client, each list in the order in which it goes; none is empty
        self._present: Counter[str] = Counter()  # sequences of each client, waiting or running
        self._served: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:  # from any thread
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for client in self._waiting.values() for sequence in client)

    def enter(self, sequence: Sequence) -> None:
        """Queue a sequence that is new."""
        client = sequence.request.client
        if not self._present[client]:
            least = min((self._served[other] for other, count in self._present.items() if count), default=0)
            self._served[client] = max(self._served.get(client, 0), least)
        self._present[client] += 1
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that was running."""
        self._size += 1
        insort(self._waiting.setdefault(sequence.request.client, []), sequence, key=lambda s: s.order)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence has ended."""
        self._present[sequence.request.client] -= 1
        idle = [client for client in self._served if not self._present[client]]
        everybody = len(idle) == len(self._served)  # nobody is left to be compared with
        for client in idle if everybody else idle[:-MAX_IDLE]:
            del self._served[client], self._present[client]

    def first(self) -> Sequence:
        """The waiting sequence whose turn it is."""
        return min((client[0] for client in self._waiting.values()), key=self.rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        self._size -= 1
        client = self._waiting[sequence.request.client]
        client.remove(sequence)
        if not client:
            del self._waiting[sequence.request.client]

    def rank(self, sequence: Sequence) -> tuple[int, int, int, int]:
        """Sorts sequences, waiting or running, into the order in which they are served; of clients served the same the one with fewer
        requests comes first."""
        priority, arrival = sequence.order
        client = sequence.request.client
        return priority, self._served[client], self._present[client], arrival

    def charge(self, sequence: Sequence, count: int) -> None:
        """Note that ``count`` more of a sequence's tokens are computed; those computed before are free."""
        end = sequence.computed + count
        new = range(max(sequence.charged, sequence.computed), end)
        outputs = max(end - max(new.start, sequence.prompt_length), 0)
        self._served[sequence.request.client] += len(new) * PROMPT_WEIGHT + outputs * (OUTPUT_WEIGHT - PROMPT_WEIGHT)
        sequence.charged = max(sequence.charged, end)
