"""A proxy in front of a server: one that ends TLS, or one that is far away."""

from __future__ import annotations

import asyncio
import ssl
import threading
from pathlib import Path


class Proxy:
    """Passes bytes on to a port of this machine. certificates: a folder of them, to end TLS with.

    late_s: how much later the first bytes of each answer come, as from the other side of the world.
    bytes_per_s: of a connection, towards the server; 0 for as many as there are.
    """

    def __init__(
        self,
        target: int,
        *,
        certificates: Path | None = None,
        late_s: float = 0,
        bytes_per_s: int = 0,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.target = target
        self.certificates = certificates
        self.late_s = late_s

    def __enter__(self) -> int:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        started = asyncio.run_coroutine_threadsafe(self.start(), self.loop)
        return started.result(10)

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self.stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def start(self) -> int:
        context = None
        if self.certificates:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificates / "cert.pem", self.certificates / "key.pem")
        self.tasks: set[asyncio.Task[None]] = set()
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=context)
        return int(self.server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            await asyncio.gather(
                self.pump(reader, back, bytes_per_s=self.bytes_per_s),
                self.pump(there, writer, late_s=self.late_s),
            )
        finally:
            back.close()
            writer.close()

    @staticmethod
    async def pump(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        late_s: float = 0,
        bytes_per_s: int = 0,
    ) -> None:
        await asyncio.sleep(late_s)
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(len(data) / bytes_per_s if bytes_per_s else 0)
        writer.close()
