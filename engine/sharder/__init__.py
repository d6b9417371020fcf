"""The parameter server. README.md has the protocol on one page."""

from engine.sharder.binding import bind, take_gradients
from engine.sharder.client import Client
from engine.sharder.consistency import Consistency, inverse_staleness
from engine.sharder.drivers.processes import ProcessServer
from engine.sharder.drivers.ray_server import RayServer
from engine.sharder.drivers.threads import ParameterServer
from engine.sharder.events import Committed
from engine.sharder.partition import Partition

__all__ = ["Client", "Committed", "Consistency", "ParameterServer", "Partition", "ProcessServer", "RayServer",
           "bind", "inverse_staleness", "take_gradients"]
