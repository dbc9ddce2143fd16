"""A DataLoader over a `ShuffledStream` that knows the state of what it has handed out, however far its workers are."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from lapa.data.shuffled_stream import END, Failure, ShuffledStream


class _CollateWithState:
    """Batches examples and adds which stream they come from and its state after them."""

    def __init__(self, stream: ShuffledStream, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        self.stream, self.collate_fn = stream, collate_fn

    def __call__(self, examples: list[Any]) -> tuple[Any, int, str | Failure]:
        info = get_worker_info()
        if isinstance(examples[-1], Failure):
            return None, 0, examples[-1]
        # In a worker the data set that is being read is its own copy.
        stream: Any = self.stream if info is None else info.dataset
        kept = [example for example in examples if example is not END]
        try:
            batch = None if not kept else kept if self.collate_fn is None else self.collate_fn(kept)
        except ValueError as error:
            if info is None:
                raise
            return None, 0, Failure(error)
        # In this process the stream itself knows its state, whenever somebody asks.
        return (batch, *stream.worker_state()) if info is not None else (batch, 0, "")


class StreamLoader(DataLoader[Any]):
    r"""
    Batches of a stream, with exact resume.

    ```python
    >>> loader = StreamLoader(stream, batch_size=64, collate_fn=FramePairCollator(), num_workers=4)
    >>> batches = iter(loader)
    >>> batch, state = next(batches), stream.state_dict()
    >>> stream.load_state_dict(state)  # the next pass over the loader begins with the second batch
    ```

    Each batch comes from one stream, in turn; it brings that stream's state along. So `stream.state_dict()` is always
    that of the batches handed out, and after `stream.load_state_dict` the workers take over the streams in the order in
    which they were next: the batches are those of a run that was not interrupted. (Near the end of a single pass, once a
    stream has ended, torch fills its turn with whichever worker comes first. The batches stay the same, their order may
    not.)

    The loader leaves torch's global random generator alone, so that a resumed training draws the same noise.

    Args:
        stream: What is read; it must not be read by anything else meanwhile.
        batch_size: Examples per batch; the last batch of each stream of a single pass may be smaller.
        collate_fn: Makes a batch of examples; a list of them when None.
        num_workers: Processes that read; 0 reads in this one.
        pin_memory, prefetch_factor, multiprocessing_context: As in [`~torch.utils.data.DataLoader`].
    """

    dataset: ShuffledStream

    def __init__(
        self,
        stream: ShuffledStream,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: Any = None,
    ) -> None:
        super().__init__(
            stream,
            batch_size=batch_size,
            collate_fn=_CollateWithState(stream, collate_fn),
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            multiprocessing_context=multiprocessing_context,
            # Of its own, and always the same: nothing is drawn from it, and torch's own is not touched.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:
        self.dataset.begin(max(1, self.num_workers), in_loader=True)
        for batch, worker, state in super().__iter__():
            if state:
                self.dataset.record(worker, state)
            if batch is not None:
                yield batch
        self.dataset.finish_pass()


__all__ = ["StreamLoader"]
