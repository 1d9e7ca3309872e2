"""Whether an engine keeps its contract: ``check_engine``, and the checks that it is made of."""

from .checks import EngineCheck, engine_checks
from .formulas import Shard, random_shard
from .report import EngineReport, check_engine
from .subject import Subject
from .transfer import move

__all__ = [
    "EngineCheck",
    "EngineReport",
    "Shard",
    "Subject",
    "check_engine",
    "engine_checks",
    "move",
    "random_shard",
]
