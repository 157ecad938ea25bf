"""A call that is checked once and made many times: `BoundCall`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

from mla_fp8._check.streams import RepeatedOrder


class BoundCall:
    """A call of the operator on fixed arrays, from `MLAIndexerRaggedFloat8Paged.bind`.

    ``call()`` reads the arrays as they are then, writes the same results each time, and returns
    them. Nothing is checked or allocated again. On a GPU it launches a CUDA graph that ``bind`` has
    captured, and takes a few microseconds of the host.

    Attributes
    ----------
    results : array or tuple of arrays
        What ``call()`` returns: the caller's ``out``, or the arrays that ``bind`` allocated. They
        hold no results before the first call. For JAX they are CuPy's (on the host NumPy's),
        because JAX's arrays do not change.

    Notes
    -----
    - What arrays hold may change between calls: queries, keys, scales, offsets, lengths, tables,
      an array of ``key_start``. Shapes and addresses may not. What was a number on the host when
      the call was bound keeps its value, such as ``k_max_lengths`` there.
    - Values are checked by ``bind`` alone. Later ones are treated as with ``check=False``, on a GPU
      and on the host: the keys that wrong values would address are missing from the result.
    - A call runs on the stream on which `__call__` of the operator would run, whatever device is
      current, and in order with the work of other libraries on their current streams.
    - All calls share results and scratch memory, so they must be ordered: make them on one stream,
      or let the streams wait for each other. Threads may share the object, if they read the
      results before the next call writes them.
    - While the current stream is being captured, a call adds its kernels to the caller's graph. The
      object must live as long as that graph.
    - The object keeps its arrays and its memory alive. Keep the object until its last call has
      ended, if that is on another stream than the one on which it was bound.
    - It holds addresses, so it cannot be copied or pickled.

    Examples
    --------
    >>> import numpy as np
    >>> from mla_fp8 import MLAIndexerRaggedFloat8Paged, PagedKeyCache
    >>> keys = np.arange(1, 5, dtype=np.float32)[:, None] * np.ones(32, np.float32)
    >>> cache = PagedKeyCache.from_dense([keys])
    >>> q, qs = np.full((4, 2, 32), 0x38, np.uint8), np.full((4, 2), 0.5, np.float32)
    >>> op = MLAIndexerRaggedFloat8Paged(num_heads=2, depth=32, k=1, quantization_granularity=32)
    >>> call = op.bind(q, qs, cache.input_row_offsets, *cache.view())
    >>> call().ravel()
    array([0, 1, 2, 3], dtype=int32)
    >>> qs[...] = -qs  # now the smallest product is the best
    >>> call().ravel()
    array([0, 0, 0, 0], dtype=int32)
    """

    __slots__ = ("__weakref__", "_lock", "_order", "_run", "results")

    def __init__(self, run: Callable[[], None], order: RepeatedOrder, results: Any) -> None:
        self._run, self._order, self.results = run, order, results
        self._lock = threading.Lock()  # a launch changes state on the host

    def __call__(self) -> Any:
        """Run the operation on the arrays as they are now.

        Returns
        -------
        array or tuple of arrays
            `results`.
        """
        with self._order(), self._lock:
            self._run()
        return self.results

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BoundCall must stay in its process, because it holds addresses; "
            "got a request to copy or pickle it (bind the arrays there instead)"
        )
