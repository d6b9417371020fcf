"""Looking inside: who made the first NaN, where the time goes, what the graph looks like.

All three hang on the launch point and the tape (engine.backend.observers, engine.autograd.watchers); nothing in the
engine knows of them, and they cost nothing while they are off.
"""

from engine.debug.anomaly import detect_anomaly
from engine.debug.drawing import draw
from engine.debug.profiler import Profile, profile

__all__ = ["Profile", "detect_anomaly", "draw", "profile"]
