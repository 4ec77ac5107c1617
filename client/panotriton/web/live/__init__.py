"""A page on which two panoramas become a group while one watches."""

from panotriton.web.live.app import Settings, create_app
from panotriton.web.live.server import serve

__all__ = ["Settings", "create_app", "serve"]
