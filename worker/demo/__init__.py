"""The lead example as a package: workflows, leads, a mail provider, and the kills that it survives.

`workflows` is what a user would write. `leads` reads the CSV, `provider` and `mailserver` stand for the
messaging provider, `scenario` runs it all and kills it on the way, `report` says what came out.
"""
