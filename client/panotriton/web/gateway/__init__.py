"""The HTTP services that callers of file paths know, and their tensor twins, in front of a Triton server.

Needs the extra: pip install 'panotriton[gateway]'.
"""

from panotriton.web.gateway.app import Settings, create_apps
from panotriton.web.gateway.server import serve

__all__ = ["Settings", "create_apps", "serve"]
