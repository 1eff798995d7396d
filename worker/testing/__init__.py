"""What tests of workflows use: a database of their own, a worker in their own process, time that can be moved on.

pytest knows it as the fixture `stepwell` (see `stepwell_pytest.py`); docs/testing.md tells how to use it.
"""

from worker.testing.crashes import Crash
from worker.testing.kit import NotIdle, StepwellTest

__all__ = ["Crash", "NotIdle", "StepwellTest"]
