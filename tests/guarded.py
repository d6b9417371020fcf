"""A pytest plugin (-p guarded): every buffer lies between guard zones that are checked after every launch."""

from engine.backend import get_backend
from engine.debug import guards

guards.install(get_backend("cpu"))
