"""Batches that fit into memory."""

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)

BATCH = 256  # images per forward pass, where nothing else is said: `PurifyConfig.per_device_eval_batch_size`

Result = TypeVar("Result")


def run_with_fitting_batch(function: Callable[[int], Result], batch_size: int = BATCH) -> Result:
    """Call a function with a batch size, and from its beginning with half of that as long as memory runs out.

    accelerate's own loop, `find_executable_batch_size`, collects all garbage before its first try, too: a second each time.

    Args:
        function: Takes the number of images in a batch.
        batch_size: What to try first, at least 1.

    Returns:
        What the function returns.

    Raises:
        RuntimeError: A single image does not fit either.
    """
    while True:
        try:
            return function(batch_size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch_size == 1:
                reason = str(error).partition("\n")[0]
                raise RuntimeError(
                    f"a single image does not fit into memory: free some or use another device ({reason})"
                ) from error
        # Not inside the except block: the error holds the frames, and these the tensors.
        clear_device_cache(garbage_collection=True)
        batch_size //= 2
        logger.warning("memory is short: going on with a batch size of %d", batch_size)
