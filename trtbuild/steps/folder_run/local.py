"""Reading and preparing in this process, in turn with the network: `-npp 0`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from trtbuild.spec import ModelSpec
from trtbuild.steps.folder_run.messages import Forget, Look, Message, Read, Reading, Request, Second
from trtbuild.steps.folder_run.worker_main import answer
from trtbuild.volume import Prepared
from trtbuild.volume.image import Header, Image, Segmentation


class LocalWorker:
    """Answers at once, as `worker.Worker` does in time; a crash of an image library ends this process."""

    pids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._kept: dict[str, Image] = {}
        self._requests: dict[str, Read] = {}

    def look(self, request: Request) -> Future[Header | None]:
        """What the case's header says."""
        return self._answered(Look(read=Read(request=request, folder=None)))

    def submit(self, request: Request) -> Future[Reading]:
        """Reads and prepares the case."""
        read = Read(request=request, folder=None)
        self._requests[request.case] = read
        return self._answered(read)

    def second(self, case: str, spec: ModelSpec, segmentation: Segmentation) -> Future[Prepared]:
        """Prepares a kept case for the second stage of a cascade."""
        return self._answered(Second(read=self._requests[case], spec=spec, segmentation=segmentation))

    def forget(self, case: str) -> None:
        """Frees a kept image."""
        self._requests.pop(case, None)
        self._answered(Forget(case=case))

    def warm(self, specs: object) -> Future[None]:
        """Nothing: the first case loads what it needs."""
        return self._answered(Forget(case=""))

    def _answered(self, message: Message) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(answer(message, self._kept, lambda stage: None))
        except Exception as error:  # noqa: BLE001  # raised again by whoever asks for the result
            future.set_exception(error)
        return future
