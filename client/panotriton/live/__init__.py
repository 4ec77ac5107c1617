"""A page on which two panoramas become a group while one watches."""

from panotriton.live.app import Settings, create_app
from panotriton.live.server import serve

__all__ = ["Settings", "create_app", "serve"]
