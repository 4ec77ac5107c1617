"""A server for tests of anything but how a server ends."""

from panotriton.server.launch import LocalServer


class BriefServer(LocalServer):
    """Ends at once: an orderly end takes four seconds, and test_serve.py has it."""

    def stop(self) -> None:
        """Safe to call twice, as the other is."""
        self.kill()
        super().stop()
