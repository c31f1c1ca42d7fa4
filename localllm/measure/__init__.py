"""How fast a model runs on this machine: what `localllm bench` prints, as data."""

from localllm.measure.bench import measure
from localllm.measure.plan import Settings
from localllm.measure.report import LeftOut, Report, Row
from localllm.measure.timing import Figure

__all__ = ["Figure", "LeftOut", "Report", "Row", "Settings", "measure"]
