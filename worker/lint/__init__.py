"""Find in the source of workflow bodies what a replay could not repeat, before anything runs.

Only text is read: what is checked is never imported or executed, so it may be checked where nothing of it is
installed. In the order in which they are used:

- `sources` finds APP and reads files. It is the only module here that touches the file system;
- `scopes` and `modules` parse them and note which name is bound to what, as Python scopes them;
- `resolving` says what an expression denotes, by imports, definitions, annotations and assignments;
- `bodies` walks one function, `ordering` and `sharing` beside it know sets and module-level state, and
  `library` knows which functions of the standard library and of others are which rule's business;
- `checking` starts at the workflows, follows their helper functions in the same package, never into steps, and
  takes out what a comment silences (`ignores`).

It says nothing where it cannot tell: a name that may be two things, a method of a value of unknown type, a
decorator from elsewhere. What slips through is caught when the body runs, by `worker.engine.sandbox`.
"""

from worker.lint.checking import Report, check
from worker.lint.findings import Finding
from worker.lint.rules import RULES, Rule

__all__ = ["RULES", "Finding", "Report", "Rule", "check"]
